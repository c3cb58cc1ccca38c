"""Rules that torch runs: leaves of one shape in one call, and leaf by leaf where that cannot be."""

import pytest
import torch

import functional_sgd as fs
from functional_sgd import by_path, fuse, leafwise, norm
from functional_sgd.fusion import batches
from tests.comparing import copy_of
from tests.functional_sgd.fusion.helpers import (
    REDUCING,
    assert_near,
    check_steps,
    draw,
    then_step,
)

donating = pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])


def matrices(dtype=torch.float32):
    """Five of one shape, two of another, a vector and a number."""
    shapes = {**{f"a{n}": (4, 3) for n in range(5)}, "b0": (3, 3), "b1": (3, 3), "c": (6,), "d": ()}
    return {key: draw(shape, dtype, place) for place, (key, shape) in enumerate(shapes.items())}


calls = []


@leafwise(writes=("update",))
def orthogonal(update):
    calls.append(update.shape)
    if update.dim() != 2:
        return dict(update=update)
    x = update / (update.norm() + 1e-7)
    return dict(update=1.5 * x - 0.5 * x @ x.T @ x)


@leafwise(rows=lambda param: param.new_zeros(param.shape[:1]))
def by_row(update, rows):
    rows = 0.9 * rows + update.flatten(1).norm(dim=1) if update.dim() > 1 else rows
    return dict(update=update / (1 + rows.mean()) if update.dim() > 1 else update, rows=rows)


@leafwise
def by_step(update, *, step, gain=1.0):
    return dict(update=gain * update.flip(0) / step if update.dim() else update)


@leafwise
def by_length(update, *, length=norm("update")):
    return dict(update=update.flip(0) / (1 + length))


@leafwise
def noisy(update, *, key):
    return dict(update=update + 0.1 * fs.normal(key, update))


@leafwise(writes=("update",))
def branching(update):
    calls.append(update.shape)
    return dict(update=-update if update.sum() > 0 else 2 * update)


RULES = [orthogonal, by_row, by_step, by_length, noisy, branching]


@donating
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_by_torch_gives_what_it_gives_leaf_by_leaf(rule, dtype, donate):
    if dtype.is_complex and rule in (branching, by_row, noisy):
        pytest.skip("not for complex numbers")
    check_steps(then_step(fs.heavy_ball, rule), matrices(dtype), donate)


@donating
def test_hypers_that_differ_by_leaf_are_batched_too(donate):
    params = matrices()
    gain = by_path(params, {"a1": torch.tensor(3.0), "a*": 2.0, "*": 1.0})
    check_steps(then_step(by_step), params, donate, gain=gain)


def test_leaves_of_one_shape_are_one_call():
    params, opt = matrices(), fuse(then_step(orthogonal))
    calls.clear()
    opt(params, params, opt.init(params))
    assert sorted(map(tuple, calls)) == [(1,), (3, 3), (4, 3), (6,)]


def test_a_rule_that_branches_on_values_is_not_batched_again():
    params, opt = matrices(), fuse(then_step(branching))
    state = opt.init(params)
    opt(params, params, state)
    calls.clear()
    opt(params, params, state)
    assert len(calls) == len(params)


def test_the_error_of_a_rule_is_its_own():
    @leafwise(writes=("update",))
    def picky(update):
        if update.dim() == 2:
            raise ZeroDivisionError("no matrices")
        return dict(update=update)

    params, opt = matrices(), fuse(then_step(picky))
    with pytest.raises(ZeroDivisionError, match="no matrices"):
        opt(params, params, opt.init(params))


OF_MATRICES = {
    "muon": fs.muon(bfloat16=False),
    "muon_bfloat16": fs.muon(),
    "normuon": fs.normuon(),
    "adamuon": fs.adamuon(),
    "shampoo": fs.shampoo(every=2),
    "soap": fs.soap(every=2),
}


@donating
@pytest.mark.parametrize("name", OF_MATRICES)
def test_the_catalogues_matrix_rules_run_in_batches(name, donate, monkeypatch):
    """Nothing that they do keeps torch.vmap from mapping over leaves of one shape."""
    alone = []
    one_by_one = batches._one_by_one

    def seen(call, leaves, group, columns, of_tree, places):
        alone.append(len(places))
        return one_by_one(call, leaves, group, columns, of_tree, places)

    monkeypatch.setattr(batches, "_one_by_one", seen)
    opt, params = OF_MATRICES[name], matrices()
    fused, state = fuse(opt, donate=donate), opt.init(params)
    for seed in range(4):  # without the exact roots of check_steps, which nothing maps over
        grads = {key: draw(tuple(leaf.shape), leaf.dtype, seed) for key, leaf in params.items()}
        before = copy_of((params, state))
        expected = opt(*copy_of((params,)), grads, before[1])
        params, state = fused(params, grads, state)
        assert_near((params, state), expected, before, more=REDUCING)
    assert set(alone) == {1}  # the vector and the number, of which there is one each


@pytest.mark.parametrize(("name", "function"), [("shampoo", "eigh"), ("soap", "qr")])
def test_what_is_not_due_is_not_computed_in_batches_either(name, function, monkeypatch):
    opt, params = fuse(OF_MATRICES[name]), matrices()
    calls, real = [], getattr(torch.linalg, function)
    monkeypatch.setattr(
        torch.linalg, function, lambda *given: (calls.append(given[0].shape), real(*given))[1]
    )
    state, often = opt.init(params), []
    for _ in range(6):
        calls.clear()
        params, state = opt(params, params, state)
        often.append(len(calls))
    sides = 4  # two of each of two shapes
    expected = [sides, 0] * 3 if name == "shampoo" else [0, 0, sides, 0, sides, 0]
    assert often == expected
