"""What a callback may be, what it may return, and in which order callbacks are called."""

from dataclasses import FrozenInstanceError
from graphlib import CycleError, TopologicalSorter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loop.callbacks
from loop import (
    Callback,
    CancelBatch,
    GradientClip,
    ModelResetter,
    Recorder,
    State,
    TerminateOnNaN,
    fit,
    trace,
)
from loop.callback import Order, in_order, name_of, snake_case
from tests.comparing import assert_same
from tests.loop.helpers import (
    EVENTS,
    SCOPES,
    STAGES,
    assert_same_run,
    everywhere,
    learned,
    learner,
    on,
)

LEARNER = learner()
START = LEARNER.init()


def test_none_means_no_change() -> None:
    assert_same_run(
        fit(LEARNER, START, 1, [everywhere(lambda event, state: None)]), fit(LEARNER, START, 1)
    )


@pytest.mark.parametrize("event", ["before_fit", "after_loss", "after_step", "after_validate"])
@pytest.mark.parametrize("result", [True, False, {}, State])
def test_anything_but_a_state_is_an_error(event: str, result: Any) -> None:
    with pytest.raises(TypeError, match=f"'spy' returned {type(result).__name__} from {event}"):
        fit(LEARNER, START, 1, [on(**{event: lambda state: result})])


def test_returning_a_signal_instead_of_raising_it_is_an_error() -> None:
    with pytest.raises(TypeError, match="CancelBatch from before_batch"):
        fit(LEARNER, START, 1, [on(before_batch=CancelBatch)])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("before_bacth", "before_batch"),
        ("after_evrything", "after_"),
        ("around_los", "around_loss"),
    ],
)
def test_a_handler_of_no_event_is_an_error_when_the_class_is_made(name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"callback Slip: '{name}' is no event.*{meant}"):
        type("Slip", (Callback,), {name: lambda self, state: None})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("begin_fit", "before_fit"),
        ("on_train_epoch_end", "after_epoch"),
        ("on_validation_epoch_end", "after_validate"),
        ("on_step_end", "after_batch"),
    ],
)
def test_an_event_of_another_library_is_an_error_that_names_ours(name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"'{name}' is no event, .*is called {meant} here"):
        type("Theirs", (Callback,), {name: lambda self, trainer: None})


def test_a_handler_without_the_state_is_an_error_when_the_class_is_made() -> None:
    with pytest.raises(TypeError, match=r"Write def after_batch\(self, state\)"):
        type("Stateless", (Callback,), {"after_batch": lambda self: None})


def test_a_callback_class_may_have_handlers_for_all_events_and_brackets() -> None:
    names = (*EVENTS, *(f"around_{name}" for name in (*SCOPES, *STAGES)))
    assert (
        type("All", (Callback,), {name: lambda self, state: None for name in names})().name == "all"
    )


def test_other_methods_of_a_callback_are_its_own_affair() -> None:
    assert type("Own", (Callback,), {"beforehand": 1, "after": 2, "_before_all": 3})().name == "own"


def test_any_object_with_one_handler_is_a_callback() -> None:
    seen = []
    fit(
        LEARNER,
        START,
        2,
        [SimpleNamespace(name="counter", after_epoch=lambda state: seen.append(state.epoch))],
    )
    assert seen == [0, 1]


def test_an_object_without_a_name_has_that_of_its_class() -> None:
    assert name_of(SimpleNamespace()) == "simple_namespace"


def test_names_in_snake_case() -> None:
    names = ["TerminateOnNaN", "GradientClip", "A", "CSVLogger", "MyRNNRegularizer"]
    found = [snake_case(name) for name in names]
    assert found == ["terminate_on_nan", "gradient_clip", "a", "csv_logger", "my_rnn_regularizer"]


def test_a_class_in_place_of_an_object_is_an_error() -> None:
    with pytest.raises(TypeError, match="got the class Recorder. Call it"):
        fit(LEARNER, START, 1, [Recorder])


@pytest.mark.parametrize(
    "thing", [print, "recorder", None, SimpleNamespace(before_everything=print)]
)
def test_an_object_without_a_handler_is_an_error(thing: Any) -> None:
    with pytest.raises(TypeError, match="has no handler"):
        fit(LEARNER, START, 1, [thing])


def test_two_of_one_name_are_an_error() -> None:
    with pytest.raises(ValueError, match="two callbacks are called 'gradient_clip'"):
        fit(LEARNER, START, 1, [GradientClip(1.0), GradientClip(2.0)])


def test_a_name_may_not_be_taken_by_the_learner_and_by_the_run() -> None:
    with pytest.raises(ValueError, match="two callbacks are called 'spy'"):
        fit(learner(callbacks=[on(after_fit=print)]), START, 1, [on(after_fit=print)])


def test_two_of_one_class_with_two_names_keep_two_memories() -> None:
    class Count(Callback):
        def after_batch(self, state: State) -> State:
            return state.remember(self.name, state.memory.get(self.name, 0) + 1)

    class Second(Count):
        name = "other"

    end = fit(LEARNER, START, 1, [Count(), Second()])
    assert (end.memory["count"], end.memory["other"]) == (5, 5)


def test_callbacks_of_the_learner_and_of_the_run_both_run() -> None:
    seen: list[str] = []
    mine = learner(callbacks=[on("a", after_fit=lambda state: seen.append("a"))])
    fit(mine, START, 1, [on("b", after_fit=lambda state: seen.append("b"))])
    assert seen == ["a", "b"]


def test_the_callbacks_of_a_run_are_gone_after_it() -> None:
    seen: list[int] = []
    fit(LEARNER, START, 1, [on(after_fit=lambda state: seen.append(1))])
    fit(LEARNER, START, 1)
    assert seen == [1]


def test_two_tweaks_work_together_without_knowing_each_other() -> None:
    """Clipping and a change of lr, each a line in the list."""
    halve = on("halve", before_batch=lambda state: state.replace(hyper={**state.hyper, "lr": 0.05}))
    both = fit(LEARNER, START, 1, [halve, GradientClip(0.1)])
    assert_same(both.params, fit(LEARNER, START, 1, [GradientClip(0.1)], lr=0.05).params)


def test_what_one_callback_returns_the_next_one_sees() -> None:
    seen: list[Any] = []
    first = on("first", after_pred=lambda state: state.remember("first", "was here"))
    second = on("second", after_pred=lambda state: seen.append(state.memory["first"]))
    fit(LEARNER, START, 1, [first, second])
    assert seen == ["was here"] * 5


def test_a_state_that_is_made_but_not_returned_does_nothing() -> None:
    def forget(state: State) -> None:
        state = state.replace(loss=state.loss * 100)

    assert_same(
        learned(fit(LEARNER, START, 1, [on(after_loss=forget)])), learned(fit(LEARNER, START, 1))
    )


def test_a_state_cannot_be_written_to() -> None:
    with pytest.raises(FrozenInstanceError):
        START.epoch = 3  # type: ignore[misc]


def test_who_writes_to_a_state_is_told_what_to_return() -> None:
    def write(state: State) -> None:
        state.loss = state.loss  # type: ignore[misc]

    with pytest.raises(FrozenInstanceError) as caught:
        fit(LEARNER, START, 1, [on(after_loss=write)])
    assert "Return state.replace(name=value)" in "".join(caught.value.__notes__)


def test_replacing_an_unknown_field_is_an_error() -> None:
    with pytest.raises(TypeError, match="State has no field 'los'. .*loss"):
        START.replace(los=1)


def names_in_order(*callbacks: Any) -> list[str]:
    return [callback.name for callback in in_order(callbacks)]


def test_lower_order_goes_first() -> None:
    assert names_in_order(
        on("c", 7, after_fit=print), on("a", -1, after_fit=print), on("b", 0, after_fit=print)
    ) == [*"abc"]


def test_ties_go_by_the_list() -> None:
    assert names_in_order(*(on(name, after_fit=print) for name in "dbca")) == [*"dbca"]


def test_wishes_by_name() -> None:
    first, last = on("a", after_fit=print), on("z", after_fit=print)
    first.run_after = "z"
    assert names_in_order(first, last) == ["z", "a"]


def test_wishes_by_class_hold_for_subclasses() -> None:
    class Mine(Recorder):
        pass

    assert names_in_order(Mine(), TerminateOnNaN()) == ["terminate_on_nan", "mine"]


def test_a_wish_is_stronger_than_an_order() -> None:
    late = on("late", 100, after_fit=print)
    late.run_before = ("early",)
    assert names_in_order(on("early", -100, after_fit=print), late) == ["late", "early"]


def test_a_wish_about_somebody_absent_is_no_matter() -> None:
    alone = on("alone", after_fit=print)
    alone.run_before, alone.run_after = (ModelResetter, "nobody"), ("nobody else",)
    assert names_in_order(alone) == ["alone"]


def test_the_wishes_of_the_box() -> None:
    assert names_in_order(Recorder(), TerminateOnNaN()) == ["terminate_on_nan", "recorder"]


def test_a_circle_is_shown() -> None:
    a, b, c, outside = (on(name, after_fit=print) for name in ("a", "b", "c", "outside"))
    a.run_after, b.run_after, c.run_after, outside.run_after = "b", "c", "a", "a"
    with pytest.raises(ValueError, match="cannot be ordered: (.*)\\.") as caught:
        fit(LEARNER, START, 1, [outside, a, b, c])
    circle = str(caught.value).split(": ")[1].split(".")[0].split(" runs after ")
    assert circle[0] == circle[-1]
    assert set(circle) == {"a", "b", "c"}
    assert {"ab", "bc", "ca"} == {
        one + other for one, other in zip(circle, circle[1:], strict=False)
    }


def test_the_order_is_the_same_at_every_event() -> None:
    """At after_x too: only brackets are closed in reverse."""
    seen: list[tuple[str, str]] = []
    spies = [
        everywhere(lambda event, state, name=name: seen.append((event, name)), name, order)
        for name, order in [("b", 2), ("a", 1), ("c", 3)]
    ]
    fit(LEARNER, START, 1, spies)
    assert {
        tuple(name for _, name in seen[start : start + 3]) for start in range(0, len(seen), 3)
    } == {("a", "b", "c")}
    assert all(
        len({event for event, _ in seen[start : start + 3]}) == 1
        for start in range(0, len(seen), 3)
    )


def test_a_signal_keeps_later_callbacks_from_the_event() -> None:
    seen: list[str] = []

    def cancel(state: State) -> None:
        raise CancelBatch

    late = on("late", 1, after_pred=lambda state: seen.append("late"))
    fit(LEARNER, START, 1, [on("early", after_pred=cancel), late])
    assert seen == []


def test_handlers_are_looked_up_when_the_run_starts() -> None:
    spy = on(after_epoch=lambda state: None)
    running = trace(LEARNER, START, 1, [spy])
    del spy.after_epoch
    assert [event for event, _ in running][-1] == "after_fit"


@st.composite
def wishes(draw: Any) -> list[SimpleNamespace]:
    """Some callbacks with orders and wishes about each other."""
    count = draw(st.integers(1, 6))
    everyone = [f"c{index}" for index in range(count)]
    return [
        SimpleNamespace(
            name=name,
            order=draw(st.integers(-1, 1)),
            run_before=tuple(draw(st.lists(st.sampled_from(everyone), max_size=1))),
            run_after=tuple(draw(st.lists(st.sampled_from(everyone), max_size=1))),
            after_fit=print,
        )
        for name in everyone
    ]


@given(wishes())
@settings(max_examples=200, derandomize=True, database=None, deadline=None)
def test_wishes_are_followed_or_contradict_each_other(callbacks: list[SimpleNamespace]) -> None:
    earlier: dict[str, set[str]] = {
        callback.name: set(callback.run_after) for callback in callbacks
    }
    for callback in callbacks:
        for other in callback.run_before:
            earlier[other].add(callback.name)
    sorter = TopologicalSorter(earlier)
    try:
        sorter.prepare()
    except CycleError:
        with pytest.raises(ValueError, match="cannot be ordered"):
            in_order(callbacks)
        return
    expected: list[str] = []
    ready: set[str] = set()
    rank = {callback.name: (callback.order, index) for index, callback in enumerate(callbacks)}
    while (
        sorter.is_active()
    ):  # among those whose wishes are met, the lowest (order, place in the list)
        ready |= set(sorter.get_ready())
        chosen = min(ready, key=lambda name: rank[name])
        ready.remove(chosen)
        sorter.done(chosen)
        expected.append(chosen)
    assert [callback.name for callback in in_order(callbacks)] == expected


SHIPPED = [
    value
    for value in vars(loop.callbacks).values()
    if isinstance(value, type) and issubclass(value, Callback)
]


@pytest.mark.parametrize("callback", SHIPPED)
def test_the_order_of_every_shipped_callback_has_a_name(callback: type[Callback]) -> None:
    """All of them stand in one list, which says why each is where it is."""
    assert callback.order in {*Order}
