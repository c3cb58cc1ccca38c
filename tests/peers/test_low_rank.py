"""galore against pytorch_optimizer's, which finds singular vectors in float32, and anew a step
earlier than the authors: here only once. apollo against its paper, with our random numbers: the
peers' is another, which takes the step in few dimensions. dion against its paper, in the same way.
"""

import math

import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import Chain
from functional_sgd.randomness import key_of, normal
from tests.peers.peers import peer

SHAPES = ((6, 4), (3, 5), (4,))
STEPS = 12


def drawn(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def test_same_params_as_pytorch_optimizer() -> None:
    theirs = [torch.nn.Parameter(start) for start in drawn(0)]
    low = dict(rank=2, update_proj_gap=1000, scale=0.25, projection_type="std")
    optimizer = peer("pytorch_optimizer").GaLore(
        [{"params": theirs, **low}], lr=0.1, eps=1e-6, weight_decay=0.3
    )
    opt = fs.galore(0.1, wd=0.3, rank=2, basis_every=1000)
    params, state = drawn(0), opt.init(drawn(0))
    for number in range(STEPS):
        grads = drawn(1 + number)
        for leaf, grad in zip(theirs, grads, strict=True):
            leaf.grad = grad.clone()
        optimizer.step()
        params, state = opt(params, grads, state)
    for one, other in zip(params, theirs, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-7)


class Apollo:
    """Algorithm 1 of the paper for one leaf, and the code of its authors where that says more."""

    def __init__(self, leaf: int, seed: Tensor, rank: int, whole: bool, scale: float) -> None:
        self.leaf, self.seed, self.rank, self.whole, self.scale = leaf, seed, rank, whole, scale
        self.first, self.second, self.length = 0.0, 0.0, 0.0

    def step(self, param: Tensor, grad: Tensor, number: int, lr: float, wd: float) -> Tensor:
        """The leaf after a step; directions are drawn every fourth."""
        tall = grad.dim() == 1 or len(grad) >= grad.shape[1]
        low: Tensor = grad
        if grad.dim() > 1:
            if number % 4 == 1:
                key = key_of(self.seed, torch.tensor(number), self.leaf, position=0)
                like = torch.zeros(min(grad.shape), self.rank, dtype=torch.float64)
                self.directions = normal(key, like) / math.sqrt(self.rank)
            low = grad @ self.directions if tall else self.directions.T @ grad
        self.first = 0.9 * self.first + 0.1 * low
        self.second = 0.999 * self.second + 0.001 * low**2
        change = self.first / (self.second.sqrt() + 1e-6)
        if grad.dim() > 1:
            axes = (0, 1) if self.whole else (1 if tall else 0)
            ratio = change.norm(dim=axes, keepdim=True) / (low.norm(dim=axes, keepdim=True) + 1e-8)
            change = self.scale * grad * ratio
            if self.length > 0:  # theirs: number > 1
                change = change / max(1.0, float(change.norm()) / (self.length + 1e-8) / 1.01)
            self.length = float(change.norm())
        rate = lr * math.sqrt(1 - 0.999**number) / (1 - 0.9**number)
        return (param - rate * change) * (1 - lr * wd)


@pytest.mark.parametrize(
    ("opt", "rank", "scale"),
    [
        (fs.apollo(0.1, wd=0.3, rank=2, sketch_every=4), 2, 1.0),
        (fs.apollo_mini(0.1, wd=0.3, sketch_every=4, sketch_scale=3.0), 1, 3.0),
    ],
    ids=["apollo", "mini"],
)
def test_apollo_is_that_of_its_paper(opt: Chain, rank: int, scale: float) -> None:
    params, state = drawn(0), opt.init(drawn(0))
    theirs = [Apollo(leaf, state["seed"], rank, rank == 1, scale) for leaf in range(len(SHAPES))]
    expected = drawn(0)
    for number in range(1, STEPS + 1):
        grads = [number % 3 * grad for grad in drawn(number)]  # they grow, so they are limited
        params, state = opt(params, grads, state)
        together = zip(theirs, expected, grads, strict=True)
        expected = [one.step(leaf, grad, number, 0.1, 0.3) for one, leaf, grad in together]
    for one, other in zip(params, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Dion:
    """Algorithm 1 of the paper for one leaf, from a given basis. A vector is its only direction."""

    def __init__(self, leaf: int, seed: Tensor, like: Tensor) -> None:
        key = key_of(seed, torch.tensor(1), leaf, position=1)
        shorter = min(like.shape)
        drawn = torch.zeros(shorter, math.ceil(0.5 * shorter), dtype=torch.float64)
        self.basis, self.momentum = normal(key, drawn), torch.zeros_like(like)

    def step(self, param: Tensor, grad: Tensor, lr: float, wd: float) -> Tensor:
        """The leaf after a step."""
        rows, columns = grad.shape
        total = self.momentum + grad
        tall = total if rows >= columns else total.T
        left = torch.linalg.qr(tall @ self.basis).Q
        right = tall.T @ left
        taken = left @ right.T
        self.momentum = total - 0.05 * (taken if rows >= columns else taken.T)
        self.basis = right / (right.norm(dim=0) + 1e-8)
        update = left @ self.basis.T if rows >= columns else self.basis @ left.T
        return (1 - lr * wd) * param - lr * math.sqrt(rows / columns) * update


def test_dion_is_that_of_its_paper() -> None:
    opt = fs.dion(0.1, wd=0.3, rank_fraction=0.5)
    params, state = drawn(0)[:2], opt.init(drawn(0)[:2])
    theirs = [Dion(leaf, state["seed"], param) for leaf, param in enumerate(params)]
    expected = drawn(0)[:2]
    for number in range(1, STEPS + 1):
        grads = drawn(number)[:2]
        params, state = opt(params, grads, state)
        together = zip(theirs, expected, grads, strict=True)
        expected = [one.step(leaf, grad, 0.1, 0.3) for one, leaf, grad in together]
    for one, other in zip(params, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rank_fraction", [0.0, 1.5])
def test_dion_says_which_shares_of_directions_there_are(rank_fraction: float) -> None:
    with pytest.raises(ValueError, match="rank_fraction must be more than 0 and at most 1"):
        fs.dion(rank_fraction=rank_fraction)
