"""lazy_rows: rows without a gradient stay as they are, and so do their slots."""

from typing import Any

import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import chain, fuse, lazy_rows
from tests.comparing import assert_close, assert_same

T = torch.tensor


def table(rows: int = 4) -> Any:
    return {"words": torch.arange(3.0 * rows).reshape(rows, 3), "bias": torch.ones(2)}


def grads(*rows: int) -> Any:
    """Ones for these rows of four, and for the first of two biases."""
    words = torch.zeros(4, 3)
    words[[*rows]] = 1.0
    return {"words": words, "bias": T([1.0, 0.0])}


def test_rows_without_a_gradient_stay_where_they_are() -> None:
    """Their momentum does not move them, and weight decay does not pull at them."""
    opt, params = lazy_rows(fs.adamw(lr=0.1, wd=0.5)), table()
    after, state = opt(params, grads(0, 1), opt.init(params))
    later, later_state = opt(after, grads(1, 3), state)
    for row in (0, 2):
        assert_same(later["words"][row], after["words"][row])
        for slot in ("grad_avg", "sqr_avg"):
            found, before = (one["inner"][slot]["words"][row] for one in (later_state, state))
            assert_same(found, before)
    assert (later["words"][[1, 3]] != after["words"][[1, 3]]).all()
    assert_same(later["bias"][1], T(1.0))
    assert_same(later_state["inner"]["step"], T([2, 2]))


def test_where_all_rows_have_a_gradient_it_is_the_optimizer() -> None:
    opt, params = fs.adam(lr=0.1), {"words": table()["words"]}
    given = {"words": torch.ones(4, 3)}
    found, state = lazy_rows(opt)(params, given, lazy_rows(opt).init(params))
    assert_same((found, state["inner"]), opt(params, given, opt.init(params)))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_sparse_gradients_are_dense_ones_with_rows_of_zeros(layout: torch.layout) -> None:
    opt, params = lazy_rows(fs.adam(lr=0.1)), {"words": table()["words"]}
    dense = grads(0, 2)["words"]
    sparse = dense.to_sparse(1) if layout == torch.sparse_coo else dense.to_sparse_csr()
    state = opt.init(params)
    assert_same(
        opt(params, {"words": sparse}, state),
        opt(params, {"words": dense}, state),
    )


def test_a_row_that_is_named_twice_gets_the_sum() -> None:
    opt, params = lazy_rows(fs.sgd(lr=1.0)), torch.zeros(3, 1)
    twice = torch.sparse_coo_tensor(T([[1, 1]]), T([[2.0], [3.0]]), (3, 1), check_invariants=True)
    assert_same(opt(params, twice, opt.init(params))[0], T([[0.0], [-5.0], [0.0]]))


def test_a_row_that_is_named_counts_even_if_it_is_zero() -> None:
    """As in torch: its momentum moves it on."""
    opt, params = lazy_rows(fs.sgd(lr=1.0, mom=0.5)), torch.zeros(2, 1)
    after, state = opt(params, torch.ones(2, 1), opt.init(params))
    named = torch.sparse_coo_tensor(T([[1]]), T([[0.0]]), (2, 1), check_invariants=True)
    assert_same(opt(after, named, state)[0], T([[-1.0], [-1.5]]))


def test_slots_without_an_entry_for_each_row_are_kept_as_ever() -> None:
    opt, params = lazy_rows(fs.adafactor(lr=0.1)), {"words": table()["words"]}
    state = opt.init(params)
    _, after = opt(params, {"words": grads(1)["words"]}, state)
    rows, columns = (after["inner"][name]["words"] for name in ("rows", "columns"))
    assert_close(rows, T([[0.0], [1.0], [0.0], [0.0]]))
    assert_close(columns, torch.full((1, 3), 0.25))


def test_slots_with_an_entry_for_each_column_are_kept_as_ever_in_a_square_leaf_too() -> None:
    """came: sqr_columns of both columns, the mean of (1, 0) and of (2, 0) squared."""
    opt = lazy_rows(fs.came(lr=0.1, sqr_mom=0.0))
    words = torch.ones(2, 2)
    _, after = opt(words, T([[1.0, 2.0], [0.0, 0.0]]), opt.init(words))
    assert_close(after["inner"]["sqr_columns"], T([0.5, 2.0]))


@pytest.mark.parametrize(
    ("opt", "slot"),
    [
        (fs.soap(every=1), "left"),
        (fs.shampoo(), "left"),
        (fs.kron(), "left"),
        (fs.dion(rank_fraction=0.5), "basis"),
    ],
    ids=["soap", "shampoo", "kron", "dion"],
)
def test_slots_that_mix_rows_are_refused(opt: Any, slot: str) -> None:
    with pytest.raises(ValueError, match=f"lazy_rows: expected rules .*{slot}'.* mixes rows. Give"):
        lazy_rows(opt)


def test_numbers_of_the_tree_are_kept_as_ever() -> None:
    opt, params = lazy_rows(fs.schedule_free_sgd(lr=0.5)), torch.zeros(2, 1)
    _, state = opt(params, T([[1.0], [0.0]]), opt.init(params))
    assert_same(state["inner"]["weight_sum"], T(0.25).double())
    assert_same(state["inner"]["fast"], T([[-0.5], [0.0]]))


def test_one_leaf_alone_may_be_the_tree() -> None:
    opt, params = lazy_rows(fs.momentum(lr=1.0)), torch.ones(1)
    after, state = opt(params, torch.zeros(1), opt.init(params))
    assert_same((after, state["inner"]["step"]), (params, T([1])))


def test_fused_it_does_the_same() -> None:
    opt, params = lazy_rows(fs.adamw(lr=0.1)), table()
    fast, state = fuse(opt), opt.init(params)
    expected = params, state
    for step in range(4):
        params, state = fast(params, grads(step), state)
        expected = opt(expected[0], grads(step), expected[1])
    assert_close((params, state), expected, rtol=1e-6, atol=1e-7)


def test_it_goes_inside_of_other_wrappers() -> None:
    """Rows for the words, plain steps for the rest."""

    def kind(path: str, leaf: Tensor) -> str:
        return path

    opt = fs.partition({"words": lazy_rows(fs.momentum(lr=1.0)), "bias": fs.sgd(lr=1.0)}, kind)
    params = table()
    state = opt.init(params)
    after, state = opt(params, grads(0), state)
    later, _ = opt(after, grads(1), state)
    assert_same(later["words"][0], after["words"][0])


def test_wrappers_inside_are_an_error() -> None:
    with pytest.raises(TypeError, match="lazy_rows: expected a chain of rules, got accumulate"):
        lazy_rows(fs.accumulate(fs.sgd(), every=2))


def test_it_needs_params_as_they_were() -> None:
    with pytest.raises(ValueError, match="lazy_rows: needs params and state as they were"):
        lazy_rows(fuse(fs.sgd(), donate=True))


def test_its_hypers_are_those_of_the_chain() -> None:
    opt = lazy_rows(chain(fs.average_grad, fs.sgd_step))
    assert (opt.hyper, opt.required) == ({"mom": 0.9}, ("lr",))
    assert repr(opt) == "lazy_rows(chain(average_grad, sgd_step))"
    with pytest.raises(ValueError, match="lazy_rows: no rule reads 'eps'"):
        opt(torch.ones(1), torch.ones(1), opt.init(torch.ones(1)), {"eps": 1.0})
