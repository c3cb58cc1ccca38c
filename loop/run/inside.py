"""The handlers of callbacks that are part of a compiled batch: those that are `traceable`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import optree
from torch import Tensor

from functional_sgd.fingerprint import fingerprint
from loop.state import State

if TYPE_CHECKING:
    from loop.run.machine import Run

INSIDE = ("after_pred", "after_loss", "before_backward")
"""The events that happen while the graph runs. Handlers that are traceable are part of it."""

BEFORE_UPDATE = ("after_backward", "before_step")
"""If every handler of these is traceable too, the graph can go on to the update; else it ends
before the first handler that is not.
"""

_KEPT = (Tensor, int, float, str)
"""What handlers inside may remember: a graph hands it out."""


class Handler(NamedTuple):
    """What a callback does at an event."""

    name: str  # of the callback
    method: Callable[[State], Any]


class Inside:
    """Calls the handlers that are part of the graph of a batch, where their events happen."""

    def __init__(self, handlers: Mapping[str, Sequence[Handler]], goes_on: bool) -> None:
        self.handlers = handlers
        self.goes_on = goes_on  # whether the graph has the update in it
        self.names = {one.name for taken in handlers.values() for one in taken}
        # For the key of a graph, which is of these handlers alone.
        listed = []
        for event, taken in handlers.items():
            for one in taken:
                reads = fingerprint(getattr(one.method, "__func__", one.method))
                listed.append((event, *one, reads))
        self.listed = tuple(listed)

    def call(self, event: str, state: State) -> State:
        """Pass the state through the handlers of an event."""
        for name, method in self.handlers.get(event, ()):
            state = state.replace(event=event)
            result = method(state)
            if result is not None:
                _check_remembered(name, event, state.memory, result.memory)
                state = result
        return state


NOBODY = Inside({}, False)


def inside_of(run: "Run", updates: bool) -> Inside:
    """The handlers of a run that its graphs call. `updates` says whether they can go on to the
    update if no handler is in the way.
    """
    traceable = {}
    for event in (*INSIDE, *BEFORE_UPDATE):
        every = [Handler(*one) for one in run.handlers[event]]
        traceable[event] = [one for one in every if _is_traceable(event, one.method)]
    # A bracket around one of these stages would open when the graph has long been there.
    places = (*BEFORE_UPDATE, "around_gradients", "around_update")
    free = all(len(traceable.get(place, ())) == len(run.handlers_of(place)) for place in places)
    if updates and free:
        return Inside(traceable, True)
    # Nothing of what comes after a handler that is called.
    taken: dict[str, Sequence[Handler]] = {event: traceable[event] for event in INSIDE}
    known = traceable["after_backward"]
    every = [Handler(*one) for one in run.handlers["after_backward"]]
    taken["after_backward"] = [*takewhile(known.__contains__, every)]
    return Inside(taken, False)


def take_over(run: "Run", inside: Inside) -> None:
    """Have the run call these handlers no more, but in validation, where the graph ends with the
    prediction.
    """
    for event, taken in inside.handlers.items():
        left = []
        for one in run.handlers[event]:
            name, method = one
            left.append((name, partial(_in_validation, method)) if one in taken else one)
        run.handlers[event] = tuple(left)


def _is_traceable(event: str, method: Any) -> bool:
    return event in getattr(getattr(method, "__self__", None), "traceable", ())


def _in_validation(method: Callable[[State], Any], state: State) -> Any:
    return None if state.training else method(state)


def _check_remembered(
    name: str, event: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> None:
    """Raise ValueError if a handler leaves something that cannot come out of a graph."""
    if before is after:
        return
    new: Any = [own for key, own in after.items() if own is not before.get(key)]
    odd = [leaf for leaf in optree.tree_leaves(new) if not isinstance(leaf, _KEPT)]
    if odd or before.keys() - after.keys():
        did = f"remember {odd[0]!r}" if odd else "forget anything"
        raise ValueError(
            f"callback {name!r} is traceable, so it cannot {did} in {event}, only remember "
            f"tensors and numbers, in tuples, lists and dicts. Do it in another event."
        )
