"""Params that were replaced: what optimizers keep of the old ones begins again."""

from typing import Any

import optree
import pytest
import torch
from torch import Tensor

from functional_sgd import Optimizer, fuse
from functional_sgd.restarting import is_untouched, restarted
from tests.catalogue import OPTIMIZERS, run, sample_tree
from tests.comparing import assert_same, copy_of


def others(tree: Any) -> Any:
    def other(leaf: Tensor) -> Tensor:
        return 1 - 2 * leaf

    return optree.tree_map(other, tree)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fresh_state_becomes_that_of_the_new_params(name: str) -> None:
    opt: Optimizer = OPTIMIZERS[name]()
    old = sample_tree()
    state = opt.init(old)
    assert is_untouched(state)
    before = copy_of(state)
    assert_same(restarted(opt, others(old), state), opt.init(others(old)))
    assert_same(state, before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_of_a_state_in_use_the_new_params_are_evaluated_and_counts_stay(name: str) -> None:
    opt: Optimizer = OPTIMIZERS[name]()
    params, state = run(opt, sample_tree(), 3)
    assert not is_untouched(state)
    new = others(params)
    again = restarted(opt, new, state)
    assert_same(opt.evaluated(new, again), new)
    counts = {key: state[key] for key in ("step", "calls") if key in state}
    assert_same({key: again[key] for key in counts}, counts)
    opt(new, new, again)


def test_averages_of_gradients_stay() -> None:
    from functional_sgd import lookahead, momentum

    opt = fuse(lookahead(momentum(lr=0.1), sync_every=5))
    params, state = run(opt, sample_tree(), 2)
    again = restarted(opt, others(params), state)
    assert_same(again["grad_avg"], state["grad_avg"])
    assert_same(again["slow_param"], others(params))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_of_other_dtypes_too(dtype: torch.dtype) -> None:
    from functional_sgd import average_params, sgd

    opt = average_params(sgd(lr=0.1), decay=0.5)
    params, state = run(opt, sample_tree(dtype=dtype), 2)
    new = others(params)
    assert_same(opt.evaluated(new, restarted(opt, new, state)), new)
