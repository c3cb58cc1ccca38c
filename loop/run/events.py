"""The training loop, drawn once, as data: its scopes, its stages, its events, and which signals
each place allows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Event:
    """A named place where the state passes through the callbacks."""

    name: str


@dataclass(frozen=True)
class Stage:
    """Work that the machine does between events; written in brackets, as in [predict]."""

    name: str


@dataclass(frozen=True)
class Scope:
    """before_x; the parts; a CancelX raised in there gives after_cancel_x; then after_x in both
    cases.
    """

    name: str
    parts: tuple["Part", ...]
    # "for each ..." if the machine runs it more than once in a row; it is then the only part.
    repeat: str = ""
    # The condition under which the machine runs it, if any.
    when: str = ""
    # Done as a whole or not at all: a run can be resumed before and after it, but not within.
    whole: bool = False

    @property
    def before(self) -> str:
        """The event at the opening."""
        return f"before_{self.name}"

    @property
    def cancelled(self) -> str:
        """The event after a signal has ended the scope."""
        return f"after_cancel_{self.name}"

    @property
    def after(self) -> str:
        """The event at the close, cancelled or not."""
        return f"after_{self.name}"


Part: TypeAlias = Event | Stage | Scope

_FORWARD = (Stage("predict"), Event("after_pred"), Stage("loss"), Event("after_loss"))

BACKWARD = Scope("backward", (Stage("gradients"),), whole=True)
STEP = Scope("step", (Stage("update"),), when="if there are gradients", whole=True)
TRAIN_BATCH = Scope(
    "batch", (*_FORWARD, BACKWARD, STEP), repeat="for each training batch", whole=True
)
VALID_BATCH = Scope("batch", _FORWARD, repeat="for each validation batch", whole=True)
TRAIN = Scope("train", (TRAIN_BATCH,))
VALIDATE = Scope("validate", (VALID_BATCH,), when="if there is validation data")
EPOCH = Scope("epoch", (TRAIN, VALIDATE), repeat="for each epoch")
FIT = Scope("fit", (EPOCH,))


@dataclass(frozen=True)
class Place:
    """An event where it happens: inside these scopes, of which `open` can still be cancelled."""

    event: str
    inside: tuple[str, ...]
    open: tuple[str, ...]


def places(scope: Scope = FIT, outer: tuple[str, ...] = ()) -> Iterator[Place]:
    """Every event of a scope, in order, with where it happens."""
    inside = (*outer, scope.name)
    yield Place(scope.before, inside, inside)
    for part in scope.parts:
        if isinstance(part, Event):
            yield Place(part.name, inside, inside)
        elif isinstance(part, Scope):
            yield from places(part, inside)
    yield Place(scope.cancelled, inside, outer)
    yield Place(scope.after, inside, outer)


def stages_of(scope: Scope) -> Iterator[str]:
    """The names of the stages in a scope, in order; those of training and of validation."""
    for part in scope.parts:
        if isinstance(part, Stage):
            yield part.name
        elif isinstance(part, Scope):
            yield from stages_of(part)


EVENTS: tuple[str, ...] = tuple(dict.fromkeys(place.event for place in places()))
"""All event names, in the order in which they first appear."""

SCOPES: tuple[str, ...] = tuple(dict.fromkeys(place.inside[-1] for place in places()))
"""All scope names, outermost first."""

STAGES: tuple[str, ...] = tuple(dict.fromkeys(stages_of(FIT)))
"""All stage names, in their order."""

BRACKETS: tuple[str, ...] = tuple(f"around_{name}" for name in (*SCOPES, *STAGES))
"""The names of methods that return a context manager around a scope or a stage."""


def events() -> tuple[str, ...]:
    """All event names, in the order in which they first appear.

    >>> events()[:3], len(events())
    (('before_fit', 'before_epoch', 'before_train'), 23)
    """
    return EVENTS
