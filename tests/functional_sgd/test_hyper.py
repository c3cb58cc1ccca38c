"""Hypers: numbers, 0-d tensors and tree prefixes; names are checked at the call."""

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from functional_sgd import (
    Chain,
    adam,
    adamw,
    by_path,
    chain,
    clip_norm,
    elementwise,
    freeze,
    fuse,
    lookahead,
    momentum,
    sgd,
    sgd_step,
    weight_decay,
)
from functional_sgd.schedules import Cosine
from tests.catalogue import random_like, sample_tree
from tests.comparing import Untouched, assert_close, assert_same
from tests.functional_sgd import user_rules

PARAMS = {
    "body": {"bias": torch.tensor([1.0]), "weight": torch.tensor([2.0, 4.0])},
    "head": torch.tensor([8.0]),
}


def step(opt: Chain, hyper: Any = None, params: Any = PARAMS, **extras: Any) -> Any:
    """New params after one step along gradients of ones."""
    grads = {"body": {"bias": torch.ones(1), "weight": torch.ones(2)}, "head": torch.ones(1)}
    return opt(params, grads, opt.init(params), hyper, **extras)[0]


def moved(bias: float, weight: float, head: float) -> Any:
    """PARAMS, each leaf less by a number."""
    body = {"bias": PARAMS["body"]["bias"] - bias, "weight": PARAMS["body"]["weight"] - weight}
    return {"body": body, "head": PARAMS["head"] - head}


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        torch.tensor(0.5),
        torch.tensor(0.5, dtype=torch.float64),
        np.float32(0.5),
        np.array(0.5),
    ],
    ids=["float", "float32", "float64", "numpy scalar", "numpy 0-d"],
)
def test_kinds_of_numbers(value: Any) -> None:
    assert_same(step(sgd(), {"lr": value}), moved(0.5, 0.5, 0.5))


def test_whole_numbers_are_numbers() -> None:
    assert_same(step(sgd(), {"lr": 2}), moved(2.0, 2.0, 2.0))


def test_a_hyper_at_the_call_wins_over_the_default() -> None:
    assert_same(step(sgd(lr=0.25), {"lr": 0.5}), moved(0.5, 0.5, 0.5))


def test_without_hyper_the_defaults_count() -> None:
    assert_same(step(sgd(lr=0.25)), moved(0.25, 0.25, 0.25))


def test_a_hyper_may_be_given_by_keyword() -> None:
    assert_same(step(sgd(), lr=0.5), moved(0.5, 0.5, 0.5))


def test_a_hyper_never_changes_the_dtype_of_params() -> None:
    after = step(sgd(), {"lr": torch.tensor(0.5, dtype=torch.float64)})
    assert after["head"].dtype == torch.float32


def test_a_value_for_every_leaf() -> None:
    assert_same(
        step(sgd(), {"lr": {"body": {"bias": 1.0, "weight": 2.0}, "head": 0.5}}),
        moved(1.0, 2.0, 0.5),
    )


def test_a_tree_prefix_gives_its_value_to_all_leaves_below() -> None:
    assert_same(
        step(sgd(), {"lr": {"body": 0.5, "head": torch.tensor(0.25)}}), moved(0.5, 0.5, 0.25)
    )


def test_a_tree_prefix_can_be_a_default() -> None:
    assert_same(step(sgd(lr={"body": 0.5, "head": 0.25})), moved(0.5, 0.5, 0.25))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [adamw, momentum, lambda: lookahead(adam(), sync_every=1)])
def test_one_rate_for_each_group_is_one_call_for_each_group(make: Any) -> None:
    opt, params = make(), sample_tree()
    grads, rates = random_like(params, seed=5), {"body": 0.5, "conv": 0.25, "ends": 0.125}
    together, _ = opt(params, grads, opt.init(params), {"lr": rates})
    for group, lr in rates.items():
        alone, _ = opt(params[group], grads[group], opt.init(params[group]), {"lr": lr})
        assert_same(together[group], alone)


def test_two_hypers_can_have_different_prefixes() -> None:
    opt = chain(weight_decay, sgd_step)
    found = step(
        opt,
        {
            "lr": {"body": 0.5, "head": 0.25},
            "wd": {"body": {"bias": 0.0, "weight": 1.0}, "head": 2.0},
        },
    )
    bias, weight, head = 1 - 0.5, torch.tensor([2.0, 4.0]) * 0.5 - 0.5, 8 * 0.5 - 0.25
    assert_same(
        found,
        {"body": {"bias": torch.tensor([bias]), "weight": weight}, "head": torch.tensor([head])},
    )


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"rate": 0.1}, r"no rule reads 'rate'\. Known names: lr, mom"),
        ({"moms": 0.1}, r"no rule reads 'moms'\. Did you mean 'mom'\?"),
        (
            {"lr": torch.tensor([0.1])},
            r"hyper 'lr' must be a number or a 0-d tensor, got a tensor of shape \(1,\)",
        ),
        ({"lr": {"body": 0.1}}, r"'lr' must be a number, .*'head' is not covered.*by_path"),
        (
            {"lr": {"body": 0.1, "head": 0.1, "tail": 0.1}},
            r"'lr' must be .*'tail' is not in params",
        ),
        (
            {"lr": {"body": {"bias": 0.1}, "head": 0.1}},
            r"'lr' must be .*'body\.weight' is not covered",
        ),
        (
            {"lr": {"body": torch.ones(2), "head": 0.1}},
            r"hyper 'lr' must be .*got a tensor of shape \(2,\)",
        ),
        ({"lr": [0.1, 0.2]}, r"'lr' must be a number"),
    ],
    ids=str,
)
def test_a_hyper_that_does_not_fit_is_refused(hyper: dict[str, Any], message: str) -> None:
    snapshot = Untouched(PARAMS)
    with pytest.raises(ValueError, match=message):
        step(momentum(lr=0.1), hyper)
    snapshot.check()


@pytest.mark.parametrize(
    "value", ["fast", None, object(), lambda step: 0.1], ids=["str", "None", "object", "function"]
)
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"'lr' must be a number"):
        step(sgd(), {"lr": value})


@pytest.mark.parametrize("hyper", [0.1, [("lr", 0.1)], torch.tensor(0.1)], ids=str)
def test_hyper_must_be_a_dict(hyper: Any) -> None:
    with pytest.raises(TypeError, match=r"hyper must be a dict such as dict\(lr=0\.1\), got"):
        step(sgd(), hyper)


def test_a_hyper_without_default_must_be_passed() -> None:
    with pytest.raises(
        ValueError,
        match=r"chain\(sgd_step\): 'lr' has no default, so it must be passed: .*dict\(lr=",
    ):
        step(chain(sgd_step))


def test_a_hyper_given_twice_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'lr' is given both in hyper and by keyword\. Give it once"
    ):
        step(sgd(), {"lr": 0.1}, lr=0.1)


def test_an_unknown_extra_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no rule reads 'vale'\. Did you mean 'value'\?"):
        step(chain(user_rules.by_loss, sgd_step, lr=0.1), vale=torch.tensor(1.0))


def test_the_counter_is_no_hyper() -> None:
    with pytest.raises(ValueError, match="no rule reads 'step'"):
        step(adam(), {"step": 3})


def test_a_treewise_rule_needs_one_number() -> None:
    opt = chain(user_rules.scale_tree, sgd_step, lr=0.1)
    with pytest.raises(
        ValueError, match=r"rule scale_tree sees whole trees, so 'factor' must be one number"
    ):
        step(opt, {"factor": {"body": 1.0, "head": 2.0}})


def test_a_rule_with_a_number_of_the_tree_may_have_a_hyper_for_each_leaf() -> None:
    """Four ones have the length 2, so they are scaled to 1 / 2 and 0.5 / 2 each."""
    opt = chain(clip_norm, sgd_step, lr=1.0)
    found = step(opt, {"max_norm": {"body": 1.0, "head": 0.5}})
    assert_close(found, moved(0.5, 0.5, 0.25), rtol=1e-6)


def test_a_hyper_can_be_differentiated() -> None:
    """d (p - lr * g) / d lr = -g."""
    lr = torch.tensor(0.5, requires_grad=True)
    step(sgd(), {"lr": lr})["head"].sum().backward()
    assert_same(lr.grad, torch.tensor(-1.0))


def test_by_path_chooses_by_the_first_pattern_that_matches() -> None:
    found = by_path(PARAMS, {"*.bias": 0.0, "body.*": 1.0, "*": 2.0})
    assert found == {"body": {"bias": 0.0, "weight": 1.0}, "head": 2.0}


def test_by_path_names_entries_of_lists_by_number() -> None:
    params = {"layers": [torch.ones(1), torch.ones(1), (torch.ones(1),)]}
    assert by_path(params, {"layers.[01]": 1, "layers.2.0": 2}) == {"layers": [1, 1, (2,)]}


def test_by_path_and_init_of_a_module_say_what_to_pass() -> None:
    module = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match=r"by_path: .*Linear.*named_parameters"):
        by_path(module, {"*": 0.1})
    with pytest.raises(TypeError, match=r"init: .*Linear.*named_parameters"):
        sgd(lr=0.1).init(module)


def test_a_schedule_in_place_of_a_hyper_is_an_error_with_where_it_goes() -> None:
    opt, param = sgd(), torch.ones(1)
    with pytest.raises(TypeError, match=r"'lr' must be.*scheduled\(.*ParamScheduler"):
        opt(param, param, opt.init(param), dict(lr=lambda share: 0.1))


def test_a_column_that_the_caller_did_not_give_says_what_may_be_meant() -> None:
    opt, param = chain(elementwise(lambda gradient: {"update": gradient}), sgd_step), torch.ones(1)
    with pytest.raises(ValueError, match=r"reads the column 'gradient'.*mean 'grad'.*behind a \*"):
        opt(param, param, opt.init(param), dict(lr=0.1))


def test_by_path_tells_upper_from_lower_case() -> None:
    assert by_path({"a": torch.ones(1), "A": torch.ones(1)}, {"A": 1, "*": 2}) == {"a": 2, "A": 1}


def test_by_path_can_choose_tensors() -> None:
    assert by_path(PARAMS, {"*": torch.tensor(0.1)})["head"] == torch.tensor(0.1)


def test_by_path_makes_a_hyper() -> None:
    assert_same(step(sgd(), {"lr": by_path(PARAMS, {"head": 1.0, "*": 0.5})}), moved(0.5, 0.5, 1.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"body.*": 1.0}, r"by_path: no pattern matches leaf 'head'\. End with '\*'"),
        (
            {"tail.*": 1.0, "*": 2.0},
            r"by_path: pattern 'tail\.\*' matches no leaf\. Leaves: body\.bias, body\.weight, h",
        ),
        ({}, r"by_path: no pattern matches leaf 'body\.bias'"),
    ],
    ids=["leaf", "pattern", "nothing"],
)
def test_by_path_refuses_what_does_not_fit(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_path(PARAMS, values)


def test_numbers_and_float64_tensors_agree_on_float32_params() -> None:
    opt, params = adamw(), sample_tree()
    grads = random_like(params, seed=5)
    hyper = {name: torch.tensor(value, dtype=torch.float64) for name, value in opt.hyper.items()}
    assert_close(
        opt(params, grads, opt.init(params), hyper), opt(params, grads, opt.init(params)), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("learning_rate", "lr"),
        ("weight_decay", "wd"),
        ("momentum", "mom"),
        ("b2", "sqr_mom"),
        ("betas", "mom and sqr_mom"),
    ],
)
def test_a_name_of_torch_or_optax_is_answered_with_ours(theirs: str, ours: str) -> None:
    opt = adamw()
    with pytest.raises(ValueError, match=f"no rule reads '{theirs}'. '{theirs}' is called {ours} "):
        opt(PARAMS, PARAMS, opt.init(PARAMS), {theirs: 0.1})


def test_a_schedule_as_a_hyper_is_an_error_that_says_what_takes_one() -> None:
    words = r"hyper 'lr' must be a number, got a function: .*scheduled\(opt, steps=n, lr=...\)"
    with pytest.raises(TypeError, match=words):
        adamw(lr=Cosine(0.1, 0.0))  # type: ignore[arg-type]
    opt = adamw()
    for lr in (Cosine(0.1, 0.0), {"body": Cosine(0.1, 0.0), "head": 0.1}):
        with pytest.raises(TypeError, match=words):
            opt(PARAMS, PARAMS, opt.init(PARAMS), {"lr": lr})


def test_a_function_that_a_rule_calls_is_no_schedule() -> None:
    @elementwise(writes=("grad",))
    def warp(grad: torch.Tensor, *, function: Any) -> dict[str, torch.Tensor]:
        return dict(grad=function(grad))

    opt = chain(warp, sgd_step, lr=1.0, function=torch.abs)
    param = torch.tensor([1.0])
    assert_same(opt(param, torch.tensor([-1.0]), opt.init(param))[0], torch.tensor([0.0]))


@pytest.mark.parametrize("fused", [False, True])
def test_a_tree_of_values_goes_by_keys_and_not_by_places(fused: bool) -> None:
    """A dict is gone through in the order of its keys, an OrderedDict in its own."""
    params = OrderedDict(weight=torch.full((1, 1), 5.0), bias=torch.full((1,), 5.0))
    grads = {name: torch.ones_like(value) for name, value in params.items()}
    opt = fuse(sgd()) if fused else sgd()
    for lr in ({"weight": 1.0, "bias": 0.0}, OrderedDict(bias=0.0, weight=1.0)):
        moved, _ = opt(params, grads, opt.init(params), dict(lr=lr))
        assert (moved["weight"].item(), moved["bias"].item()) == (4.0, 5.0)


@pytest.mark.parametrize("fused", [False, True])
def test_counts_follow_their_leaves_into_a_tree_of_another_order(fused: bool) -> None:
    """Adam's first step is lr, whatever others have counted."""
    opt = fuse(adam(lr=0.1)) if fused else adam(lr=0.1)
    params = {"w": torch.ones(1), "b": torch.ones(1)}
    state = opt.init(params)
    for _ in range(50):
        params, state = opt(params, {"w": torch.ones(1), "b": None}, state)
    ordered = OrderedDict(w=params["w"], b=params["b"])
    moved, state = opt(ordered, OrderedDict(w=torch.ones(1), b=torch.ones(1)), state)
    assert (ordered["w"] - moved["w"]).item() == pytest.approx(0.1, rel=1e-5)
    assert (ordered["b"] - moved["b"]).item() == pytest.approx(0.1, rel=1e-5)
    assert state["step"].tolist() == [51, 1]


def test_a_pattern_that_decides_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="pattern 'head' decides nothing, since the first match"):
        by_path(PARAMS, {"*": 1e-5, "head": 1e-3})


def test_a_pattern_may_decide_what_has_been_decided_alike_and_the_last_one_nothing() -> None:
    assert by_path({"w": 0, "v": 0}, {"?": 0.5, "w": 0.5, "*": 1.0}) == {"w": 0.5, "v": 0.5}
    params = {"w": torch.ones(1), "b": torch.ones(1)}
    opt = freeze(sgd(lr=0.1), ["w*", "w", "b"])
    assert_same(opt(params, params, opt.init(params))[0], params)


def test_patterns_as_a_hyper_point_to_by_path() -> None:
    params = {"w": torch.ones(1), "bias": torch.ones(1)}
    opt = adamw(wd={"b*": 0.0, "*": 0.1})
    said = r"'wd' must be a number or a tree of them, got patterns such as 'b\*'\. by_path\("
    with pytest.raises(ValueError, match=said):
        opt(params, params, opt.init(params))
