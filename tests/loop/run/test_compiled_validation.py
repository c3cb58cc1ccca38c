"""fit(compile=True) compiles the forward pass of validation, where that can be."""

from typing import Any

import pytest
from torch import Tensor, nn

from functional_sgd import schedule_free_sgd
from loop import fit
from loop.run.graph_cache import graphs_of
from tests.loop.run.test_compiled import classes, traced


class OtherInValidation(nn.Sequential):
    """What it does in validation depends on values."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y if self.training or bool(x.sum() > 1e9) else 2 * y


@traced
def test_validation_that_cannot_be_compiled_is_not_and_says_so() -> None:
    mine = classes(OtherInValidation(nn.Linear(6, 3)))
    with pytest.warns(UserWarning, match=r"validation runs without being compiled: .*data-depend"):
        found = fit(mine, mine.init(), 2, compile=True)
    assert found.history.rows[-1] == pytest.approx(fit(mine, mine.init(), 2).history.rows[-1])
    assert len(graphs_of(mine.model)) == 1


@traced
def test_what_the_optimizer_wants_to_be_evaluated_is() -> None:
    mine = classes(opt=schedule_free_sgd(lr=0.5))
    found, expected = fit(mine, mine.init(), 2, compile=True), fit(mine, mine.init(), 2)
    for row, wanted in zip(found.history.rows, expected.history.rows, strict=True):
        assert row == pytest.approx(wanted, abs=1e-5)
    assert len(graphs_of(mine.model)) == 2


class Noisy(nn.Linear):
    """Draws in validation too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, training=True))


@traced
def test_chance_in_validation_is_a_function_of_the_state() -> None:
    """In the run that makes the graph, which draws random numbers, as in the next."""
    mine = classes(Noisy(6, 3))
    start = mine.init()
    first, again = (fit(mine, start, 1, compile=True).history.rows for _ in range(2))
    assert first == again
