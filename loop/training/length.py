"""How long a run is: epochs, or steps."""

from dataclasses import dataclass
from typing import Any

from loop.run.passes import length
from loop.state import State


@dataclass(frozen=True)
class Length:
    """So many epochs, each a pass over the training data; or, if it has `steps`, so many training
    batches, in epochs of `steps_per_epoch`.
    """

    epochs: int
    steps: int | None = None
    steps_per_epoch: int = 0

    def __str__(self) -> str:
        """In words."""
        if self.steps is None:
            return f"{self.epochs} epochs"
        return f"{self.steps} steps in epochs of {self.steps_per_epoch}"

    @property
    def arguments(self) -> str:
        """What to pass to `fit` for it."""
        if self.steps is None:
            return f"epochs={self.epochs}"
        return f"steps={self.steps}, steps_per_epoch={self.steps_per_epoch}"

    @property
    def fields(self) -> dict[str, int | None]:
        """What a state says of it."""
        return dict(n_epoch=self.epochs, n_step=self.steps, steps_per_epoch=self.steps_per_epoch)


def length_of_run(state: State) -> Length:
    """How long the run is that a state is in."""
    return Length(state.n_epoch, state.n_step, state.steps_per_epoch)


def length_asked(
    train: Any, epochs: int | None, steps: int | None, steps_per_epoch: int | None
) -> Length:
    """The length that the arguments of `fit` ask for, on this training data.

    Raises ValueError unless there is one of epochs and steps, for numbers out of range, and for
    steps on data without a length if nothing says how many make an epoch.

    >>> length_asked([1, 2, 3], None, 7, None), length_asked([1, 2, 3], 2, None, 10)
    (Length(epochs=3, steps=7, steps_per_epoch=3), Length(epochs=2, steps=20, steps_per_epoch=10))
    """
    if (epochs is None) == (steps is None):
        found = "neither" if epochs is None else f"both: {epochs!r} and {steps!r}"
        raise ValueError(
            f"fit: expected epochs or steps, got {found}. Pass one, such as epochs=3 or steps=1000."
        )
    _check("epochs", epochs, 0)
    _check("steps", steps, 0)
    _check("steps_per_epoch", steps_per_epoch, 1)
    if steps is None:
        assert epochs is not None
        if steps_per_epoch is None:
            return Length(epochs)
        return Length(epochs, epochs * steps_per_epoch, steps_per_epoch)
    size = length(train) if steps_per_epoch is None else steps_per_epoch
    if size is None:
        raise ValueError(
            f"fit: data.train has no len(), so steps alone do not say when to validate. Pass "
            f"steps_per_epoch too: {max(steps, 1)} validates once, at the end."
        )
    size = max(size, 1)  # empty data is an error later, which says so
    return Length(-(-steps // size), steps, size)


def _check(name: str, value: object, least: int) -> None:
    if value is not None and (not isinstance(value, int) or value < least):
        raise ValueError(f"fit: {name} must be a whole number, {least} or more, got {value!r}.")
