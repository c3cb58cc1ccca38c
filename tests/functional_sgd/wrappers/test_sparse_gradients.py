"""Sparse gradients (of nn.Embedding(sparse=True), say): a step along one is that along the dense
one that it stands for.
"""

from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn

from functional_sgd import (
    Optimizer,
    lbfgs,
    low_rank,
    sgd,
    skip_large,
    skip_nonfinite,
    sparse_adam,
    to_torch,
)
from tests.catalogue import WRAPPED
from tests.comparing import assert_same

PARAMS = {"rows": torch.arange(30.0).reshape(6, 5), "bias": torch.arange(5.0)}
DENSE = {"rows": torch.zeros(6, 5), "bias": torch.ones(5)}
DENSE["rows"][1:3] = torch.tensor([[4.0, 2.0, 8.0, 2.0, 6.0], [1.0, 2.0, 3.0, 4.0, 5.0]])

MADE = {
    **WRAPPED,
    "lbfgs": lambda: lbfgs(line_search=False),
    "low_rank_of_all": lambda: low_rank(sgd(), rank=2),
    "skip_large_skips": lambda: skip_large(sgd(), max_norm=0.1),
    "skip_nonfinite_of_sparse_adam": lambda: skip_nonfinite(sparse_adam()),
}


def sparse(grad: Tensor, places: list[int]) -> Tensor:
    """The same gradient, with entries for these rows; those that are there twice have a half."""
    halves = [grad[place] / places.count(place) for place in places]
    values, rows = torch.stack(halves), torch.tensor([places])
    return torch.sparse_coo_tensor(rows, values, grad.shape, check_invariants=True)


@pytest.mark.parametrize("name", MADE)
def test_a_step_is_that_along_the_dense_gradient(name: str) -> None:
    opt: Optimizer = MADE[name]()
    grads = {**DENSE, "rows": sparse(DENSE["rows"], [1, 2, 1])}
    params, state = PARAMS, opt.init(PARAMS)
    expected = params, state
    for _ in range(3):
        if opt.perturbs:
            there = opt.perturb(params, grads, state)
            assert_same(there, opt.perturb(params, DENSE, state))
        params, state = opt(params, grads, state)
        expected = opt(expected[0], DENSE, expected[1])
    assert_same((params, state), expected)


@pytest.mark.parametrize("track", [False, True])
def test_rows_that_are_named_with_zeros_are_moved_inside_of_skip_nonfinite(track: bool) -> None:
    """Whether or not the step depends on a branch."""
    inner = sparse_adam(lr=0.1)
    opt = skip_nonfinite(inner)
    bias = DENSE["bias"].clone().requires_grad_(track)
    first = {"rows": sparse(DENSE["rows"], [1, 2]), "bias": bias}
    later = {"rows": sparse(torch.zeros(6, 5), [1]), "bias": bias}
    params, state = opt(PARAMS, first, opt.init(PARAMS))
    expected, own = inner(PARAMS, first, inner.init(PARAMS))
    after, _ = opt(params, later, state)
    assert_same(detached(after), detached(inner(expected, later, own)[0]))
    assert not torch.equal(after["rows"][1], params["rows"][1])


def detached(tree: Any) -> Any:
    return optree.tree_map(torch.detach, tree)


@pytest.mark.parametrize("opt", [skip_nonfinite(sparse_adam()), skip_large(sgd(), 0.1)], ids=repr)
def test_an_embedding_of_torch_is_trained(opt: Optimizer) -> None:
    layer = nn.Embedding(6, 5, sparse=True)
    layer(torch.tensor([1, 1, 2])).square().sum().backward()
    to_torch(opt, layer.parameters()).step()
