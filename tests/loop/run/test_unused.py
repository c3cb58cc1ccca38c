"""A parameter that no batch of the first epoch gives a gradient is named, once; a frozen one is
not.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loop import CancelBackward, DataLoaders, Freeze, ShortEpoch, State, fit, lr_find
from tests.comparing import assert_same
from tests.loop.helpers import batches, learner, loaders, on


class Unlike(nn.Module):
    """Has layers that only some batches use, by the number of the batch."""

    def __init__(self, used: Callable[[int], bool] = lambda number: False, count: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.others = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(count)])
        self.used = used
        self.register_buffer("number", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            if self.used(int(self.number)):
                x = self.others[0](x)
            self.number += 1
        return x


def warned(model: nn.Module, epochs: int = 1, callbacks: Any = (), **options: Any) -> list[str]:
    """What fit has said; lr and data are those of the helpers."""
    mine = learner(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(mine, mine.init(), epochs, callbacks, **options)
    return [str(one.message) for one in caught]


def test_it_is_named_with_what_to_do() -> None:
    (said,) = warned(Unlike())
    assert said == (
        "Learner: the loss does not depend on 1 parameter in any of the 3 batches of the first "
        "epoch, so there was no gradient, and no training: 'others.0.weight'. Does forward leave a "
        "layer out, or detach it? Mend that; or, if it is meant so, freeze what is not trained, "
        "and this is not said: callbacks=[Freeze('others.0.weight')]."
    )


def test_many_are_counted() -> None:
    (said,) = warned(Unlike(count=11))
    assert "depend on 11 parameters in" in said
    assert "'others.7.weight' and 3 more. Does" in said


def test_it_is_said_once_a_run() -> None:
    assert len(warned(Unlike(), epochs=3)) == 1


def test_what_is_said_can_be_done() -> None:
    assert warned(Unlike(), callbacks=[Freeze("others.0.weight")]) == []
    model = Unlike()
    model.others.requires_grad_(False)
    assert warned(model) == []


@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_that_a_batch_has_used_is_none(number: int) -> None:
    assert warned(Unlike(lambda this: this == number)) == []


def test_one_that_only_the_second_epoch_uses_is_named() -> None:
    assert len(warned(Unlike(lambda number: number >= 3), epochs=2)) == 1


def test_one_that_only_the_first_epoch_uses_is_none() -> None:
    assert warned(Unlike(lambda number: number < 3), epochs=3) == []


def test_a_penalty_on_it_is_use() -> None:
    def penalty(state: State) -> State | None:
        if not state.training:
            return None
        return state.replace(loss=state.loss + state.params["others.0.weight"].square().sum())

    assert warned(Unlike(), callbacks=[on("penalty", after_loss=penalty)]) == []


def test_a_gradient_of_zeros_is_one() -> None:
    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate = nn.Linear(2, 2), nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + 0 * self.gate

    assert warned(Zero()) == []


def test_batches_without_a_gradient_say_nothing() -> None:
    def cancel(state: State) -> None:
        raise CancelBackward

    assert warned(Unlike(), callbacks=[on("c", before_backward=cancel)]) == []


def test_a_phase_that_is_cut_short_counts() -> None:
    (said,) = warned(Unlike(), callbacks=[ShortEpoch(batches=1)])
    assert "in the one batch of the first epoch" in said


def test_a_search_for_lr_that_ends_within_the_epoch_says_nothing() -> None:
    mine = learner(Unlike(), data=loaders(train=20))
    assert len(lr_find(mine, mine.init(), iterations=10, stop_factor=None).lrs) == 10


def test_a_compiled_batch_is_looked_at_too(fresh_compiler: None) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    (said,) = warned(Two(), compile=True)
    assert "2 parameters in any of the 3 batches" in said


def test_it_stays_as_it_is() -> None:
    mine = learner(Unlike(), data=DataLoaders(batches(3, seed=1)))
    start = mine.init()
    with pytest.warns(UserWarning, match="does not depend on 1 parameter"):
        end = fit(mine, start, 1)
    assert_same(end.params["others.0.weight"], start.params["others.0.weight"])
