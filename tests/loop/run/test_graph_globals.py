"""What models, losses, rules and callbacks look up in their modules: compiled batches follow it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_sgd as fs
from loop import Callback, State, fit
from loop.run.graph_cache import graphs_of
from tests.loop.run.compiled_runs import assert_close, classes, traced

pytestmark = pytest.mark.usefixtures("quiet")

SCALES = {"model": 1.0, "loss": 1.0, "rule": 1.0, "callback": 1.0}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    SCALES.update(dict.fromkeys(SCALES, 1.0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) * SCALES["model"]
        return out


def loss(pred: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(pred, y) * SCALES["loss"]


@fs.elementwise
def scale(grad: Tensor) -> dict[str, Tensor]:
    return dict(update=grad * SCALES["rule"])


class Scale(Callback):
    traceable = ("after_loss",)

    def after_loss(self, state: State) -> State:
        assert state.loss is not None
        return state.replace(loss=state.loss * SCALES["callback"])


@traced
@pytest.mark.parametrize("where", SCALES)
def test_another_value_is_another_graph(where: str) -> None:
    model = Net()
    opt = fs.chain(scale, fs.sgd_step, lr=0.1)
    mine = classes(model, loss=loss, opt=opt)
    start = mine.init()
    callbacks: list[Any] = [Scale()]
    for value in (1.0, 2.0):
        SCALES[where] = value
        for _ in range(2):
            found = fit(mine, start, 1, callbacks, compile=True)
        assert_close(found, fit(mine, start, 1, callbacks))
        torch.testing.assert_close(dict(found.params), dict(fit(mine, start, 1, callbacks).params))
    assert {key.fixed[1] for key in graphs_of(model)} == {"training", "validation"}
