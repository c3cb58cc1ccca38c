"""The handlers of callbacks that are part of a compiled batch: those that are `traceable`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import optree
from torch import Tensor

from functional_sgd.fingerprint import fingerprint
from functional_sgd.tree import Tree
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


Method: TypeAlias = Callable[[State], Any]
"""What a callback may return is checked by the machine."""


class Handler(NamedTuple):
    """What a callback does at an event."""

    name: str  # of the callback
    method: Method


class Inside:
    """Calls the handlers that are part of the graph of a batch, where their events happen."""

    def __init__(self, handlers: Mapping[str, Sequence[Handler]], goes_on: bool) -> None:
        self.handlers = handlers
        self.goes_on = goes_on  # whether the graph has the update in it
        names, listed = set(), []
        for event, taken in handlers.items():
            for one in taken:
                names.add(one.name)
                reads = fingerprint(getattr(one.method, "__func__", one.method))
                listed.append((event, *one, reads))
        self.names = names
        # For the key of a graph, which is of these handlers alone.
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
    taken: dict[str, Sequence[Handler]] = {}
    for event in INSIDE:
        chosen = []
        for name, method in run.handlers[event]:
            if _is_traceable(event, method):
                chosen.append(Handler(name, method))
        taken[event] = chosen
    goes_on = updates
    for event in BEFORE_UPDATE:
        taken[event] = _first_traceable(event, run.handlers[event])
        if len(taken[event]) < len(run.handlers[event]):
            goes_on = False
    # A bracket around one of these stages would open when the graph has long been there.
    if run.handlers_of("around_gradients") or run.handlers_of("around_update"):
        goes_on = False
    if not goes_on:
        del taken["before_step"]  # the graph ends before it
    return Inside(taken, goes_on)


def _first_traceable(event: str, handlers: Sequence[tuple[str, Method]]) -> list[Handler]:
    """The handlers before the first that is not traceable: what comes after that one must see what
    it has made of the state.
    """
    first = []
    for name, method in handlers:
        if not _is_traceable(event, method):
            break
        first.append(Handler(name, method))
    return first


def take_over(run: "Run", inside: Inside) -> None:
    """Have the run call these handlers no more, but in validation, where the graph ends with the
    prediction.
    """
    for event, taken in inside.handlers.items():
        left = []
        for name, method in run.handlers[event]:
            if Handler(name, method) in taken:
                method = partial(_in_validation, method)
            left.append((name, method))
        run.handlers[event] = tuple(left)


def _is_traceable(event: str, method: Method) -> bool:
    callback = getattr(method, "__self__", None)
    return event in getattr(callback, "traceable", ())


def _in_validation(method: Method, state: State) -> object:
    return None if state.training else method(state)


def _check_remembered(
    name: str, event: str, before: Mapping[str, Tree], after: Mapping[str, Tree]
) -> None:
    """Raise ValueError if a handler leaves something that cannot come out of a graph."""
    if before is after:
        return
    odd: list[object] = []
    for key, value in after.items():
        if value is not before.get(key):
            odd += [leaf for leaf in optree.tree_leaves(value) if not isinstance(leaf, _KEPT)]
    if odd or before.keys() - after.keys():
        did = f"remember {odd[0]!r}" if odd else "forget anything"
        raise ValueError(
            f"callback {name!r} is traceable, so it cannot {did} in {event}, only remember "
            f"tensors and numbers, in tuples, lists and dicts. Do it in another event."
        )
