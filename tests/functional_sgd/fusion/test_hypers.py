"""Hypers are data: whatever values they take, a fused optimizer agrees with its chain and compiles
nothing again.
"""

import optree
import pytest
import torch

import functional_sgd as fs
from functional_sgd import by_path, chain, elementwise, fuse, leafwise, norm
from functional_sgd.fusion.backends.c import compiler
from functional_sgd.schedules import Cosine
from tests.comparing import assert_same, copy_of
from tests.functional_sgd.fusion.helpers import (
    assert_near,
    check_steps,
    count_kernels,
    grads_for,
    kinds,
    plain_tree,
    tolerance_of,
)
from tests.functional_sgd.user_rules import by_loss, maybe_by_loss, scale_tree

NAMES = {
    "adamw": fs.adamw(),
    "lamb": fs.lamb(lr=0.1),
    "larc": fs.larc(lr=0.1),
    "clipped": chain(fs.clip_norm, fs.adamw()),
}


def tensors(params):
    return optree.tree_map(lambda leaf: torch.tensor(0.01 + 0.001 * leaf.dim()), params)


HYPERS = {
    "number": lambda params: 0.2,
    "integer": lambda params: 1,
    "tensor": lambda params: torch.tensor(0.3),
    "half_tensor": lambda params: torch.tensor(0.3, dtype=torch.bfloat16),
    "by_path": lambda params: by_path(params, {"b*": 1e-2, "*": 1e-3}),
    "prefix": lambda params: {"a": 0.1, "b": 0.2, "d": 0.3, "idle": 0.4, "one": 0.5},
    "tree_of_tensors": tensors,
    "zero": lambda params: 0.0,
}


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("make", HYPERS.values(), ids=HYPERS)
@pytest.mark.parametrize("opt", NAMES.values(), ids=NAMES)
def test_hypers_of_every_kind(opt, make, donate):
    params = plain_tree(torch.float32)
    check_steps(opt, params, donate, lr=make(params))


@pytest.mark.parametrize("opt", NAMES.values(), ids=NAMES)
def test_other_values_compile_nothing_again(opt, monkeypatch):
    loads = []
    fused, params = fuse(opt), plain_tree(torch.float32)
    state = opt.init(params)
    made = count_kernels(monkeypatch)
    params, state = fused(params, grads_for(params, 0), state)
    count = len(made)
    real = compiler.load
    monkeypatch.setattr(compiler, "load", lambda source: loads.append(source) or real(source))
    schedule = Cosine(0.1, 0.001)
    for number, make in enumerate(HYPERS.values(), start=1):
        params, state = fused(params, grads_for(params, number), state, dict(lr=make(params)))
        params, state = fused(
            params, grads_for(params, number), state, dict(lr=schedule(number / 10))
        )
    names = {
        "wd": 0.2,
        "mom": 0.5,
        "sqr_mom": 0.6,
        "eps": 1e-3,
        "max_norm": 3.0,
        "trust_coeff": 0.1,
        "max_trust": 2.0,
    }
    for name, value in names.items():
        if name in opt.hyper:
            params, state = fused(params, grads_for(params, 1), state, {name: value})
    assert len(made) == count
    assert loads == []


def test_two_hypers_that_differ_by_leaf():
    params = plain_tree(torch.float32)
    check_steps(
        fs.adamw(),
        params,
        lr=by_path(params, {"b*": 0.1, "*": 0.2}),
        mom=by_path(params, {"d*": 0.5, "*": 0.8}),
    )


def test_a_tree_of_hypers_with_leaves_of_several_kinds():
    """Some leaves have no gradient, some are complex, some are of another dtype."""
    params = {
        "a": torch.ones(3),
        "b": torch.ones(3, dtype=torch.float64),
        "c": torch.ones(2),
        "d": torch.ones(2) + 1j,
    }
    lr = {"a": 0.1, "b": torch.tensor(0.2), "c": 0.3, "d": 0.4}

    def grads(params, number):
        return {**params, "c": None if number % 2 else params["c"]}

    for opt in (fs.adamw(), fs.lamb(lr=0.1)):
        check_steps(opt, params, grads=grads, lr=lr)


def test_a_hyper_of_a_treewise_rule_must_be_one_number():
    opt = fuse(chain(scale_tree, fs.sgd(lr=0.1)))
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(ValueError, match="rule scale_tree sees whole trees, so 'factor' must be"):
        opt(params, params, opt.init(params), dict(factor={"a": 1.0, "b": 2.0}))


def test_a_hyper_beside_a_number_of_the_whole_tree_may_differ_by_leaf():
    params = plain_tree(torch.float32)
    check_steps(NAMES["clipped"], params, max_norm=by_path(params, {"b*": 1.0, "*": 2.0}))


@leafwise
def unit_by_torch(update, *, gain=1.0):
    return dict(update=gain * update / (update.norm() + 1))


@elementwise
def unit(update, *, length=norm("update"), gain=1.0):
    return dict(update=gain * update / (length + 1))


@pytest.mark.parametrize("rule", [unit_by_torch, unit], ids=lambda rule: rule.name)
def test_hypers_of_a_rule_with_a_norm_may_change(rule):
    """A rule that reduces, and also multiplies by a hyper: its number is no constant."""
    opt = chain(rule, fs.sgd_step, lr=0.1)
    fused, params = fuse(opt), plain_tree(torch.float32)
    state = opt.init(params)
    for gain in (
        1.0,
        0.5,
        2,
        torch.tensor(3.0),
        torch.tensor(1.0),
        1.0,
        by_path(params, {"b*": 1.0, "*": 2.0}),
    ):
        before = copy_of((params, state))
        expected = opt(params, grads_for(params, 1), state, dict(gain=gain))
        params, state = fused(params, grads_for(params, 1), state, dict(gain=gain))
        assert_near((params, state), expected, before, **tolerance_of(opt))


def test_extras():
    for rule, calls in (
        (by_loss, [0.5, torch.tensor(2.0)]),
        (maybe_by_loss, [None, 0.5, torch.tensor(2.0), None]),
    ):
        opt = chain(rule, fs.sgd_step, lr=0.1)
        fused, params = fuse(opt), [torch.ones(3)]
        for value in calls:
            extras = {} if value is None else dict(value=value)
            state = opt.init(params)
            assert_same(
                fused(params, params, state, **extras), opt(params, params, state, **extras)
            )


def test_an_extra_that_is_no_number():
    @elementwise(writes=("update",))
    def masked(update, *, mask=None):
        return dict(update=update if mask is None else update * mask)

    opt, params = chain(masked, fs.sgd_step, lr=0.1), [torch.ones(3)]
    mask = torch.tensor([0.0, 1.0, 2.0])
    state = opt.init(params)
    expected = opt(params, params, state, mask=mask)
    assert_same(fuse(opt)(params, params, state, mask=mask), expected)
    given = copy_of((params, state))
    donated = fuse(opt, donate=True)(given[0], params, given[1], mask=mask)
    assert_same(donated, expected)
    assert donated[0][0] is given[0][0]


@pytest.mark.parametrize("value", [0, 1, 2])
def test_an_option(value):
    """A rule that branches on a number is run by torch, which sees the number."""

    @elementwise
    def option(update, *, mode=1):
        return dict(update=2 * update if mode == 1 else update if mode else -update)

    opt, params = chain(option, fs.sgd_step, lr=0.1), [torch.ones(3)]
    state = opt.init(params)
    hyper = dict(mode=value)
    assert kinds(fuse(opt)) == ["torch", "kernel"]
    assert_same(fuse(opt)(params, params, state, hyper), opt(params, params, state, hyper))


def test_defaults_of_the_chain_and_of_the_call():
    fused = fuse(fs.adamw(lr=0.5))
    assert fused.hyper == fs.adamw(lr=0.5).hyper
    assert fuse(fs.chain(fs.sgd_step)).required == ("lr",)
    params = [torch.ones(2)]
    opt = fuse(fs.chain(fs.sgd_step))
    with pytest.raises(ValueError, match="lr"):
        opt(params, params, opt.init(params))


def test_a_step_count_far_away():
    """The counter is a 64-bit integer; powers of it are taken in double precision."""
    opt, params = fs.adamw(), [torch.ones(3)]
    for step in (10, 10**6, 2**31, 2**40):
        state = {**opt.init(params), "step": torch.tensor([step])}
        assert_near(fuse(opt)(params, params, state), opt(params, params, state), (params, state))


@elementwise
def looked_up(update, *, kind=1.0):
    return dict(update=update * {1.0: 10.0, 2.0: 20.0}.get(kind, 1.0))


@elementwise
def as_text(update, *, kind=1.0):
    return dict(update=update * (20.0 if str(kind) == "2.0" else 10.0))


@elementwise
def formatted(update, *, kind=1.0):
    return dict(update=update * (20.0 if f"{kind:.1f}" == "2.0" else 10.0))


@elementwise
def of_floats(update, *, kind):
    return dict(update=update * (20.0 if isinstance(kind, float) else 10.0))


@elementwise
def of_integers(update, *, kind=1.0):
    return dict(update=update * (20.0 if isinstance(kind, int) else 10.0))


@elementwise
def of_tensors(update, *, kind=1.0):
    return dict(update=update * (20.0 if isinstance(kind, torch.Tensor) else 10.0))


@pytest.mark.parametrize(
    "rule",
    [looked_up, as_text, formatted, of_floats, of_integers, of_tensors],
    ids=lambda rule: rule.name,
)
@pytest.mark.parametrize("kind", [1.0, 2.0, 2, torch.tensor(2.0)], ids=repr)
def test_a_rule_that_tells_hypers_apart_otherwise_than_by_value_is_run_by_torch(rule, kind):
    opt, params = chain(rule, fs.sgd_step, lr=0.1), [torch.ones(3)]
    state, hyper = opt.init(params), dict(kind=kind)
    fused = fuse(opt)
    assert kinds(fused) == ["torch", "kernel"]
    assert_same(fused(params, params, state, hyper), opt(params, params, state, hyper))


def test_a_rule_that_divides_by_zero_for_some_whole_hyper_is_a_kernel():
    @elementwise
    def undo(update, *, mom=0.5, power=0.5):
        return dict(update=update / (1 - mom) ** power + update / (2 - mom))

    assert kinds(fuse(chain(undo, fs.sgd_step))) == ["kernel"]
