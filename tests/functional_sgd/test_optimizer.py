"""The contract of an optimizer: what every one says of itself, and what holds for one's own."""

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch

import functional_sgd as fs
from functional_sgd import (
    Optimizer,
    accumulate,
    adamw,
    average_of,
    average_params,
    chain,
    clip_norm,
    freeze,
    lookahead,
    momentum,
    partition,
    sam,
    schedule_free_sgd,
    scheduled,
    sgd,
    skip_nonfinite,
    to_torch,
    torch_optimizer,
)
from tests.catalogue import OPTIMIZERS, halves, random_like, run, sample_tree
from tests.comparing import assert_close, assert_same

MADE: dict[str, Callable[[], Optimizer]] = {
    **OPTIMIZERS,
    "rules in front": lambda: chain(clip_norm, halves(), max_norm=0.5),
    "rules after": lambda: lookahead(halves(), sync_every=2),
    "torch_optimizer": lambda: torch_optimizer(torch.optim.NAdam, lr=0.01),
}
PARAMS = sample_tree()


@pytest.fixture(params=MADE)
def opt(request: pytest.FixtureRequest) -> Optimizer:
    return MADE[request.param]()


def test_names_are_hypers_and_what_is_required(opt: Optimizer) -> None:
    assert opt.names >= {*opt.hyper, *opt.required}
    assert not {*opt.hyper} & {*opt.required}


def test_around_the_same_optimizers_it_is_the_same(opt: Optimizer) -> None:
    assert repr(opt.with_inner(opt.inner)) == repr(opt)
    assert all(isinstance(one, Optimizer) for one in opt.inner)


def test_none_of_them_overwrites_its_arguments(opt: Optimizer) -> None:
    assert not opt.donates


def test_where_it_does_not_perturb_the_gradient_is_taken_at_the_params(opt: Optimizer) -> None:
    moved = opt.perturb(PARAMS, random_like(PARAMS, 0), opt.init(PARAMS))
    same = all(map(torch.equal, optree.tree_leaves(moved), optree.tree_leaves(PARAMS)))
    assert same == (not opt.perturbs)


def test_where_it_does_not_average_the_params_are_evaluated(opt: Optimizer) -> None:
    params, state = run(opt, PARAMS, steps=6)
    found = opt.evaluated(params, state)
    same = all(map(torch.equal, optree.tree_leaves(found), optree.tree_leaves(params)))
    assert same == (not opt.averages)


def test_what_is_evaluated_is_built_like_the_params(opt: Optimizer) -> None:
    params = sample_tree(dtype=torch.bfloat16)
    assert_close(opt.evaluated(params, opt.init(params)), params)


def test_a_leaf_that_joins_is_a_leaf_that_had_no_gradient(opt: Optimizer) -> None:
    """Three steps with some leaves; then all of them, in a state that has been extended."""
    some = {name: PARAMS[name] for name in ("body", "ends")}
    alone, state = some, opt.init(some)
    together, expected = PARAMS, opt.init(PARAMS)
    for seed in range(3):
        grads = random_like(PARAMS, seed)
        alone, state = opt(alone, {name: grads[name] for name in some}, state)
        idle = {**grads, "conv": optree.tree_map(lambda leaf: None, grads["conv"])}
        together, expected = opt(together, idle, expected)
    joined = {**alone, "conv": PARAMS["conv"]}
    state = opt.extend(state, alone, joined)
    for seed in range(3, 6):
        grads = random_like(PARAMS, seed)
        joined, state = opt(joined, grads, state)
        together, expected = opt(together, grads, expected)
    assert_same((joined, state), (together, expected))


def test_extending_by_nothing_changes_nothing(opt: Optimizer) -> None:
    params, state = run(opt, PARAMS, steps=2)
    assert_same(opt.extend(state, params, params), state)


def test_leaves_go_on_by_path_whatever_their_place_is() -> None:
    """Numbers as names: "10" stands before "2"."""
    twelve = {str(number): torch.full((1,), float(number)) for number in range(12)}
    nine = {name: twelve[name] for name in map(str, range(9))}
    opt = adamw(lr=0.1)
    _, state = opt(nine, nine, opt.init(nine))
    grown = opt.extend(state, nine, twelve)
    assert dict(zip(sorted(twelve), grown["step"].tolist(), strict=True)) == {
        name: int(name in nine) for name in twelve
    }
    assert all(grown["grad_avg"][name] is state["grad_avg"][name] for name in nine)


# Where the gradient is to be taken.

SHARP = sam(sgd(lr=0.1), rho=0.5)
GRADS = random_like(PARAMS, 1)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda opt: scheduled(opt, lr=lambda calls: 0.1),
        lambda opt: accumulate(opt, 2),
        average_params,
        skip_nonfinite,
        lookahead,
        lambda opt: chain(clip_norm, opt),
        lambda opt: partition({"all": opt}, {"*": "all"}),
    ],
    ids=["scheduled", "accumulate", "average", "skip", "lookahead", "front", "partition"],
)
def test_what_is_around_an_optimizer_that_perturbs_does_so_too(wrap: Any) -> None:
    around = wrap(SHARP)
    assert around.perturbs
    moved = around.perturb(PARAMS, GRADS, around.init(PARAMS))
    assert_same(moved, SHARP.perturb(PARAMS, GRADS))


def test_each_part_perturbs_its_own_leaves() -> None:
    opt = partition({"sharp": SHARP, "plain": sgd()}, {"conv": "sharp", "*": "plain"})
    moved = opt.perturb(PARAMS, GRADS, opt.init(PARAMS))
    alone = SHARP.perturb({"conv": PARAMS["conv"]}, {"conv": GRADS["conv"]})
    assert_same(moved, {**PARAMS, **alone})


def test_how_far_it_perturbs_is_a_hyper_that_may_be_scheduled() -> None:
    opt = scheduled(SHARP, rho=lambda calls: 0.25 * calls)
    state = {**opt.init(PARAMS), "calls": torch.tensor(4)}
    moved = opt.perturb(PARAMS, GRADS, state)
    assert_close(moved, sam(sgd(), rho=1.0).perturb(PARAMS, GRADS), rtol=1e-6, atol=1e-7)


# What is to be evaluated.


@pytest.mark.parametrize(
    "wrap",
    [
        lambda opt: scheduled(opt, lr=lambda calls: 0.1),
        lambda opt: accumulate(opt, 1),
        skip_nonfinite,
        sam,
        lambda opt: chain(clip_norm, opt, max_norm=1e6),
        lambda opt: partition({"all": opt}, lambda path, leaf: "all"),
    ],
    ids=["scheduled", "accumulate", "skip", "sam", "front", "partition"],
)
@pytest.mark.parametrize("inner", [average_params(sgd(lr=0.1)), schedule_free_sgd(lr=0.1)], ids=str)
def test_what_is_around_an_optimizer_that_averages_does_so_too(inner: Any, wrap: Any) -> None:
    around, params = wrap(inner), torch.ones(3, dtype=torch.float64)
    after, state = run(around, params, steps=3)
    assert around.averages
    expected = inner.evaluated(*run(inner, params, steps=3))
    assert_close(around.evaluated(after, state), expected, rtol=1e-14)
    assert not torch.equal(expected, after)


def test_each_part_says_what_of_it_is_evaluated() -> None:
    opt = partition({"mean": average_params(sgd(lr=0.1)), "plain": sgd(lr=0.1)},
                    {"conv": "mean", "*": "plain"})  # fmt: skip
    params, state = run(opt, PARAMS, steps=3)
    average = average_of(state["parts"]["mean"])
    assert_same(opt.evaluated(params, state), {**params, "conv": average["conv"]})


def test_the_average_of_averages_is_the_outer_one() -> None:
    opt = average_params(schedule_free_sgd(lr=0.1), decay=0.5)
    params, state = run(opt, PARAMS, steps=3)
    assert_same(opt.evaluated(params, state), state["average"])


# Which can be followed by a compiler.


def test_one_that_works_in_place_cannot_be_traced_and_nothing_around_it_can() -> None:
    in_place = torch_optimizer(torch.optim.NAdam)
    for opt in (
        in_place,
        average_params(in_place),
        partition({"x": in_place, "y": sgd()}, "x"),
        chain(clip_norm, in_place),
    ):
        assert not opt.traceable
    assert all(OPTIMIZERS[name]().traceable for name in OPTIMIZERS)


# One of one's own.


class SignDescent(Optimizer):
    """Steps of equal size, with a count."""

    @property
    def hyper(self) -> dict[str, Any]:
        return {"lr": 0.5}

    def init(self, params: Any) -> Any:
        return {"count": optree.tree_map(lambda leaf: torch.zeros(()), params)}

    def __call__(
        self, params: Any, grads: Any, state: Any, hyper: Any = None, **extras: Any
    ) -> tuple[Any, Any]:
        lr = {**self.hyper, **(hyper or {}), **extras}["lr"]

        def move(param: Any, grad: Any) -> Any:
            return param if grad is None else param - lr * grad.sign()

        def more(count: Any, grad: Any) -> Any:
            return count + (grad is not None)

        return (
            optree.tree_map(move, params, grads, none_is_leaf=True),
            {"count": optree.tree_map(more, state["count"], grads, none_is_leaf=True)},
        )


ONE = {"a": torch.tensor([1.0]), "b": torch.tensor([-2.0])}


def test_the_defaults_of_the_contract() -> None:
    opt = SignDescent()
    assert (opt.required, opt.names, opt.inner) == ((), frozenset({"lr"}), ())
    assert (opt.donates, opt.traceable, opt.perturbs, opt.averages) == (False, True, False, False)
    assert opt.with_inner(()) is opt
    assert opt.perturb(ONE, ONE, {}) is ONE
    assert opt.evaluated(ONE, {}) is ONE


@pytest.mark.parametrize(
    "wrap",
    [
        average_params,
        skip_nonfinite,
        sam,
        lookahead,
        lambda opt: accumulate(opt, 1),
        lambda opt: chain(fs.clip_value, opt),
        lambda opt: freeze(opt, []),
        lambda opt: scheduled(opt, lr=lambda calls: 0.5 + calls),
    ],
    ids=["average", "skip", "sam", "lookahead", "accumulate", "front", "freeze", "scheduled"],
)
def test_wrappers_go_around_it(wrap: Any) -> None:
    opt = wrap(SignDescent())
    after, _ = opt(ONE, ONE, opt.init(ONE))
    assert_same(after, {"a": torch.tensor([0.5]), "b": torch.tensor([-1.5])})


def test_it_can_be_fused_as_it_is_and_be_one_of_torchs() -> None:
    opt, weight = SignDescent(), torch.nn.Parameter(torch.ones(1))
    assert fs.fuse(opt)(ONE, ONE, opt.init(ONE))[0]["a"] == 0.5
    weight.grad = torch.ones(1)
    to_torch(opt, [weight], lr=0.25).step()
    assert_same(weight.detach(), torch.tensor([0.75]))


def test_its_state_is_extended_by_path() -> None:
    opt, one = SignDescent(), {"a": ONE["a"]}
    _, state = opt(one, one, opt.init(one))
    grown = opt.extend(state, one, ONE)
    assert_same(grown, {"count": {"a": torch.tensor(1.0), "b": torch.tensor(0.0)}})


def test_a_class_that_lacks_a_part_of_the_contract_cannot_be_made() -> None:
    class Unfinished(Optimizer):
        def init(self, params: Any) -> Any:
            return {}

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()  # type: ignore[abstract]


@pytest.mark.parametrize("wrong", [adamw, Optimizer, None, momentum().rules[0], lambda *a: a])
@pytest.mark.parametrize("wrap", [average_params, sam, skip_nonfinite, lambda o: to_torch(o, [])])
def test_what_is_no_optimizer_is_refused(wrap: Any, wrong: Any) -> None:
    with pytest.raises(TypeError, match="expected an optimizer such as adamw.*inherits from"):
        wrap(wrong)


class Around(Optimizer):
    """A wrapper of one's own that does not say how its state is extended."""

    hyper = {}  # noqa: RUF012

    def init(self, params: Any) -> Any:
        return {"of adamw": adamw().init(params)}

    def __call__(
        self, params: Any, grads: Any, state: Any, hyper: Any = None, **extras: Any
    ) -> tuple[Any, Any]:
        return params, state


def test_a_state_that_cannot_be_extended_by_path_is_an_error() -> None:
    opt, one, two = Around(), {"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}
    with pytest.raises(ValueError, match=r"state\['of adamw'\].*define extend"):
        opt.extend(opt.init(one), one, two)


def test_leaves_whose_dotted_names_are_one_go_on_as_themselves() -> None:
    opt, before = fs.momentum(lr=1.0), {"a": {"b": torch.ones(1)}}
    _, state = opt(before, before, opt.init(before))
    grown = opt.extend(state, before, {**before, "a.b": torch.ones(2)})
    assert_same(grown["step"], torch.tensor([1, 0]))
    assert_same(grown["grad_avg"]["a.b"], torch.zeros(2))
    assert_same(grown["grad_avg"]["a"], state["grad_avg"]["a"])
