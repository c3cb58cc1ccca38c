"""Params that are nn.Parameters, as dict(model.named_parameters()) gives them: pure and donated."""

import optree
import pytest
import torch
from torch import nn

import functional_sgd as fs
from functional_sgd import Chain, fuse
from tests.catalogue import OPTIMIZERS, RECIPES
from tests.comparing import Untouched, assert_same, copy_of
from tests.functional_sgd.fusion.helpers import ExactRoots, count_kernels

NAMES = ["adamw", "lamb", "clip_norm_adam", "lookahead_sgd", "centralize_sgd", "sgd"]
named = pytest.mark.parametrize("name", NAMES)


def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def grads_of(params, seed):
    """Gradients, as backward leaves them."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in params.items()}


def train(opt, params, state, steps=3):
    for number in range(steps):
        params, state = opt(params, grads_of(params, number), state)
    return params, state


@named
def test_pure_with_gradients_is_the_chain_and_can_be_differentiated(name):
    opt, params = RECIPES[name](), dict(model().named_parameters())
    state, given = opt.init(params), Untouched(params)
    found, expected = train(fuse(opt), params, state), train(opt, params, state)
    assert_same(found, expected)
    given.check()
    results = [sum(leaf.sum() for leaf in one[0].values()) for one in (found, expected)]
    assert_same(*(torch.autograd.grad(one, list(params.values())) for one in results))


@named
def test_pure_under_no_grad_runs_kernels_and_is_not_tracked(name, monkeypatch):
    opt, params = RECIPES[name](), dict(model().named_parameters())
    given, made = Untouched(params), count_kernels(monkeypatch)
    with torch.no_grad(), ExactRoots():
        found = train(fuse(opt), params, opt.init(params))
        expected = train(opt, copy_of(params), opt.init(copy_of(params)))
    assert made
    given.check()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    for leaf in optree.tree_leaves(found):
        assert not leaf.requires_grad
        assert type(leaf) is torch.Tensor


@named
def test_donated_parameters_are_trained_where_they_are(name, monkeypatch):
    """The module computes with the new values; no graph grows."""
    opt, module = RECIPES[name](), model()
    params, made = dict(module.named_parameters()), count_kernels(monkeypatch)
    with ExactRoots():
        expected, _ = train(opt, copy_of(params), opt.init(copy_of(params)))
        fused = fuse(opt, donate=True)
        after, state = train(fused, params, fused.init(params))
    assert made
    for key, leaf in module.named_parameters():
        assert after[key] is leaf
        assert leaf.requires_grad
        assert leaf.is_leaf
        torch.testing.assert_close(leaf.detach(), expected[key], rtol=1e-6, atol=1e-7)
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves(state))


OLD_VALUES = {
    *("accumulate", "lazy_rows", "skip_nonfinite", "skip_nonfinite_of_all_others", "sparse_adam"),
    *("mechanize", "skip_large", "skip_nonfinite_limit"),
}
"""Wrappers that need params and state as they were."""


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in OLD_VALUES])
def test_every_optimizer_that_donates_takes_parameters(name):
    """As the loop does, without gradients being tracked; a chain also where they are."""
    opt = OPTIMIZERS[name]()
    fused = fuse(opt, donate=True)
    params = dict(model().named_parameters())
    with torch.no_grad():
        train(fused, params, fused.init(params))
    if isinstance(opt, Chain):
        params = dict(model().named_parameters())
        train(fused, params, fused.init(params))


def test_a_module_is_trained_by_backward_and_a_donated_step():
    module, opt = model(), fuse(fs.adamw(lr=0.05), donate=True)
    params = dict(module.named_parameters())
    state, x, losses = opt.init(params), torch.ones(5, 3), []
    for _ in range(20):
        module.zero_grad()
        loss = (module(x) - 1).square().mean()
        loss.backward()
        params, state = opt(params, {name: p.grad for name, p in params.items()}, state)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
