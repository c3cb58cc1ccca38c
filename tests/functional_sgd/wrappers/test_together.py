"""What holds for all wrappers: they can be fused, compared, copied, and put around each other."""

import copy
import pickle
from typing import Any

import pytest
import torch

import functional_sgd as fs
from functional_sgd import Chain, Optimizer, adamw, fuse, sgd
from functional_sgd.chained import Front
from functional_sgd.fusion.fused import Fused
from tests.catalogue import WRAPPED, by_size, halves, is_matrix, random_like, run, sample_tree
from tests.comparing import assert_close, assert_same, copy_of


@pytest.fixture(params=WRAPPED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def chains_in(opt: Optimizer) -> list[Any]:
    """The innermost optimizers."""
    return [one for inner in opt.inner for one in chains_in(inner)] or [opt]


def test_they_are_optimizers(name: str) -> None:
    assert isinstance(WRAPPED[name](), Optimizer)


def test_fuse_reaches_every_chain_inside(name: str) -> None:
    plain, fused = WRAPPED[name](), fuse(WRAPPED[name]())
    assert type(fused) is (Fused if isinstance(plain, Chain) else type(plain))
    assert {type(opt) for opt in chains_in(plain)} - {Front} == {Chain}
    assert {type(opt) for opt in chains_in(fused)} == {Fused}
    assert fused.hyper == plain.hyper


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fused_wrappers_go_where_plain_ones_go(name: str, dtype: torch.dtype) -> None:
    """Params within some roundings of their dtype; the state, which is wider, of float32's."""
    params = sample_tree(dtype=dtype)
    (fused, state), (plain, expected) = (
        run(opt, params, 5) for opt in (fuse(WRAPPED[name]()), WRAPPED[name]())
    )
    eps = torch.finfo(dtype).eps
    assert_close(fused, plain, rtol=16 * eps, atol=16 * eps)
    assert_close(state, expected, rtol=64 * eps, atol=64 * eps)


DONATING = {
    "average_params": lambda: fs.average_params(adamw(lr=0.1)),
    "freeze": lambda: fs.freeze(adamw(lr=0.1), is_matrix),
    "partition": halves,
    "scheduled": lambda: fs.scheduled(adamw(), lr=lambda step: 0.1 / (step + 1)),
}


@pytest.mark.parametrize("wrapper", DONATING)
def test_wrappers_that_read_nothing_twice_may_donate(wrapper: str) -> None:
    opt = DONATING[wrapper]()
    expected, _ = run(opt, sample_tree(), 4)
    fused = fuse(opt, donate=True, debug=True)
    assert fused.donates
    after, _ = run(fused, copy_of(sample_tree()), 4)
    assert_close(after, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make", [lambda opt: fs.accumulate(opt, 2), fs.skip_nonfinite], ids=["accumulate", "skip"]
)
def test_wrappers_that_need_the_old_values_refuse_an_optimizer_that_overwrites_them(
    make: Any,
) -> None:
    inner = fs.partition({"large": fuse(sgd(), donate=True), "small": sgd()}, by_size)
    for opt in (fuse(sgd(), donate=True), inner, fs.average_params(inner)):
        with pytest.raises(
            ValueError, match="needs params and state as they were, .*Fuse it without donate"
        ):
            make(opt)
    with pytest.raises(ValueError, match="Fuse it without donate"):
        fuse(make(sgd()), donate=True)


WITHOUT_LAMBDAS = [name for name, make in WRAPPED.items() if "lambda" not in repr(make())]


@pytest.mark.parametrize("name", WITHOUT_LAMBDAS)
def test_equal_wrappers_are_equal_and_hash_equal(name: str) -> None:
    one, other = WRAPPED[name](), WRAPPED[name]()
    assert one == other
    assert hash(one) == hash(other)
    assert copy.deepcopy(one) == one


@pytest.mark.parametrize("name", WITHOUT_LAMBDAS)
def test_wrappers_can_be_pickled(name: str) -> None:
    opt = WRAPPED[name]()
    assert pickle.loads(pickle.dumps(opt)) == opt


@pytest.mark.parametrize(
    "make", [lambda opt: fs.accumulate(opt, 2), fs.skip_nonfinite, fs.average_params]
)
@pytest.mark.parametrize("opt", [adamw, 3, Chain], ids=["recipe", "number", "class"])
def test_what_is_no_optimizer_is_an_error(make: Any, opt: Any) -> None:
    with pytest.raises(TypeError, match="expected an optimizer such as adamw\\(\\), got"):
        make(opt)


def test_unknown_and_doubled_hypers_are_errors(name: str) -> None:
    opt, params = WRAPPED[name](), sample_tree()
    state = opt.init(params)
    with pytest.raises(ValueError, match="no rule reads 'wdd'"):
        opt(params, params, state, {"wdd": 1.0})
    with pytest.raises(
        ValueError, match="'lr' is given both in hyper and by keyword. Give it once"
    ):
        opt(params, params, state, {"lr": 1.0}, lr=1.0)
    with pytest.raises(TypeError, match="hyper must be a dict such as dict\\(lr=0.1\\), got float"):
        opt(params, params, state, 0.1)


def test_a_state_of_another_optimizer_is_an_error(name: str) -> None:
    opt, params = WRAPPED[name](), sample_tree()
    with pytest.raises(ValueError, match="state"):
        opt(params, params, sgd().init(params))


def test_gradients_that_do_not_fit_are_errors(name: str) -> None:
    opt, params = WRAPPED[name](), sample_tree()
    with pytest.raises(ValueError, match="'ends.1' is missing|'ends.0' is missing"):
        opt(params, {**params, "ends": ()}, opt.init(params))
    wrong = {**random_like(params, 0), "conv": torch.ones(2)}
    with pytest.raises(ValueError, match="the gradient of 'conv' must have its shape"):
        opt(params, wrong, opt.init(params))


def test_the_order_of_wrappers_is_that_of_what_they_do() -> None:
    """A NaN in one of two pieces: skipped alone inside, or never gathered outside."""
    bad, good = torch.tensor([float("nan")]), torch.tensor([2.0])
    ends = []
    for opt in (
        fs.skip_nonfinite(fs.accumulate(sgd(lr=1.0), 2)),
        fs.accumulate(fs.skip_nonfinite(sgd(lr=1.0)), 2),
    ):
        params = torch.zeros(1)
        state = opt.init(params)
        for grad in (good, bad, good):
            params, state = opt(params, grad, state)
        ends.append(float(params))
    assert_same(ends, [-2.0, 0.0])
