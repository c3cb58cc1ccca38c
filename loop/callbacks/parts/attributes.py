"""Numbers of a model that are no tensors, such as the p of a Dropout: found by path, set, and put
back.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from functional_sgd.errors import did_you_mean

ROOT = "model."
"""What the path of an attribute begins with."""


@dataclass(frozen=True)
class Attribute:
    """A number of a layer."""

    layer: nn.Module
    name: str

    def set(self, value: object) -> None:
        """Write it into the layer: only while `attributes_kept` is open."""
        setattr(self.layer, self.name, value)


def find_attribute(who: str, model: nn.Module, path: str) -> Attribute:
    """The attribute at a path: "model.1.p" is model[1].p, "model.p" the model's own p.

    Raises ValueError, on behalf of `who`, if there is no such layer, or no such number in it.

    >>> find_attribute("me", nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), "model.1.p").name
    'p'
    """
    where, _, name = path.removeprefix(ROOT).rpartition(".")
    # By default, torch lists a layer that is used twice under its first name only.
    layers = dict(model.named_modules(remove_duplicate=False))
    if where not in layers:
        raise ValueError(
            f"{who}: {path!r}: the model has no layer {where!r}. "
            f"{did_you_mean(where, filter(None, layers))}"
        )
    layer = layers[where]
    if not _is_number(getattr(layer, name, None)):
        public = {key: value for key, value in vars(layer).items() if not key.startswith("_")}
        numbers = [key for key, value in public.items() if _is_number(value)]
        raise ValueError(
            f"{who}: {path!r}: {type(layer).__name__} has no number {name!r}. "
            f"{did_you_mean(name, numbers)}"
        )
    return Attribute(layer, name)


class Before(NamedTuple):
    """What an attribute was."""

    attribute: Attribute
    own: bool  # whether the layer had it itself, not from its class
    value: object


@contextmanager
def attributes_kept(attributes: Iterable[Attribute]) -> Iterator[None]:
    """Give every one of these attributes its value back, whatever happens.

    >>> layer = nn.Dropout(0.5)
    >>> with attributes_kept([Attribute(layer, "p")]):
    ...     layer.p = 0.1
    >>> layer.p
    0.5
    """
    kept = []
    for attribute in attributes:
        layer, name = attribute.layer, attribute.name
        kept.append(Before(attribute, name in vars(layer), getattr(layer, name)))
    try:
        yield
    finally:
        for before in kept:
            layer, name = before.attribute.layer, before.attribute.name
            if not before.own and name in vars(layer):  # it was the class's, and is so again
                delattr(layer, name)
            else:
                before.attribute.set(before.value)


def _is_number(value: object) -> bool:
    # A bool is an int, but flags such as `inplace` are no numbers to schedule.
    return isinstance(value, (int, float)) and not isinstance(value, bool)
