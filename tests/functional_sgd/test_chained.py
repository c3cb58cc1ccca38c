"""Chains around optimizers that are no chains, and parts: rules that are no optimizer yet."""

import copy
import pickle
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import (
    adamw,
    average_grad,
    average_params,
    average_sqr_grad,
    centralize,
    chain,
    clip_norm,
    clip_value,
    debias,
    elementwise,
    freeze,
    l2_reg,
    lookahead,
    momentum,
    norm,
    part,
    partition,
    scale_by_rms,
    scheduled,
    sgd,
    sgd_step,
    sync_slow_params,
    weight_decay,
)
from tests.catalogue import random_like, run, sample_tree
from tests.comparing import assert_close, assert_same

PARAMS = sample_tree(dtype=torch.float64)
HALVES = partition(
    {"conv": momentum(lr=0.05), "rest": adamw(lr=0.02)}, {"conv": "conv", "*": "rest"}
)
AB = {"a": torch.tensor([1.0]), "b": torch.tensor([1.0])}


def two(**rates: float) -> Any:
    """Plain SGD for a and for b."""
    return partition({name: sgd(lr=lr) for name, lr in rates.items()}, {n: n for n in rates})


# Rules in front.


def test_clipping_in_front_is_clipping_by_hand_and_then_the_optimizer() -> None:
    """By the norm of all parts together: bit for bit, over five steps."""
    opt = chain(clip_norm, HALVES, max_norm=0.5)
    params, state, expected, inner = PARAMS, opt.init(PARAMS), PARAMS, HALVES.init(PARAMS)
    for seed in range(5):
        grads = random_like(PARAMS, seed)
        length = torch.stack([leaf.square().sum() for leaf in optree.tree_leaves(grads)]).sum()
        scale = (0.5 / (length.sqrt() + 1e-6)).clamp(max=1.0)
        clipped = optree.tree_map(lambda leaf, scale=scale: leaf * scale, grads)
        params, state = opt(params, grads, state)
        expected, inner = HALVES(expected, clipped, inner)
    assert_close((params, state["inner"]), (expected, inner), rtol=1e-13, atol=1e-15)


def test_by_hand() -> None:
    """Gradients 3 and 4 are cut from length 5 to 1; rates 1 and 2."""
    opt = chain(clip_norm, two(a=1.0, b=2.0))
    grads = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    after, _ = opt(AB, grads, opt.init(AB))
    assert_close(after, {"a": torch.tensor([0.4]), "b": torch.tensor([-0.6])}, rtol=1e-6)


def test_inside_a_part_it_clips_by_the_norm_of_that_part() -> None:
    opt = partition({"a": chain(clip_norm, sgd(lr=1.0)), "b": sgd(lr=1.0)}, {"a": "a", "b": "b"})
    grads = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    after, _ = opt(AB, grads, opt.init(AB))
    assert_close(after, {"a": torch.tensor([0.0]), "b": torch.tensor([-3.0])}, atol=1e-6)


def test_the_optimizer_gets_the_update_if_a_rule_writes_one() -> None:
    """Averages 0.5 and then 1.25 of 1 and 2, which SGD follows."""
    opt, params = chain(average_grad, two(a=1.0, b=1.0), mom=0.5), {"a": 0 * AB["a"], "b": AB["b"]}
    state = opt.init(params)
    for grad in (1.0, 2.0):
        params, state = opt(params, dict.fromkeys(params, torch.tensor([grad])), state)
    assert_same(params, {"a": torch.tensor([-1.75]), "b": torch.tensor([-0.75])})


def test_it_gets_the_params_that_the_rules_have_made() -> None:
    """Decay to 0.75 first, as adamw does."""
    opt = chain(weight_decay, two(a=0.5, b=0.5), wd=0.5, lr=0.5)
    zeros = {name: 0 * leaf for name, leaf in AB.items()}
    assert_same(opt(AB, zeros, opt.init(AB))[0], {n: torch.tensor([0.75]) for n in AB})


def test_rules_in_front_see_params_and_gradients() -> None:
    opt = chain(l2_reg, two(a=1.0, b=1.0), wd=0.5)
    zeros = {name: 0 * leaf for name, leaf in AB.items()}
    assert_same(opt(AB, zeros, opt.init(AB))[0], {n: torch.tensor([0.5]) for n in AB})


def test_a_leaf_without_gradient_is_left_alone() -> None:
    opt = chain(l2_reg, clip_norm, two(a=1.0, b=1.0), wd=0.5, max_norm=100.0)
    after, state = opt(AB, {"a": None, "b": AB["b"]}, opt.init(AB))
    assert after["a"] is AB["a"]
    assert_same(state["front"]["step"], torch.tensor([0, 1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_updates_are_rounded_by_the_optimizer_alone(dtype: torch.dtype) -> None:
    """A rule in front hands float32 on, so that the params are rounded once."""
    params = sample_tree(dtype=dtype)
    around = chain(clip_norm, partition({"all": sgd(lr=0.1)}, {"*": "all"}), max_norm=0.5)
    assert_close(
        run(around, params, 1)[0], run(chain(clip_norm, sgd(lr=0.1), max_norm=0.5), params, 1)[0]
    )


def test_rules_with_slots_in_front_keep_them_in_front() -> None:
    opt = chain(average_grad, HALVES)
    state = opt.init(PARAMS)
    assert state.keys() == {"calls", "front", "inner", "after"}
    assert state["front"].keys() == {"step", "grad_avg"}
    assert_same(state["inner"], HALVES.init(PARAMS))


def test_calls_are_counted() -> None:
    assert_same(run(chain(clip_norm, HALVES), PARAMS, 3)[1]["calls"], torch.tensor(3))


def test_around_a_chain_it_is_a_chain() -> None:
    assert chain(clip_norm, adamw()) == chain(clip_norm, *adamw().rules, **adamw().given)


# Rules after.


def test_lookahead_of_a_partition_pulls_the_params_of_all_parts() -> None:
    """From 1, two steps of 1 and of 2: slow weights half way, at 0 and -1."""
    opt = lookahead(two(a=1.0, b=2.0), sync_every=2)
    params, state = AB, opt.init(AB)
    for expected in ({"a": 0.0, "b": -1.0}, {"a": 0.0, "b": -1.0}):
        params, state = opt(params, AB, state)
        assert_same(params, {name: torch.tensor([value]) for name, value in expected.items()})
    assert_same(state["after"]["slow_param"], params)


def test_lookahead_of_a_partition_is_a_partition_of_lookaheads() -> None:
    outside = lookahead(HALVES, sync_every=3, slow_step=0.25)
    parts = {label: lookahead(opt, 3, 0.25) for label, opt in HALVES.optimizers.items()}
    inside = partition(parts, HALVES.labels)
    assert_same(run(outside, PARAMS, 7)[0], run(inside, PARAMS, 7)[0])


def test_lookahead_of_a_chain_is_a_longer_chain() -> None:
    assert lookahead(sgd(lr=0.1)).rules == (sgd_step, sync_slow_params)


def test_a_late_leaf_is_pulled_after_as_many_of_its_own_steps() -> None:
    opt = lookahead(two(a=1.0, b=1.0), sync_every=2)
    params, state = AB, opt.init(AB)
    for late in (True, False, False):
        params, state = opt(params, {"a": None if late else AB["a"], "b": AB["b"]}, state)
    assert_same(params, {"a": torch.tensor([0.0]), "b": torch.tensor([-1.0])})


def test_rules_on_both_sides() -> None:
    opt = chain(clip_norm, two(a=1.0, b=2.0), sync_slow_params, max_norm=1e3, sync_every=1)
    assert opt.hyper == {
        "max_norm": 1e3, "a.lr": 1.0, "b.lr": 2.0, "sync_every": 1, "slow_step": 0.5
    }  # fmt: skip
    after, _ = opt(AB, AB, opt.init(AB))
    assert_same(after, {"a": torch.tensor([0.5]), "b": torch.tensor([0.0])})


# Hypers and extras.


def test_hypers_go_to_those_that_read_them() -> None:
    opt = chain(clip_norm, two(a=1.0, b=2.0), max_norm=1e3)
    after, _ = opt(AB, AB, opt.init(AB), {"max_norm": 2**0.5 / 2, "a.lr": 0.5})
    assert_close(after, {"a": torch.tensor([0.75]), "b": torch.tensor([0.0])}, atol=1e-6)


def test_a_hyper_that_several_read_is_one() -> None:
    """lr of the decay in front is that of the optimizer, where that has one for all its parts."""
    opt = chain(weight_decay, two(a=0.5, b=0.5), wd=0.5)
    assert opt.hyper == {"wd": 0.5, "lr": 0.5}
    assert opt.required == ()
    zeros = {name: 0 * leaf for name, leaf in AB.items()}
    assert_same(opt(AB, zeros, opt.init(AB))[0]["a"], torch.tensor([0.75]))
    assert_same(opt(AB, zeros, opt.init(AB), {"lr": 1.0})[0]["a"], torch.tensor([0.5]))


def test_a_default_in_front_does_not_silence_a_schedule_inside() -> None:
    opt = chain(weight_decay, scheduled(two(a=0.0, b=0.0), lr=lambda calls: 0.5), lr=0.25, wd=0.0)
    assert_same(opt(AB, AB, opt.init(AB))[0], {name: torch.tensor([0.5]) for name in AB})


def test_what_nobody_has_a_default_for_is_required() -> None:
    opt = chain(weight_decay, partition({"all": chain(sgd_step)}, {"*": "all"}))
    assert opt.required == ("lr",)
    with pytest.raises(ValueError, match="'lr' has no default"):
        opt(AB, AB, opt.init(AB))


def test_extras_go_to_those_that_read_them() -> None:
    @elementwise
    def by_loss(grad: Tensor, *, value: Tensor) -> dict[str, Tensor]:
        return dict(grad=grad * value)

    for opt in (
        chain(by_loss, two(a=1.0, b=1.0)),
        chain(
            clip_norm, partition({"all": chain(by_loss, sgd(lr=1.0))}, {"*": "all"}), max_norm=9.0
        ),
    ):
        assert opt.required == ("value",)
        after, _ = opt(AB, AB, opt.init(AB), value=torch.tensor(0.25))
        assert_same(after, {name: torch.tensor([0.75]) for name in AB})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: chain(clip_norm, two(a=1.0, b=2.0), lr=0.5),
            r"no rule in front of partition.*, or after it, reads 'lr'\. Give the optimizer its",
        ),
        (
            lambda: chain(two(a=1.0, b=2.0), two(a=1.0, b=2.0)),
            r"are both optimizers that are not chains of rules\. Nest them",
        ),
        (
            lambda: chain(weight_decay, two(a=0.5, b=0.5), lr=0.1),
            r"two of its parts give 'lr' different defaults, 0\.1 and 0\.5\. Decide with",
        ),
        (
            lambda: chain(scale_by_rms, two(a=0.5, b=0.5)),
            r"scale_by_rms reads 'sqr_avg', .* Put .*average_sqr_grad.* before it",
        ),
        (lambda: chain(clip_norm, two(a=1.0, b=2.0), clip_value), r"no rule writes 'param'"),
        (lambda: chain(clip_norm, two(a=1.0, b=2.0), max_norm=-1.0), r"'max_norm' must be above 0"),
    ],
    ids=["hyper", "two", "defaults", "column", "after", "range"],
)
def test_what_does_not_fit_is_refused_when_it_is_built(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("hyper", "message"),
    [({"wd": 0.1}, r"chain: no rule reads 'wd'"), ({"max_norm": 0.0}, r"'max_norm' must be above")],
    ids=["unknown", "range"],
)
def test_what_does_not_fit_is_refused_at_the_call(hyper: Any, message: str) -> None:
    opt = chain(clip_norm, two(a=1.0, b=2.0))
    with pytest.raises(ValueError, match=message):
        opt(AB, AB, opt.init(AB), hyper)


def test_a_state_of_another_optimizer_is_refused() -> None:
    opt = chain(clip_norm, HALVES)
    with pytest.raises(ValueError, match="chain: state has no 'front'"):
        opt(PARAMS, PARAMS, HALVES.init(PARAMS))


# As values.


def test_it_prints_as_the_call_that_makes_it() -> None:
    inner = average_params(sgd(lr=0.1))
    opt = chain(clip_norm, inner, sync_slow_params, max_norm=0.5, sync_every=2)
    assert repr(opt) == (
        f"chain(clip_norm, {inner!r}, sync_slow_params, max_norm=0.5, sync_every=2)"
    )


def test_equal_ones_are_equal_and_can_be_copied() -> None:
    def make(max_norm: float) -> Any:
        return chain(clip_norm, average_params(sgd()), max_norm=max_norm)

    assert make(0.5) == make(0.5) != make(0.25)
    assert hash(make(0.5)) == hash(make(0.5))
    assert copy.deepcopy(make(0.5)) == pickle.loads(pickle.dumps(make(0.5))) == make(0.5)


def test_they_nest() -> None:
    """Outer rules first."""
    opt = chain(clip_norm, chain(centralize, freeze(sgd(lr=1.0), [])), max_norm=1e6)
    params = torch.zeros(1, 2, dtype=torch.float64)
    grads = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    after, _ = opt({"w": params}, {"w": grads}, opt.init({"w": params}))
    assert_same(after["w"], torch.tensor([[1.0, -1.0]], dtype=torch.float64))


def test_a_rule_around_an_average_does_not_hide_it() -> None:
    opt = chain(clip_norm, average_params(sgd(lr=0.1), decay=0.5))
    params, state = run(opt, PARAMS, 3)
    assert_same(fs.average_of(state), state["inner"]["average"])
    assert_same(opt.evaluated(params, state), state["inner"]["average"])


@pytest.mark.usefixtures("fresh_compiler")
def test_it_compiles_and_maps() -> None:
    opt = chain(clip_norm, two(a=1.0, b=2.0), max_norm=0.5)
    state = opt.init(AB)
    fast = torch.compile(opt, fullgraph=True, backend="eager")
    assert_same(fast(AB, AB, state), opt(AB, AB, state))
    stacked = optree.tree_map(lambda leaf: torch.stack([leaf, 2 * leaf]), (AB, AB))
    states = optree.tree_map(lambda leaf: torch.stack([leaf, leaf]), state)
    after, _ = torch.func.vmap(opt)(*stacked, states)
    expected, _ = opt(*optree.tree_map(lambda leaf: leaf[1], stacked), state)
    assert_close(optree.tree_map(lambda leaf: leaf[1], after), expected, rtol=1e-6)


def test_a_number_of_the_tree_is_that_of_all_parts() -> None:
    @elementwise(longest=0.0)
    def keeps(
        grad: Tensor, *, longest: Tensor, length: Tensor = norm("grad", over="tree")
    ) -> dict[str, Tensor]:
        return dict(longest=torch.maximum(longest, length), grad=grad)

    opt = chain(keeps, two(a=1.0, b=1.0))
    grads = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    _, state = opt(AB, grads, opt.init(AB))
    assert_same(state["front"]["longest"], torch.tensor(5.0, dtype=torch.float64))


# Parts.


ADAPTIVE = part(average_grad, average_sqr_grad, debias, scale_by_rms, eps=1e-6)


def test_a_part_is_its_rules_and_defaults_in_a_chain() -> None:
    assert chain(ADAPTIVE, sgd_step, lr=0.1) == chain(
        average_grad, average_sqr_grad, debias, scale_by_rms, sgd_step, eps=1e-6, lr=0.1
    )


def test_parts_are_made_of_parts() -> None:
    assert part(weight_decay, ADAPTIVE, eps=1e-3).given == {"eps": 1e-3}
    assert part(weight_decay, ADAPTIVE).rules == (weight_decay, *ADAPTIVE.rules)


def test_a_part_is_no_optimizer() -> None:
    assert not isinstance(ADAPTIVE, fs.Optimizer)
    with pytest.raises(TypeError, match="expected an optimizer such as adamw"):
        fs.average_params(ADAPTIVE)  # type: ignore[arg-type]


def test_a_part_is_checked_where_it_is_used() -> None:
    """Its rules may need what comes before, and be without a step."""
    half = part(scale_by_rms)
    with pytest.raises(ValueError, match="scale_by_rms reads 'sqr_avg'"):
        chain(half, sgd_step)
    assert len(chain(average_sqr_grad, half, sgd_step).rules) == 3


def test_parts_are_equal_when_rules_and_defaults_are() -> None:
    assert part(clip_norm, max_norm=2.0) == part(clip_norm, max_norm=2.0) != part(clip_norm)


def test_a_part_prints_as_the_call_that_makes_it() -> None:
    assert repr(part(clip_norm, max_norm=2.0)) == "part(clip_norm, max_norm=2.0)"


def test_a_part_stands_in_front_of_an_optimizer() -> None:
    opt = chain(part(clip_norm, max_norm=2.0), partition({"all": sgd()}, {"*": "all"}))
    assert opt.hyper["max_norm"] == 2.0


def test_two_parts_that_disagree_are_decided_by_the_chain() -> None:
    one, other = part(clip_norm, max_norm=1.0), part(fs.clip_value, max_norm=2.0)
    with pytest.raises(ValueError, match="two of its parts give 'max_norm' different defaults"):
        chain(one, other, sgd_step)


@pytest.mark.parametrize("wrong", [fs.adam, None, "clip_norm", partition({"a": sgd()}, "a")])
def test_a_part_is_made_of_rules(wrong: Any) -> None:
    with pytest.raises(TypeError, match="expected rules, chains or an optimizer, got"):
        part(wrong)


@elementwise(evaluate="average", average=torch.clone)
def halve_and_average(param: Tensor, average: Tensor) -> dict[str, Tensor]:
    return dict(param=param / 2, average=(average + param) / 2)


def test_what_a_rule_after_an_optimizer_keeps_is_evaluated() -> None:
    """Frozen at 1, so the average is 1, and the param is halved."""
    opt, params = chain(freeze(sgd(lr=1.0), "a"), halve_and_average), {"a": torch.ones(1)}
    moved, state = opt(params, params, opt.init(params))
    assert opt.averages
    assert_same((moved, opt.evaluated(moved, state)), ({"a": torch.tensor([0.5])}, params))
