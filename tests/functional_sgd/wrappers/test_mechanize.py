"""mechanize: the rate that it learns, and what its state is. Its numbers are compared with optax's
in tests/peers/test_parameter_free.py.
"""

from typing import Any

import optree
import pytest
import torch

import functional_sgd as fs
from functional_sgd import fuse, mechanize, sgd
from tests.catalogue import OPTIMIZERS, random_like, run, sample_tree
from tests.comparing import assert_close, assert_same


def test_by_hand() -> None:
    """One tuner; the gradient is 2, and -4 once the param is 0.5 away: won = 4."""
    opt = mechanize(sgd(lr=1.0), mechanic_wd=0.0, first_rate=0.25, tuners=1, mechanic_eps=1e-12)
    params = torch.tensor([8.0], dtype=torch.float64)
    state = opt.init(params)
    params, state = opt(params, torch.tensor([2.0], dtype=torch.float64), state)
    assert_close(params, torch.tensor([7.5], dtype=torch.float64), rtol=1e-9)
    assert_close(state["rate"], torch.tensor([0.25], dtype=torch.float64), rtol=1e-9)
    params, state = opt(params, torch.tensor([2.0], dtype=torch.float64), state)
    # way -2 won 4, cut to the peak so far, which is 0: reward 0; the peak is now 4, as the root is
    assert_close(state["rate"], torch.tensor([0.25], dtype=torch.float64), rtol=1e-9)
    assert_close(params, torch.tensor([7.0], dtype=torch.float64), rtol=1e-9)
    params, state = opt(params, torch.tensor([2.0], dtype=torch.float64), state)
    # way -4 won 8, cut to 4: reward 4 * 0.25; the peak is 8, the root sqrt(0.81 * 16 + 64)
    rate = (0.25 * 8 + 1) / (0.81 * 16 + 64) ** 0.5
    assert_close(state["rate"], torch.tensor([rate], dtype=torch.float64), rtol=1e-9)
    assert_close(params, torch.tensor([8 - 6 * rate], dtype=torch.float64), rtol=1e-9)


def test_it_finds_a_rate() -> None:
    """From 1e-6, of a bowl that is 10 away."""
    opt, params = mechanize(fs.adam(lr=1.0)), torch.full((3,), 10.0)
    state = opt.init(params)
    for _ in range(300):
        params, state = opt(params, params, state)
    assert float(state["rate"].sum()) > 1e-3
    assert float(params.abs().max()) < 1.0


def test_a_state_for_more_params_keeps_what_was_learned() -> None:
    """Also with as many leaves as tuners."""
    opt, before = mechanize(sgd(lr=1.0), tuners=3), {"a": torch.ones(2), "b": torch.ones(3)}
    after, state = run(opt, before, steps=3)
    grown: Any = {**after, "c": torch.zeros(1)}
    extended = opt.extend(state, after, grown)
    for name in ("peak", "sqr_sum", "reward", "rate"):
        assert_same(extended[name], state[name])
    assert_same(extended["start"]["a"], before["a"])
    assert_same(extended["start"]["c"], grown["c"])
    moved, _ = opt(grown, grown, extended)
    assert optree.tree_structure(moved) == optree.tree_structure(grown)


def test_fused_inside_it_is_the_same() -> None:
    opt, params = OPTIMIZERS["mechanize"](), sample_tree(dtype=torch.float64)
    found, expected = run(fuse(opt), params, steps=4), run(opt, params, steps=4)
    assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_it_needs_the_old_params() -> None:
    with pytest.raises(ValueError, match="Fuse it without donate"):
        mechanize(fuse(sgd(), donate=True))


@pytest.mark.parametrize("tuners", [0, 1.5, -1])
def test_the_number_of_tuners_is_checked(tuners: Any) -> None:
    with pytest.raises(ValueError, match="tuners must be a whole number"):
        mechanize(sgd(), tuners=tuners)


def test_leaves_without_gradient_do_not_count() -> None:
    opt, params = OPTIMIZERS["mechanize"](), {"a": torch.ones(2), "b": torch.ones(3)}
    grads = random_like(params, 1)
    after, _ = opt(params, {**grads, "b": None}, opt.init(params))
    alone = {"a": params["a"]}
    expected, _ = opt(alone, {"a": grads["a"]}, opt.init(alone))
    assert_same(after["a"], expected["a"])
    assert_same(after["b"], params["b"])


@pytest.mark.parametrize("inner", [fs.average_params(sgd(lr=1.0)), fs.schedule_free(sgd(lr=1.0))])
def test_what_averages_params_goes_around_it(inner: Any) -> None:
    """Inside, params are not yet scaled by the rate, so their mean is no place to evaluate."""
    with pytest.raises(ValueError, match=r"mechanize: expected an optimizer whose params are"):
        mechanize(inner)
