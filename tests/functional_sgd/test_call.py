"""The arguments of a call: columns that the caller gives beside the gradients."""

from typing import Any

import optree
import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import (
    average_grad,
    chain,
    clip_norm,
    elementwise,
    leafwise,
    partition,
    rename,
    sgd,
    sgd_step,
    treewise,
)
from tests.comparing import Untouched, assert_close, assert_same, stack

Columns = dict[str, Any]
TWO = {"a": torch.zeros(2), "b": torch.zeros(())}
ONES = {"a": torch.ones(2), "b": torch.ones(())}


@elementwise
def by_curvature(update: Tensor, hessian: Tensor, *, floor: float = 1.0) -> Columns:
    """As Sophia: the update, divided by the curvature where that is large enough."""
    return dict(update=(update / hessian.clamp(min=floor)).clamp(-1, 1))


SOPHIA = chain(average_grad, by_curvature, sgd_step, lr=1.0, mom=0.5)
CURVED = {"a": torch.tensor([4.0, 0.5]), "b": torch.tensor(2.0)}


def test_a_column_that_no_rule_writes_comes_from_the_caller() -> None:
    """Averages (2, 2) and 4: over 4 and 1 and 2, cut to 1."""
    grads = {"a": torch.tensor([4.0, 4.0]), "b": torch.tensor(2.0)}
    after, _ = SOPHIA(TWO, grads, SOPHIA.init(TWO), hessian=CURVED)
    assert_same(after, {"a": torch.tensor([-0.5, -1.0]), "b": torch.tensor(-0.5)})


def test_such_a_column_is_required_and_no_hyper() -> None:
    assert SOPHIA.required == ("hessian",)
    assert "hessian" in SOPHIA.names
    assert "hessian" not in SOPHIA.hyper


def test_it_comes_from_the_caller_whatever_rules_there_are_elsewhere() -> None:
    """A rule of somebody else that keeps a slot of this name changes nothing."""

    @elementwise(hessian=torch.zeros_like)
    def average_curvature(grad: Tensor, hessian: Tensor) -> Columns:
        return dict(hessian=0.9 * hessian + 0.1 * grad.square())

    assert chain(by_curvature, sgd_step).required == ("lr", "hessian")
    assert chain(average_curvature, by_curvature, sgd_step).required == ("lr",)


def test_it_is_not_kept() -> None:
    _, state = SOPHIA(TWO, ONES, SOPHIA.init(TWO), hessian=CURVED)
    assert state.keys() == {"step", "grad_avg"}


def test_it_is_not_touched() -> None:
    snapshot = Untouched(CURVED)
    SOPHIA(TWO, ONES, SOPHIA.init(TWO), hessian=CURVED)
    snapshot.check()


def test_if_an_earlier_rule_writes_it_the_caller_does_not_give_it() -> None:
    @elementwise
    def estimate(grad: Tensor) -> Columns:
        return dict(hessian=grad.square() + 1)

    opt = chain(estimate, by_curvature, sgd_step, lr=1.0)
    assert opt.required == ()
    with pytest.raises(ValueError, match="no rule reads 'hessian'"):
        opt(TWO, ONES, opt.init(TWO), hessian=CURVED)


def test_where_a_leaf_has_no_gradient_its_column_may_be_none() -> None:
    """Or anything of its shape."""
    grads = {"a": None, "b": ONES["b"]}
    for hessian in ({"a": None, "b": CURVED["b"]}, CURVED):
        after, _ = SOPHIA(TWO, grads, SOPHIA.init(TWO), hessian=hessian)
        assert_same(after, {"a": TWO["a"], "b": torch.tensor(-0.25)})


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({}, r"a rule reads the column 'hessian', which the caller gives: .*It was not given"),
        ({}, r"If it is meant to be a hyper, put it behind a \*.*@elementwise\(hessian=torch.ze"),
        ({"hesian": CURVED}, r"reads the column 'hessian', .*Did you mean 'hesian'\?"),
        ({"hessian": {"a": CURVED["a"]}}, r"expected hessian with .* 'b' is missing"),
        ({"hessian": CURVED["b"]}, r"expected hessian with the structure of params"),
        ({"hessian": 2.0}, r"expected hessian with the structure of params"),
        (
            {"hessian": {**CURVED, "b": None}},
            r"hessian of 'b' is None, but the leaf has a gradient\. Give a tensor of its shape",
        ),
        (
            {"hessian": {**CURVED, "a": torch.ones(3)}},
            r"hessian of 'a' must have its shape \(2,\), got \(3,\)",
        ),
        (
            {"hessian": {**CURVED, "a": torch.ones(())}},
            r"hessian of 'a' must have its shape \(2,\), got \(\)",
        ),
        ({"hessian": {**CURVED, "b": 2.0}}, r"hessian of 'b' must be a tensor, got float"),
        ({"hessian": CURVED, "loss": 1.0}, r"no rule reads 'loss'"),
    ],
    ids=[
        "missing", "what to do", "misspelled", "a leaf less", "a tensor", "a number", "None",
        "longer", "shorter", "no tensor", "one more",
    ],
)  # fmt: skip
def test_a_column_that_does_not_fit_is_refused(extras: Any, message: str) -> None:
    state = SOPHIA.init(TWO)
    snapshot = Untouched(TWO, ONES, state)
    with pytest.raises(ValueError, match=message):
        SOPHIA(TWO, ONES, state, **extras)
    snapshot.check()


def test_real_and_complex_columns_do_not_mix() -> None:
    with pytest.raises(
        TypeError, match="hessian of 'b' is torch.complex64, its leaf torch.float32"
    ):
        SOPHIA(TWO, ONES, SOPHIA.init(TWO), hessian={**CURVED, "b": torch.tensor(1j)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_columns_are_seen_in_the_precision_of_the_rules(dtype: torch.dtype) -> None:
    seen = []

    @elementwise(writes=["update"])
    def look(update: Tensor, extra: Tensor) -> Columns:
        seen.append((update.dtype, extra.dtype, extra.shape))
        return dict(update=update)

    opt, params = chain(look, sgd_step, lr=1.0), torch.ones((), dtype=torch.bfloat16)
    opt(params, params, opt.init(params), extra=torch.ones((), dtype=dtype))
    assert seen == [(torch.float32, torch.float32, (1,))]


def test_a_rule_that_sees_a_whole_leaf_gets_columns() -> None:
    @leafwise
    def by_sum(update: Tensor, hessian: Tensor) -> Columns:
        return dict(update=update / hessian.sum())

    opt = chain(by_sum, sgd_step, lr=1.0)
    after, _ = opt(TWO, ONES, opt.init(TWO), hessian=CURVED)
    assert_close(after, {"a": torch.full((2,), -1 / 4.5), "b": torch.tensor(-0.5)}, rtol=1e-6)


def test_a_rule_that_sees_whole_trees_gets_columns() -> None:
    @treewise
    def by_largest(update: Any, hessian: Any) -> Columns:
        largest = max(leaf.max() for leaf in optree.tree_leaves(hessian))
        return dict(update=optree.tree_map(lambda leaf: leaf / largest, update))

    opt = chain(by_largest, sgd_step, lr=1.0)
    after, _ = opt(TWO, ONES, opt.init(TWO), hessian=CURVED)
    assert_same(after, {"a": torch.tensor([-0.25, -0.25]), "b": torch.tensor(-0.25)})


WRAPPERS: dict[str, Any] = {
    "average_params": fs.average_params,
    "skip_nonfinite": fs.skip_nonfinite,
    "scheduled": lambda opt: fs.scheduled(opt, lr=lambda calls: 1.0),
    "sam": fs.sam,
    "accumulate": lambda opt: fs.accumulate(opt, 1),
    "lookahead": fs.lookahead,
    "lookahead of a wrapper": lambda opt: fs.lookahead(fs.average_params(opt)),
    "partition": lambda opt: partition({"all": opt}, {"*": "all"}),
    "rules in front": lambda opt: chain(clip_norm, fs.average_params(opt), max_norm=100.0),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_ask_for_the_columns_of_what_they_wrap_and_hand_them_on(name: str) -> None:
    opt = WRAPPERS[name](SOPHIA)
    assert opt.required == ("hessian",)
    expected, _ = SOPHIA(TWO, ONES, SOPHIA.init(TWO), hessian=CURVED)
    assert_same(opt(TWO, ONES, opt.init(TWO), hessian=CURVED)[0], expected)


def test_accumulate_uses_the_column_of_the_call_that_acts() -> None:
    opt = fs.accumulate(SOPHIA, 2)
    _, state = opt(TWO, ONES, opt.init(TWO), hessian={"a": torch.ones(2), "b": torch.ones(())})
    after, _ = opt(TWO, ONES, state, hessian=CURVED)
    assert_same(after, SOPHIA(TWO, ONES, SOPHIA.init(TWO), hessian=CURVED)[0])


def test_a_part_of_a_partition_gets_its_part_of_a_column() -> None:
    params = {"body": {"a": TWO["a"], "b": TWO["b"]}, "head": torch.zeros(1)}
    grads = {"body": {"a": ONES["a"], "b": None}, "head": torch.ones(1)}
    opt = partition({"curved": SOPHIA, "plain": sgd(lr=1.0)}, {"body": "curved", "*": "plain"})
    hessian = {"body": {"a": CURVED["a"], "b": None}, "head": None}
    after, _ = opt(params, grads, opt.init(params), hessian=hessian)
    expected = {"a": torch.tensor([-0.125, -0.5]), "b": TWO["b"]}
    assert_same(after, {"body": expected, "head": torch.tensor([-1.0])})


def test_columns_can_be_mapped_over() -> None:
    opt = chain(by_curvature, sgd_step, lr=1.0)
    hessian = stack([CURVED, {"a": torch.tensor([2.0, 8.0]), "b": torch.tensor(1.0)}])
    state = stack([opt.init(TWO)] * 2)
    after, _ = torch.func.vmap(lambda p, g, s, h: opt(p, g, s, hessian=h))(
        stack([TWO] * 2), stack([ONES] * 2), state, hessian
    )
    assert_same(after["b"], torch.tensor([-0.5, -1.0]))


def test_a_column_under_another_name() -> None:
    opt = chain(rename(by_curvature, hessian="bend"), sgd_step, lr=1.0)
    assert opt.required == ("bend",)
    after, _ = opt(TWO, ONES, opt.init(TWO), bend=CURVED)
    assert_same(after["b"], torch.tensor(-0.5))


@pytest.mark.parametrize("make", [fs.adam, lambda: fs.adam(wd=0.1), fs.rmsprop, fs.lamb])
@pytest.mark.parametrize("form", [lambda opt: opt, fs.fuse], ids=["plain", "fused"])
def test_a_sparse_gradient_is_the_dense_one_that_it_stands_for(make: Any, form: Any) -> None:
    """That of an embedding, say; `lazy_rows` gives sparse gradients another meaning."""
    opt, params = form(make()), {"table": torch.arange(8.0).view(4, 2)}
    dense = torch.zeros(4, 2)
    dense[1] = torch.tensor([1.0, -2.0])
    expected = opt(params, {"table": dense}, opt.init(params))
    assert_same(opt(params, {"table": dense.to_sparse(1)}, opt.init(params)), expected)
