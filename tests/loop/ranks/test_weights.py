"""Everything that weighs batches weighs them alike."""

import pytest
from torch import Tensor

from loop import GradientAccumulation, count_targets, fit, parallel
from loop.callbacks.accumulation import Weight
from tests.loop.ranks.learners import learner, numbers
from tests.ranks import Ranks

UNEQUAL = [("targets", "samples"), ("samples", "targets"), ("targets", count_targets(0))]


def refused(weight: str, accumulated: str | Weight) -> list[str]:
    """What the ranks are told when they are made, and when they are fitted."""
    window = GradientAccumulation(batches=3, weight=accumulated)
    said = []
    try:
        parallel(learner(callbacks=[window]), weight=weight)
    except ValueError as error:
        said.append(str(error))
    mine = parallel(learner(), weight=weight)
    try:
        fit(mine, mine.init(), 1, [window])
    except ValueError as error:
        said.append(str(error))
    return said


@pytest.mark.parametrize(("weight", "accumulated"), UNEQUAL)
def test_gradients_are_accumulated_by_the_weight_of_parallel_or_not_at_all(
    ranks: Ranks, weight: str, accumulated: str | Weight
) -> None:
    for said in ranks(refused, weight, accumulated):
        assert len(said) == 2
        for text in said:
            assert text.startswith(f"parallel: batches count by weight={weight!r}, and by weight=")
            assert "expected the same in both" in text


def by_targets(weight: str | Weight) -> list[Tensor]:
    mine = parallel(learner(), weight="targets")
    return numbers(fit(mine, mine.init(), 1, [GradientAccumulation(batches=3, weight=weight)]))


def test_weights_that_count_the_same_are_the_same(ranks: Ranks) -> None:
    assert len(ranks(by_targets, count_targets())) == 2
