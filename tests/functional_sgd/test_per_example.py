"""mean_of_clipped: against a loop over examples, and what its noise is."""

from typing import Any

import pytest
import torch

from functional_sgd import mean_of_clipped, sgd
from tests.catalogue import random_like
from tests.comparing import assert_close, assert_same

SHAPES = {"a": (8, 4, 3), "b": (8, 5), "c": (8,)}
GRADS = random_like({name: torch.zeros(s, dtype=torch.float64) for name, s in SHAPES.items()}, 0)


def by_hand(grads: Any, max_norm: float) -> Any:
    total = {name: torch.zeros_like(leaf[0]) for name, leaf in grads.items()}
    for index in range(8):
        size = sum(float(leaf[index].abs().square().sum()) for leaf in grads.values()) ** 0.5
        for name, leaf in grads.items():
            total[name] = total[name] + leaf[index] * min(1.0, max_norm / size)
    return {name: value / 8 for name, value in total.items()}


@pytest.mark.parametrize("max_norm", [0.1, 4.0, 1e3])
def test_it_is_the_mean_of_clipped_gradients(max_norm: float) -> None:
    assert_close(mean_of_clipped(GRADS, max_norm), by_hand(GRADS, max_norm), rtol=1e-13)


def test_complex_gradients() -> None:
    grads = {name: torch.complex(leaf, leaf.flip(0)) for name, leaf in GRADS.items()}
    assert_close(mean_of_clipped(grads, 2.0), by_hand(grads, 2.0), rtol=1e-13)


def test_zeros_stay_zeros() -> None:
    zeros = {name: torch.zeros_like(leaf).half() for name, leaf in GRADS.items()}
    assert_same(mean_of_clipped(zeros, 1.0), {name: leaf[0] for name, leaf in zeros.items()})


def test_gradients_of_a_loss() -> None:
    """One example of two is clipped, from length 4 to 1."""

    def loss(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (w * x).sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(
        torch.ones(1), torch.tensor([[4.0], [0.5]])
    )
    opt, params = sgd(lr=1.0), torch.ones(1)
    after, _ = opt(params, mean_of_clipped(grads, 1.0), opt.init(params))
    assert_same(after, torch.tensor([0.25]))


def test_noise_has_the_spread_that_was_asked_for() -> None:
    zeros = torch.zeros(4, 200_000)
    drawn = mean_of_clipped(zeros, max_norm=2.0, noise=3.0, seed=1)  # 3 * 2 / 4
    assert float(drawn.mean()) == pytest.approx(0, abs=0.02)
    assert float(drawn.std()) == pytest.approx(1.5, rel=0.01)


def test_noise_is_a_function_of_seed_step_and_leaf() -> None:
    zeros = [torch.zeros(2, 9), torch.zeros(2, 9)]
    first, twin = (mean_of_clipped(zeros, 1.0, 1.0, seed=1, step=2) for _ in range(2))
    assert_same(first, twin)
    for other in (
        mean_of_clipped(zeros, 1.0, 1.0, seed=2, step=2),
        mean_of_clipped(zeros, 1.0, 1.0, seed=1, step=3),
        first[::-1],
    ):
        assert not torch.equal(first[0], other[0])


def test_it_maps_and_differentiates() -> None:
    def size(grads: torch.Tensor, max_norm: torch.Tensor) -> Any:
        return mean_of_clipped([grads], max_norm)[0]

    norms = torch.tensor([0.5, 50.0], dtype=torch.float64)
    mapped = torch.func.vmap(size, in_dims=(None, 0))(GRADS["b"], norms)
    assert_close(mapped, torch.stack([size(GRADS["b"], norm) for norm in norms]))
    torch.autograd.gradcheck(size, (GRADS["b"].clone().requires_grad_(), norms[0]))


@pytest.mark.parametrize(
    "grads", [[], [torch.zeros(())], [torch.zeros(2, 1), torch.zeros(3, 1)], [torch.zeros(0, 2)]]
)
def test_gradients_without_examples_are_an_error(grads: Any) -> None:
    with pytest.raises(ValueError, match="every gradient needs a first axis, of the examples"):
        mean_of_clipped(grads, 1.0)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((-2.5,), "'max_norm' must be above 0, got -2.5"),
        ((1.0, -1.0), "'noise' must be at least 0"),
    ],
)
def test_numbers_out_of_range_are_errors(numbers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"mean_of_clipped: hyper {message}"):
        mean_of_clipped(GRADS, *numbers)
