"""The arithmetic of MixUp and CutMix, and the chance in it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loop import State
from loop.callbacks.mixing import (
    beta,
    box_area,
    cutmix_batch,
    cutmix_box,
    generator_of,
    mixup_batch,
)
from tests.comparing import Untouched


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 2.0, 30.0])
def test_moments_of_beta(alpha: float) -> None:
    draws = beta(alpha, 40_000, torch.Generator().manual_seed(0))
    variance = 1 / (4 * (2 * alpha + 1))
    assert draws.dtype == torch.float64
    assert float(draws.mean()) == pytest.approx(0.5, abs=4 * (variance / 40_000) ** 0.5)
    assert float(draws.var()) == pytest.approx(variance, rel=0.03)


CUMULATIVE: dict[float, Callable[[Tensor], Tensor]] = {
    0.5: lambda x: 2 / torch.pi * x.sqrt().asin(),
    1.0: lambda x: x,
    2.0: lambda x: x**2 * (3 - 2 * x),
    3.0: lambda x: x**3 * (10 - 15 * x + 6 * x**2),
}


@pytest.mark.parametrize("alpha", CUMULATIVE)
def test_beta_by_kolmogorov_and_smirnov(alpha: float) -> None:
    count = 40_000
    draws = beta(alpha, count, torch.Generator().manual_seed(1)).sort().values
    steps = torch.arange(count + 1) / count
    exact = CUMULATIVE[alpha](draws)
    distance = torch.maximum((exact - steps[:-1]).abs().max(), (exact - steps[1:]).abs().max())
    assert float(distance) * count**0.5 < 1.63  # 1 in 100 samples is further away


def test_beta_of_a_tiny_alpha_is_0_or_1() -> None:
    draws = beta(1e-8, 1000, torch.Generator().manual_seed(0))
    assert set(draws.tolist()) == {0.0, 1.0}
    assert 400 < draws.sum() < 600


def test_what_is_drawn_is_a_function_of_seed_iteration_and_purpose() -> None:
    state = State({}, {}, {}, {}, seed=1, train_iter=2)
    draw = beta(1.0, 3, generator_of(state, 101))
    assert torch.equal(draw, beta(1.0, 3, generator_of(state.replace(epoch=5), 101)))
    for other, purpose in (
        (state.replace(seed=2), 101),
        (state.replace(train_iter=3), 101),
        (state, 102),
    ):
        assert not torch.equal(draw, beta(1.0, 3, generator_of(other, purpose)))


def test_mixup_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0], [4.0, 8.0]])
    (found,) = mixup_batch((x,), torch.tensor([0.75, 0.5]), torch.tensor([1, 0]))
    assert found.tolist() == [[1.0, 2.75], [2.0, 4.5]]


def test_mixup_mixes_floating_inputs_only() -> None:
    batch = (
        {"image": torch.tensor([0.0, 2.0])},
        torch.tensor([5, 6]),
        torch.tensor([0.0, 4.0], dtype=torch.half),
        "a",
    )
    found = mixup_batch(batch, torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([1, 0]))
    assert found[0]["image"].tolist() == [1.0, 1.0]
    assert found[1].tolist() == [5, 6]
    assert (found[2].dtype, found[2].tolist()) == (torch.half, [2.0, 2.0])
    assert found[3] == "a"


def test_a_box_by_hand() -> None:
    """sqrt(1 - 0.75) = 1 / 2 of 6 x 8 is 3 x 4; halves are rounded down, what sticks out is cut
    off.
    """
    assert cutmix_box(6, 8, 0.75, row=3, column=4) == (2, 4, 2, 6)
    assert cutmix_box(6, 8, 0.75, row=0, column=7) == (0, 1, 5, 8)
    assert cutmix_box(6, 8, 1.0, row=3, column=4) == (3, 3, 4, 4)
    assert cutmix_box(6, 8, 0.0, row=3, column=4) == (0, 6, 0, 8)
    assert (box_area((2, 4, 2, 6)), box_area((3, 3, 4, 4))) == (8, 0)


def test_a_pasted_box_by_hand() -> None:
    x = torch.arange(24.0).reshape(2, 1, 3, 4)
    kept = Untouched(x)
    flat = torch.zeros(2, 3)
    found, same = cutmix_batch((x, flat), torch.tensor([1, 0]), (1, 3, 0, 2))
    assert found[0, 0].tolist() == [[0, 1, 2, 3], [16, 17, 6, 7], [20, 21, 10, 11]]
    assert found[1, 0].tolist() == [[12, 13, 14, 15], [4, 5, 18, 19], [8, 9, 22, 23]]
    assert same is flat
    kept.check()


def test_a_pasted_box_in_expanded_memory() -> None:
    x = torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert cutmix_batch(x, torch.tensor([1, 0]), (0, 1, 0, 1))[:, 0].tolist() == [
        [[2, 1], [1, 1]],
        [[1, 2], [2, 2]],
    ]


def test_a_pasted_box_leaves_the_memory_format() -> None:
    x = torch.arange(2.0 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    box, order = (0, 2, 1, 3), torch.tensor([1, 0])
    found = cutmix_batch(x.to(memory_format=torch.channels_last), order, box)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, cutmix_batch(x, order, box))
