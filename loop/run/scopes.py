"""What the machine does at the borders of each scope, besides its events: a row for each."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from loop.run import entering
from loop.run.passes import Feed
from loop.state import State

Change: TypeAlias = Callable[[State], State]


def unchanged(state: State) -> State:
    """The state."""
    return state


def always(state: State) -> bool:
    """True."""
    return True


def _broken_batch(state: State) -> State:
    """A training batch that the model has seen counts, even if a signal of an outer scope ends it.

    Else the next batch would have the same number, and would draw the same dropout again.
    """
    return state if state.pred is None else entering.leave_batch(state)


@dataclass(frozen=True)
class Border:
    """What happens on entering a scope and on leaving it."""

    when: Callable[[State], bool] = always  # whether the scope is run at all
    each: Callable[[State, int, Feed], Iterator[Change]] | None = None  # on entering, for each time
    enter: Change = unchanged  # on entering, if it is run once
    over: Change = unchanged  # before after_x: its parts are done, or its own signal has ended it
    broken: Change = unchanged  # instead of that, if a signal of an outer scope has ended it
    left: Change = unchanged  # in the end, whatever way it was left


BORDERS: Mapping[str, Border] = {
    "fit": Border(),
    "epoch": Border(each=entering.epochs, over=entering.leave_epoch),
    "train": Border(enter=entering.enter_train, left=entering.left_train),
    "validate": Border(
        when=entering.has_validation_data,
        enter=entering.enter_validate,
        left=entering.left_validate,
    ),
    "batch": Border(
        each=entering.batches,
        over=entering.leave_batch,
        broken=_broken_batch,
        left=entering.left_batch,
    ),
    "backward": Border(),
    "step": Border(when=entering.has_gradients),
}
