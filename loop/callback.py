"""What a callback is, and the one order in which callbacks are called."""

import functools
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from types import FunctionType
from typing import Any, ClassVar, TypeAlias, TypeVar

from functional_sgd.errors import did_you_mean
from loop.run.events import BRACKETS, EVENTS

Wish: TypeAlias = type | str
"""Another callback, by class or by name."""

AnyCallback = TypeVar("AnyCallback")
"""A Callback, or any other object with handlers: nothing can be said of its type."""


class Order(IntEnum):
    """Where a callback comes at every event, by what it is there for; lower is earlier.

    Brackets close in reverse order, so who comes first closes last. Wishes (`run_before`,
    `run_after`) are stronger.
    """

    FRAME = -100  # keeps, times and prints before others look, and after they have closed
    PROFILE = -99  # inside of the clocks, which must not count as the model's time
    MEASURE = -20  # looks at what the layers have put out, before anybody changes it
    PREPARE = -1  # has what others rely on: the frozen names, an output without its extras
    CHANGE = 0  # changes the batch, the prediction or the loss; callbacks of your own
    SHARE = 5  # makes the loss that of all ranks, when nobody changes it any more
    ACCUMULATE = 6  # sums gradients up, so that those after it see full ones only
    UNSCALE = 10  # divides by the loss scale, and measures the gradients
    CLIP = 11  # shortens gradients that are unscaled
    AVERAGE = 40  # averages what the step has made
    RECORD = 50  # writes history, when the loss is final
    REPORT = 60  # shows and sends what is recorded; schedules
    KEEP = 61  # keeps the best of what is recorded
    ADAPT = 62  # lowers lr by it, draws it: before a signal would hide the last epoch
    STOP = 63  # ends the run by it
    STEP_LR = 70  # sets the next lr when everyone has seen the batch with the present one
    LAST = 100  # ends a phase, or collects, when everyone has seen the batch
    SEARCH = 1000  # has the last word on lr


COMMITTED = "committed"
"""The method that sees every state which a run can be resumed from."""

OVERWRITTEN = "overwritten"
"""The method that is called when a step begins to overwrite that state."""


class Callback:
    """Frozen configuration with methods named after events: `after_loss(self, state) -> State |
    None`.

    A handler returns the state it wants next, or None for no change, or raises a signal. What it
    must remember goes into the state: `state.remember(self.name, value)`. A method
    `around_batch(self, state)` (or any other scope) returns a context manager that is open during
    that scope, whatever way out is taken; what it yields is `state.resources[self.name]` meanwhile.
    `around_predict` (or another stage) does the same for that piece of work. A method
    `committed(self, state)` sees the state wherever the run can be resumed, and changes nothing.

    The model's tensors are those of the state, in place only during the forward and the backward
    pass: what a handler writes into `state.learner.model`, as its `reset()` may, is not seen by the
    run. Return `state.replace(buffers=...)`, as ModelResetter does.

    What a callback keeps of a state beyond the event, in memory of its own or in the state's, goes
    through `state.keep()` or `state.kept(state.params)`: in a run that donates, the next step
    overwrites params and opt_state.

    A callback with `reports = True` shows or writes down what happens and has no say in what is
    learned: forks of a run (lr_find, ablate) leave it out, since screens and files belong to the
    run that counts.

    `traceable` names events whose handlers work on tensors without looking at their values: in
    `fit(compile=True)` they become part of the graph (after_pred, after_loss, before_backward,
    after_backward, before_step), and what they remember, tensors and numbers, is there from
    after_backward on. `eager = True` says that a callback cannot be used there at all.

    A callback with `collects = True` remembers, under its name, a tuple with something of every
    batch of a validation: tensors of all samples, which `parallel` joins over the ranks.

    A method `among(self, callbacks)` returns those that take part in a run with this one, and a
    method `elsewhere(self)` what takes this one's place on ranks that do not report (see
    `parallel`): none, if it `reports`.

    `order` (lower is earlier; see Order), `run_before` and `run_after` (classes or names) decide
    who is called first. Any object with such methods will do; this class adds the name, and the
    check that every handler is named after an event.

    >>> class Halve(Callback):
    ...     def before_step(self, state):
    ...         return state.replace(grads={name: grad / 2 for name, grad in state.grads.items()})
    >>> Halve().name
    'halve'
    """

    order: ClassVar[int] = Order.CHANGE
    reports: ClassVar[bool] = False
    traceable: ClassVar[tuple[str, ...]] = ()
    eager: ClassVar[bool] = False
    collects: ClassVar[bool] = False
    run_before: ClassVar[tuple[Wish, ...]] = ()
    run_after: ClassVar[tuple[Wish, ...]] = ()

    @property
    def name(self) -> str:
        """The key of this callback's memory; give one of two callbacks of a class another."""
        return snake_case(type(self).__name__)

    def elsewhere(self) -> "Callback | None":
        """What takes its place on ranks that do not report; None for nothing."""
        return None if self.reports else self

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        places = {*EVENTS, *BRACKETS}
        for name, value in vars(cls).items():
            if name in _ELSEWHERE:
                raise TypeError(
                    f"callback {cls.__name__}: {name!r} is no event, so nothing would call it. It "
                    f"is called {_ELSEWHERE[name]} here, and takes the state."
                )
            if name.startswith(("before_", "after_", "around_")) and name not in places:
                raise TypeError(
                    f"callback {cls.__name__}: {name!r} is no event. {did_you_mean(name, places)}"
                )
            # Plain functions only: the signature of a partial or a staticmethod says nothing of
            # `self`.
            if name in places and isinstance(value, FunctionType) and not _takes_state(value):
                raise TypeError(
                    f"callback {cls.__name__}: {name} is called with the state. Write "
                    f"def {name}(self, state)."
                )


_ELSEWHERE = {
    **dict.fromkeys(
        ("begin_fit", "on_fit_start", "on_train_start", "on_train_begin"), "before_fit"
    ),
    **dict.fromkeys(("on_fit_end", "on_train_end"), "after_fit"),
    **dict.fromkeys(
        ("begin_epoch", "on_epoch_begin", "on_epoch_start", "on_train_epoch_start"), "before_epoch"
    ),
    **dict.fromkeys(("on_epoch_end", "on_train_epoch_end"), "after_epoch"),
    "begin_train": "before_train",
    **dict.fromkeys(
        ("begin_validate", "on_validation_start", "on_validation_epoch_start"), "before_validate"
    ),
    **dict.fromkeys(("on_validation_end", "on_validation_epoch_end"), "after_validate"),
    **dict.fromkeys(
        ("begin_batch", "on_batch_begin", "on_train_batch_start", "on_step_begin"), "before_batch"
    ),
    **dict.fromkeys(("on_batch_end", "on_train_batch_end", "on_step_end"), "after_batch"),
    "on_loss_begin": "after_pred",
    **dict.fromkeys(("on_backward_begin", "on_before_backward"), "before_backward"),
    **dict.fromkeys(("on_backward_end", "on_after_backward"), "after_backward"),
    **dict.fromkeys(("on_before_optimizer_step", "on_pre_optimizer_step"), "before_step"),
    "on_optimizer_step": "after_step",
}
"""Events of fastai 1, Keras, Lightning and Hugging Face, and what they are called here."""


def _takes_state(handler: FunctionType) -> bool:
    """Whether it can be called with the callback and a state."""
    try:
        inspect.signature(handler).bind(None, None)
    except TypeError:
        return False
    return True


@functools.cache
def snake_case(name: str) -> str:
    """A class name as a variable name: "TerminateOnNaN" -> "terminate_on_nan".

    >>> snake_case("TerminateOnNaN"), snake_case("ParamScheduler")
    ('terminate_on_nan', 'param_scheduler')
    """
    # NaN is one word: the last N would begin another (terminate_on_na_n).
    words = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name.replace("NaN", "Nan"))
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", words).lower()


def name_of(callback: object) -> str:
    """The name of a callback, of whatever class."""
    return str(getattr(callback, "name", snake_case(type(callback).__name__)))


def in_order(callbacks: Sequence[AnyCallback]) -> list[AnyCallback]:
    """The callbacks in the order in which every event calls them.

    Wishes (`run_before`, `run_after`) hold; among those who may go next, the lowest `order` goes
    first, and of equals the first listed. Raises ValueError if wishes contradict each other
    (showing the circle) or two have one name, and TypeError for an object without any handler.

    >>> class A(Callback): run_after = ("b",)
    >>> class B(Callback): pass
    >>> [callback.name for callback in in_order([A(), B()])]
    ['b', 'a']
    """
    _check(callbacks)
    waiting = {index: set[int]() for index in range(len(callbacks))}
    for index, callback in enumerate(callbacks):
        for other in _matching(getattr(callback, "run_after", ()), callbacks):
            waiting[index].add(other)
        for other in _matching(getattr(callback, "run_before", ()), callbacks):
            waiting[other].add(index)
    ordered: list[int] = []
    while waiting:
        ready = [index for index, others in waiting.items() if not others & waiting.keys()]
        if not ready:
            raise ValueError(
                f"callbacks cannot be ordered: {_circle(waiting, callbacks)}. Drop one of these "
                f"wishes."
            )
        chosen = min(ready, key=lambda index: (getattr(callbacks[index], "order", 0), index))
        del waiting[chosen]
        ordered.append(chosen)
    return [callbacks[index] for index in ordered]


def taking_part(callbacks: Sequence[object], compile: bool = False) -> list[object]:
    """The callbacks of a run, compiled or not, as far as each has the others with it.

    >>> class Alone(Callback):
    ...     def among(self, callbacks, compile): return [self]
    >>> class Other(Callback): pass
    >>> [callback.name for callback in taking_part([Other(), Alone()])]
    ['alone']
    """
    chosen = list(callbacks)
    for callback in callbacks:
        choose = getattr(callback, "among", None)
        if choose is not None:
            chosen = list(choose(chosen, compile))
    return chosen


def without_reports(callbacks: Iterable[AnyCallback]) -> list[AnyCallback]:
    """The callbacks that have a say in the training.

    >>> class Say(Callback): pass
    >>> class Show(Callback): reports = True
    >>> [callback.name for callback in without_reports([Say(), Show()])]
    ['say']
    """
    return [callback for callback in callbacks if not getattr(callback, "reports", False)]


def _check(callbacks: Sequence[object]) -> None:
    seen: dict[str, object] = {}
    for callback in callbacks:
        if isinstance(callback, type):
            raise TypeError(
                f"callbacks must be objects, got the class {callback.__name__}. Call it."
            )
        if not isinstance(callback, Callback) and not _has_handler(callback):
            raise TypeError(
                f"callback {callback!r} has no handler: no method is named after an event."
            )
        name = name_of(callback)
        if name in seen:
            raise ValueError(
                f"two callbacks are called {name!r}: {seen[name]!r} and {callback!r}. "
                f"Give one another name (a `name` attribute): names are the keys of state.memory."
            )
        seen[name] = callback


def _has_handler(callback: object) -> bool:
    """Whether anything would call it."""
    places = (*EVENTS, *BRACKETS, COMMITTED, OVERWRITTEN)
    return any(callable(getattr(callback, place, None)) for place in places)


def _matching(wishes: Wish | Iterable[Wish], callbacks: Sequence[object]) -> Iterator[int]:
    """The places of the callbacks that are meant by any of the wishes."""
    wishes = (wishes,) if isinstance(wishes, (type, str)) else tuple(wishes)
    for index, callback in enumerate(callbacks):
        if any(_is_meant(callback, wish) for wish in wishes):
            yield index


def _is_meant(callback: object, wish: Wish) -> bool:
    """Whether this is the name, or a class, of the callback."""
    if isinstance(wish, str):
        return name_of(callback) == wish
    return isinstance(callback, wish)


def _circle(waiting: dict[int, set[int]], callbacks: Sequence[object]) -> str:
    path = [next(iter(waiting))]
    # Nobody is ready, so each waits for another that waits: the walk comes back to where it was.
    while len(set(path)) == len(path):
        path.append(min(waiting[path[-1]] & waiting.keys()))
    circle = path[path.index(path[-1]) :]
    return " runs after ".join(name_of(callbacks[index]) for index in circle)
