"""What a model keeps in attributes, where no state sees it: a counter, a hidden state."""

import warnings
from collections.abc import Mapping

from torch import Tensor, nn

from functional_sgd.fingerprint import PLAIN

OF_ANY = frozenset(vars(nn.Module()))
"""The attributes that every module has: its parameters, hooks, mode."""


def is_of_torch(layer: nn.Module) -> bool:
    """Whether torch has defined its class."""
    return type(layer).__module__.partition(".")[0] == "torch"


def attributes_of(model: nn.Module) -> dict[str, object]:
    """Every attribute of the layers, by path, as something that can be compared.

    Layers of torch are left out: what those keep, they make again when they need it. So are objects
    that are neither plain nor tensors, nor made of such.
    """
    found: dict[str, object] = {}
    for path, layer in model.named_modules():
        prefix = f"{path}." if path else ""
        if not is_of_torch(layer):
            for name, value in vars(layer).items():
                if name not in OF_ANY:
                    found[f"{prefix}{name}"] = _look(value)
        # A buffer that is None is in no state, so what a forward pass puts there counts as an
        # attribute.
        for name, value in layer._buffers.items():
            if value is None:
                found[f"{prefix}{name}"] = None
    return found


def changed_attributes(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """The paths of the attributes that differ."""
    changed = []
    for path in {**before, **after}:
        # The default is not None: a buffer that was None before, and is a tensor now, has changed.
        if before.get(path, "none") != after.get(path, "none"):
            changed.append(path)
    return changed


def warn_of_attributes(model: nn.Module, before: Mapping[str, object]) -> None:
    """Say so if a batch has changed attributes of the model."""
    changed = changed_attributes(before, attributes_of(model))
    if changed:
        warnings.warn(
            f"Learner: every batch changes {', '.join(changed)} of the {type(model).__name__}. "
            f"Attributes are not in the state, so if the output depends on them, a resumed or "
            f"repeated run differs. Make them buffers (register_buffer), which the state has.",
            stacklevel=2,
        )


class _Kept:
    """A tensor as it was: equal if it is the same one and nobody has written to it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        # Tensors of inference mode have no version, and asking for it is an error.
        self.version = -1 if tensor.is_inference() else tensor._version

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Kept)
            and other.tensor is self.tensor
            and other.version == self.version
        )


def _look(value: object, depth: int = 3) -> object:
    """What tells later on whether an attribute is the same: of containers, each part."""
    if isinstance(value, Tensor):
        return _Kept(value)
    if isinstance(value, PLAIN):
        return value
    if depth and isinstance(value, Mapping):
        return {str(key): _look(part, depth - 1) for key, part in value.items()}
    if depth and isinstance(value, (list, tuple)):
        return [_look(part, depth - 1) for part in value]
    return type(value)
