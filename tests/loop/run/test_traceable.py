"""Handlers that are part of a compiled batch: what they may change and remember."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from functional_sgd import sgd
from loop import (
    Batches,
    Callback,
    DataLoaders,
    Learner,
    State,
    fit,
)
from tests.comparing import assert_close as close
from tests.loop.helpers import on
from tests.loop.run.compiled_runs import assert_close, classes, traced

pytestmark = pytest.mark.usefixtures("quiet")

CHANGES: dict[str, Callable[[State], State]] = {
    "after_pred": lambda state: state.replace(pred=state.pred * 2),
    "after_loss": lambda state: state.replace(loss=state.loss * 2),
    "before_backward": lambda state: state.replace(loss=state.loss * 2),
}


@traced
@pytest.mark.parametrize("event", CHANGES)
def test_a_change_that_comes_too_late_is_an_error(event: str) -> None:
    mine = classes()
    what = "pred" if event == "after_pred" else "loss"
    with pytest.raises(ValueError, match=f"has changed state.{what}.*traceable"):
        fit(mine, mine.init(), 1, [on(**{event: CHANGES[event]})], compile=True)


@traced
@pytest.mark.parametrize("event", CHANGES)
def test_a_traceable_change_is_part_of_the_graph(event: str) -> None:
    @dataclass(frozen=True)
    class Change(Callback):
        traceable: ClassVar[tuple[str, ...]] = (event,)

    setattr(Change, event, lambda self, state: CHANGES[event](state))
    mine = classes(callbacks=[Change()])
    found, expected = fit(mine, mine.init(), 1, compile=True), fit(mine, mine.init(), 1)
    assert_close(found, expected)
    assert found.history.rows[-1]["valid_loss"] == pytest.approx(
        expected.history.rows[-1]["valid_loss"], abs=1e-5
    )


@traced
@pytest.mark.parametrize("event", [*CHANGES, "after_backward"])
def test_what_a_traceable_handler_remembers_is_there_after_the_gradients(event: str) -> None:
    @dataclass(frozen=True)
    class Remembering(Callback):
        traceable: ClassVar[tuple[str, ...]] = (event,)

        def after_batch(self, state: State) -> State | None:
            if not state.training:
                return None
            seen.append((state.memory[self.name]["sum"], state.memory[self.name]["count"][0]))
            return state.forget(self.name)

    def remember(self: Callback, state: State) -> State:
        total = state.pred.detach().sum()
        return state.remember(self.name, {"sum": total, "count": (3, None)})

    setattr(Remembering, event, remember)
    seen: list[Any] = []
    mine = classes(callbacks=[Remembering()])
    fit(mine, mine.init(), 1)
    expected, seen = seen, []
    fit(mine, mine.init(), 1, compile=True)
    assert len(seen) == len(expected) > 1
    close(seen, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["cannot remember <object", "cannot forget anything"])
def test_a_traceable_handler_cannot_remember_what_no_graph_can_hand_out(what: str) -> None:
    @dataclass(frozen=True)
    class Remembering(Callback):
        traceable: ClassVar[tuple[str, ...]] = ("after_pred",)

        def before_fit(self, state: State) -> State:
            return state.remember(self.name, 1)

        def after_pred(self, state: State) -> State:
            if "forget" in what:
                return state.forget(self.name)
            return state.remember(self.name, [object()])

    mine = classes(callbacks=[Remembering()])
    with pytest.raises(ValueError, match=f"callback 'remembering' is traceable, so it {what}"):
        fit(mine, mine.init(), 1, compile=True)


def test_a_number_that_a_traceable_handler_has_remembered_keeps_its_digits() -> None:
    @dataclass(frozen=True)
    class Scaled(Callback):
        traceable: ClassVar[tuple[str, ...]] = ("after_loss",)

        def before_batch(self, state: State) -> State:
            return state.remember(self.name, {"factor": 1 / 3})

        def after_loss(self, state: State) -> State:
            assert state.loss is not None
            return state.replace(loss=state.loss * state.memory[self.name]["factor"])

    x, layer = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None], nn.Linear(1, 1).double()
    data = DataLoaders(Batches((x, 3 * x), 4))
    mine = Learner(layer, data, mse_loss, sgd(lr=0.1), callbacks=[Scaled()])
    found, expected = fit(mine, mine.init(), 3, compile=True), fit(mine, mine.init(), 3)
    close(found.params, expected.params, rtol=1e-14, atol=1e-15)
