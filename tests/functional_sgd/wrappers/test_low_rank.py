"""low_rank: the authors' steps by hand, and what is refused."""

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import Optimizer, adam, chain, clip_norm, fuse, low_rank, norm, sgd
from tests.comparing import assert_close, assert_same

RANK, EVERY, SCALE, LR, WD = 2, 4, 0.5, 0.1, 0.2
SHAPES = {"tall": (6, 4), "wide": (3, 5), "square": (4, 4), "small": (2, 7), "bias": (4,)}
STEPS = 10


def drawn(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def by_hand(x: Tensor, grads: list[Tensor]) -> Tensor:
    """The authors' AdamW with their projection "std": a new basis in steps 0, 4, 8."""
    m: Any = 0.0
    v: Any = 0.0
    basis: Any = None
    for number, grad in enumerate(grads):
        projected = x.dim() == 2 and min(x.shape) > RANK
        tall = x.dim() == 2 and x.shape[0] >= x.shape[1]
        if projected:
            if number % EVERY == 0:
                u, _, vh = torch.linalg.svd(grad, full_matrices=False)
                basis = vh[:RANK] if tall else u[:, :RANK]
            grad = grad @ basis.T if tall else basis.T @ grad
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad.square()
        rate = LR * math.sqrt(1 - 0.999 ** (number + 1)) / (1 - 0.9 ** (number + 1))
        step = m / (v.sqrt() + 1e-6)
        if projected:
            step = SCALE * (step @ basis if tall else basis @ step)
        x = x - rate * step
        x = x - LR * WD * x
    return x


@pytest.mark.parametrize("form", ["plain", "fused", "donated"])
def test_the_authors_steps(form: str) -> None:
    made: Optimizer = fs.galore(LR, wd=WD, rank=RANK, basis_every=EVERY, update_scale=SCALE)
    opt = made if form == "plain" else fuse(made, donate=form == "donated")
    params, steps = drawn(0), [drawn(1 + number) for number in range(STEPS)]
    expected = {n: by_hand(x, [grads[n] for grads in steps]) for n, x in params.items()}
    state = opt.init(params)
    for grads in steps:
        params, state = opt(params, grads, state)
    assert_close(params, expected, rtol=1e-9, atol=1e-11)


def test_the_state_is_small() -> None:
    state: Any = low_rank(adam(), rank=3).init({"w": torch.zeros(50, 20), "b": torch.zeros(3, 9)})
    assert state["inner"]["sqr_avg"]["w"].shape == (50, 3)
    assert state["basis"]["w"].shape == (20, 3)
    assert state["inner"]["sqr_avg"]["b"].shape == (3, 9)  # no side is longer than the rank
    assert state["basis"]["b"].shape == ()


def test_a_convolution_is_a_matrix_and_half_precision_is_computed_in_float32() -> None:
    opt = low_rank(sgd(lr=1.0), rank=1, update_scale=1.0)
    params = torch.zeros(2, 2, 2, dtype=torch.bfloat16)
    grad = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]).view(2, 2, 2).bfloat16()
    after, state = opt(params, grad, opt.init(params))
    expected = torch.tensor([[-3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]).view(2, 2, 2)
    assert_same(after, expected.bfloat16())  # what lies in the second direction is not seen
    assert state["basis"].dtype == torch.float32


def test_a_leaf_that_comes_late_has_a_basis_from_its_first_gradient_on() -> None:
    opt = low_rank(sgd(lr=1.0), rank=1, update_scale=1.0)
    params = {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}
    one = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    state = opt.init(params)
    params, state = opt(params, {"a": one, "b": None}, state)
    assert_same(params["b"], torch.ones(2, 2))
    params, state = opt(params, {"a": None, "b": one}, state)
    assert_close(params["b"], torch.ones(2, 2) - one, atol=1e-6)
    assert_close(params["a"], torch.ones(2, 2) - one, atol=1e-6)


def test_hypers_are_data() -> None:
    opt, params = low_rank(sgd(lr=1.0), rank=1), torch.zeros(2, 2)
    grad = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    state = opt.init(params)
    for scale in (2.0, torch.tensor(2.0)):
        after, _ = opt(params, grad, state, {"update_scale": scale, "lr": 0.25})
        assert_close(after, -0.5 * grad, atol=1e-6)


@fs.elementwise
def by_length(param: Tensor, update: Tensor, *, size: Tensor = norm("param")) -> dict[str, Tensor]:
    """A rule that reads param in a norm."""
    return dict(update=update * size)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: low_rank(adam(), rank=0), ValueError, "rank must be a whole number"),
        (lambda: low_rank(adam(), basis_every=0), ValueError, "'basis_every' must be"),
        (lambda: low_rank(adam(), update_scale=-1.0), ValueError, "'update_scale' must be"),
        (lambda: low_rank(fs.adamw()), ValueError, "rule weight_decay reads param"),
        (lambda: low_rank(chain(by_length, sgd())), ValueError, "rule by_length reads param"),
        (lambda: low_rank(fs.accumulate(adam(), 2)), TypeError, "expected a chain"),
        (lambda: low_rank(fuse(fs.lamb())), ValueError, "reads param, which has no place"),
    ],
)
def test_what_is_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_it_may_have_rules_in_front() -> None:
    assert chain(clip_norm, low_rank(adam(), rank=2)).hyper["update_scale"] == 0.25


def test_bases_are_renewed_by_the_counts_of_their_leaves_also_in_a_tree_of_another_order() -> None:
    """A run whose params become an OrderedDict in its middle is the run of a dict."""
    opt = low_rank(adam(lr=1.0), rank=1, basis_every=2)

    def run(kind: Any) -> Any:
        params = {"w": torch.ones(3, 2), "b": torch.ones(3, 2)}
        state = opt.init(params)
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            grads = {name: torch.randn(3, 2, generator=generator) for name in ("w", "b")}
            late = {**grads, "w": None} if seed == 0 else grads
            if seed == 3:
                params = kind(w=params["w"], b=params["b"])
            given = kind(w=late["w"], b=late["b"]) if seed >= 3 else late
            params, state = opt(params, given, state)
        return params

    assert_same(dict(run(OrderedDict)), run(dict))
