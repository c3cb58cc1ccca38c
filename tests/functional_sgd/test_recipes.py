"""Recipes: which rules, which numbers, and steps worked by hand."""

from typing import Any

import pytest
import torch

import functional_sgd as fs
from functional_sgd import Chain, chain
from tests.comparing import assert_close, assert_same

T = torch.tensor


def path(opt: Chain, grads: list[float], start: float = 1.0, **hyper: Any) -> list[float]:
    """One parameter after each of these gradients, in float64."""
    params, seen = T(start, dtype=torch.float64), []
    state = opt.init(params)
    for grad in grads:
        params, state = opt(params, T(grad, dtype=torch.float64), state, hyper)
        seen.append(float(params))
    return seen


@pytest.mark.parametrize(
    ("opt", "grads", "expected"),
    [
        (fs.sgd(lr=0.5), [1.0, -2.0], [0.5, 1.5]),
        (fs.sgd(lr=0.5, wd=0.5), [1.0, 1.0], [0.25, -0.3125]),
        (fs.sgd(lr=1.0, mom=0.5), [1.0, 1.0, 1.0], [0.0, -1.5, -3.25]),
        (fs.sgd(lr=1.0, mom=0.5, nesterov=True), [1.0, 1.0], [-0.5, -2.25]),
        (fs.sgd(lr=1.0, mom=0.5, dampening=0.5), [1.0, 1.0, 1.0], [0.0, -1.0, -2.0]),
        (fs.sgd(lr=1.0, mom=0.5, wd=1.0), [0.0, 0.0], [0.0, -0.5]),
        (fs.momentum(lr=1.0, mom=0.5), [1.0, 1.0, 1.0], [0.5, -0.25, -1.125]),
        (fs.rmsprop(lr=1.0, sqr_mom=0.75, eps=0.0), [2.0, 0.0], [-1.0, -1.0]),
        (fs.rmsprop(lr=1.0, sqr_mom=0.75, eps=1.0), [2.0], [0.0]),
        (fs.rmsprop(lr=1.0, sqr_mom=0.75, eps=0.0, mom=0.5), [2.0, 0.0], [-1.0, -2.0]),
        (fs.rmsprop(lr=1.0, sqr_mom=0.5, eps=0.0, centered=True), [2.0], [-1.0]),
        (fs.rmsprop(lr=1.0, sqr_mom=0.75, eps=0.0, wd=1.0), [1.0], [-1.0]),
        (fs.adam(lr=0.5, eps=0.0), [3.0, 3.0], [0.5, 0.0]),
        (fs.adam(lr=0.5, eps=1.0), [1.0], [0.75]),
        (fs.adam(lr=0.5, eps=1.0, wd=3.0), [0.0], [0.625]),
        (fs.adamw(lr=0.5, eps=1.0, wd=1.0), [1.0], [0.25]),
        (fs.adamw(lr=0.5, wd=1.0), [0.0, 0.0], [0.5, 0.25]),
        (fs.radam(lr=0.5), [2.0], [0.0]),
        (fs.qhadam(lr=0.5, eps=0.0), [3.0], [0.5]),
        (fs.qhadam(lr=0.5, eps=1.0, wd=1.0), [1.0], [0.25]),
        (fs.larc(lr=1.0, mom=0.5, trust_coeff=0.5, eps=0.0), [1.0, 0.0], [0.5, 0.0]),
        (fs.larc(lr=1.0, trust_coeff=0.5, eps=0.0, wd=0.5), [0.25], [0.375]),
        (fs.lamb(lr=0.5, eps=0.0), [3.0], [0.5]),
        (fs.lamb(lr=0.25, eps=0.0, wd=2.0), [3.0], [0.375]),
        (fs.lion(lr=0.25), [3.0, -1.0], [0.75, 1.0]),
        (fs.lion(lr=0.25, wd=1.0), [3.0], [0.5]),
        (
            fs.lookahead(fs.sgd(lr=1.0), sync_every=2, slow_step=0.5),
            [1.0, 1.0, 1.0],
            [0.0, 0.0, -1.0],
        ),
        (fs.ranger(lr=0.5, wd=1.0, sync_every=1, slow_step=1.0), [2.0], [-0.5]),
        (fs.adagrad(lr=1.0, eps=0.0), [3.0, 4.0], [0.0, -0.8]),
        (
            fs.adagrad(lr=1.0, eps=0.0, first_sum=16.0, lr_decay=1.0),
            [3.0, 12.0],
            [0.4, 0.4 - 6 / 13],
        ),
        (fs.adadelta(lr=1.0, sqr_mom=0.75, eps=1.0), [0.0, 2.0], [1.0, 1.0 - 2**0.5]),
        (fs.rprop(lr=0.5, grow=2.0), [3.0, 1.0, -1.0, -1.0], [0.5, -0.5, -0.5, 0.0]),
        (fs.asgd(lr=1.0, lambd=1.0, power=1.0), [1.0, 0.0], [-1.0, -0.5]),
        (fs.adamax(lr=0.5, sqr_mom=0.5, eps=0.0), [3.0, 3.0], [0.5, 0.0]),
        (fs.nadam(lr=0.5, mom=0.0, eps=0.0), [3.0, 3.0], [0.5, 0.0]),
        (fs.adam(lr=0.5, mom=0.0, sqr_mom=0.0, eps=0.0, amsgrad=True), [4.0, 1.0], [0.5, 0.375]),
        (fs.adafactor(lr=0.5), [3.0, 3.0], [0.5, 0.25]),
        (fs.adafactor(lr=0.5, wd=1.0, min_rms=2.0), [3.0], [-0.5]),
        (fs.sgdw(lr=0.5, mom=0.5, wd=1.0), [1.0, 0.0], [0.0, -0.25]),
        (fs.qhm(lr=1.0, mom=0.5, nu=0.5), [4.0, 0.0], [-2.0, -2.5]),
        (fs.aggmo(lr=1.0, mom=0.5, slow_mom=0.75), [3.0, 0.0], [-2.0, -3.25]),
        (fs.pid(lr=1.0, mom=0.5, integral=1.0, derivative=2.0), [1.0, 2.0], [-1.0, -6.5]),
        (fs.pnm(lr=1.0, mom=0.0, contrast=0.0), [1.0, 3.0], [0.0, -3.0]),
        (fs.adai(lr=0.5, looseness=0.5), [2.0, 2.0], [0.0, -1.0]),
        (fs.adamaxw(lr=0.5, sqr_mom=0.5, eps=0.0, wd=1.0), [3.0], [0.0]),
        (fs.adamc(lr=0.5, eps=0.0, max_lr=1.0, wd=1.0), [3.0], [0.25]),
        (fs.grokfast_adamw(lr=0.5, eps=0.0, wd=1.0), [3.0], [0.0]),
        (fs.grams(lr=0.5, mom=0.0, sqr_mom=0.0, eps=0.0), [3.0, -3.0], [0.5, 1.0]),
        (fs.cautious_lion(lr=0.25, mom=0.875), [3.0, -0.125], [0.75, 0.75]),
        (fs.adamod(lr=0.5, rate_mom=0.5, eps=0.0), [3.0], [0.75]),
        (fs.msvag(lr=0.5, mom=0.0), [1.0, 3.0], [0.5, -1.0]),
        (
            fs.rmsprop_tf(lr=1.0, sqr_mom=0.5, eps=0.0, mom=0.5),
            [7**0.5, 0.0],
            [1 - 7**0.5 / 2, 1 - 7**0.5 * 0.75],
        ),
        (fs.ftrl(lr=0.5), [2.0, 0.0], [0.5, 0.5]),
        (chain(fs.ascend, fs.sgd(lr=0.5, wd=0.5)), [1.0], [1.25]),
    ],
    ids=repr,
)
def test_steps_worked_by_hand(opt: Chain, grads: list[float], expected: list[float]) -> None:
    assert path(opt, grads) == pytest.approx(expected, rel=1e-13, abs=1e-14)


@pytest.mark.parametrize(
    ("make", "hyper"),
    [
        (fs.sgd, {"lr": 1e-3}),
        (fs.momentum, {"lr": 1e-3, "mom": 0.9}),
        (fs.rmsprop, {"lr": 1e-2, "sqr_mom": 0.99, "eps": 1e-8}),
        (fs.adam, {"lr": 1e-3, "mom": 0.9, "sqr_mom": 0.999, "eps": 1e-8}),
        (fs.adamw, {"lr": 1e-3, "mom": 0.9, "sqr_mom": 0.999, "eps": 1e-8, "wd": 1e-2}),
        (fs.radam, {"lr": 1e-3, "mom": 0.9, "sqr_mom": 0.999, "eps": 1e-8}),
        (
            fs.qhadam,
            {
                "lr": 1e-3,
                "mom": 0.999,
                "sqr_mom": 0.999,
                "nu_1": 0.7,
                "nu_2": 1.0,
                "eps": 1e-8,
                "wd": 0.0,
            },
        ),
        (fs.larc, {"lr": 1e-3, "mom": 0.9, "trust_coeff": 0.02, "eps": 1e-8, "wd": 0.0}),
        (
            fs.lamb,
            {"lr": 1e-3, "mom": 0.9, "sqr_mom": 0.99, "eps": 1e-5, "max_trust": 10.0, "wd": 0.0},
        ),
        (fs.lion, {"lr": 1e-4, "mom": 0.9, "slow_mom": 0.99, "wd": 0.0}),
        (
            fs.ranger,
            {
                "lr": 1e-3,
                "mom": 0.95,
                "sqr_mom": 0.99,
                "eps": 1e-6,
                "wd": 1e-2,
                "sync_every": 6,
                "slow_step": 0.5,
            },
        ),
        (fs.adadelta, {"lr": 1.0, "sqr_mom": 0.9, "eps": 1e-6}),
        (fs.adagrad, {"lr": 1e-2, "first_sum": 0.0, "eps": 1e-10}),
        (fs.adamax, {"lr": 2e-3, "mom": 0.9, "sqr_mom": 0.999, "eps": 1e-8}),
        (fs.asgd, {"lr": 1e-2, "lambd": 1e-4, "power": 0.75, "average_from": 1e6}),
        (fs.nadam, {"lr": 2e-3, "mom": 0.9, "sqr_mom": 0.999, "eps": 1e-8, "mom_decay": 4e-3}),
        (
            fs.rprop,
            {"lr": 1e-2, "shrink": 0.5, "grow": 1.2, "min_size": 1e-6, "max_size": 50.0},
        ),
        (fs.sparse_adam, {"lr": 1e-3, "mom": 0.9, "sqr_mom": 0.999, "eps": 1e-8}),
        (
            fs.adafactor,
            {"lr": 1e-2, "sqr_mom_decay": 0.8, "eps": 2**-23, "min_rms": 1e-3, "max_rms": 1.0},
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_defaults_are_those_of_torch_or_of_the_paper(make: Any, hyper: dict[str, float]) -> None:
    assert make().hyper == hyper


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("sgd", dict(lr=0.5)),
        ("sgd", dict(lr=0.5, mom=0.25, wd=0.125)),
        ("sgd", dict(lr=0.5, mom=0.25, dampening=0.75)),
        ("rmsprop", dict(lr=0.5, sqr_mom=0.25, eps=0.125, mom=0.75, wd=2.0)),
        ("adam", dict(lr=0.5, mom=0.25, sqr_mom=0.125, eps=0.75, wd=2.0)),
        ("adamw", dict(lr=0.5, mom=0.25, sqr_mom=0.125, eps=0.75, wd=2.0)),
        ("radam", dict(lr=0.5, mom=0.25, sqr_mom=0.125, eps=0.75, wd=2.0)),
        ("lion", dict(lr=0.5, mom=0.25, slow_mom=0.125, wd=2.0)),
        ("larc", dict(lr=0.5, mom=0.25, trust_coeff=0.125, eps=0.75, wd=2.0)),
        ("lamb", dict(lr=0.5, mom=0.25, sqr_mom=0.125, eps=0.75, max_trust=3.0, wd=2.0)),
        ("qhadam", dict(lr=0.5, mom=0.25, sqr_mom=0.125, nu_1=0.375, nu_2=0.625, eps=0.75, wd=2.0)),
        (
            "ranger",
            dict(lr=0.5, mom=0.25, sqr_mom=0.125, eps=0.75, wd=2.0, sync_every=3, slow_step=0.375),
        ),
        ("momentum", dict(lr=0.5, mom=0.25)),
        ("adadelta", dict(lr=0.5, sqr_mom=0.25, eps=0.125, wd=2.0)),
        ("adagrad", dict(lr=0.5, eps=0.125, lr_decay=0.25, first_sum=0.75, wd=2.0)),
        ("adamax", dict(lr=0.5, mom=0.25, sqr_mom=0.125, eps=0.75, wd=2.0)),
        ("asgd", dict(lr=0.5, lambd=0.25, power=0.125, average_from=3.0, wd=2.0)),
        ("nadam", dict(lr=0.5, mom=0.25, sqr_mom=0.125, eps=0.75, mom_decay=0.375, wd=2.0)),
        ("rprop", dict(lr=0.5, shrink=0.25, grow=3.0, min_size=0.125, max_size=8.0)),
        ("sparse_adam", dict(lr=0.5, mom=0.25, sqr_mom=0.125, eps=0.75)),
        (
            "adafactor",
            dict(lr=0.5, sqr_mom_decay=0.25, eps=0.125, min_rms=0.75, max_rms=3.0, wd=2.0),
        ),
    ],
    ids=str,
)
def test_keywords_become_hypers(name: str, keywords: dict[str, float]) -> None:
    assert getattr(fs, name)(**keywords).hyper == keywords


@pytest.mark.parametrize(
    "name",
    [
        *("sgd", "momentum", "rmsprop", "adam", "adamw", "radam", "qhadam", "larc", "lamb"),
        *("lion", "ranger", "adadelta", "adafactor", "adagrad", "adamax", "asgd", "nadam"),
        *("rprop", "sparse_adam"),
    ],
)
def test_recipes_need_no_arguments(name: str) -> None:
    assert getattr(fs, name)().required == ()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            dict(nesterov=True),
            r"sgd: nesterov and dampening are kinds of momentum, but mom is None\. Pass mom=0\.9",
        ),
        (dict(dampening=0.5), r"sgd: nesterov and dampening are kinds of momentum"),
        (
            dict(mom=0.9, nesterov=True, dampening=0.5),
            r"sgd: nesterov momentum has no dampening, got dampening=0\.5",
        ),
    ],
    ids=["nesterov", "dampening", "both"],
)
def test_sgd_refuses_what_makes_no_sense(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fs.sgd(**keywords)


def test_momentum_of_zero_is_a_momentum() -> None:
    """So that a schedule can raise it later."""
    assert "velocity" in fs.sgd(mom=0.0).init(T(1.0))


def test_lookahead_pulls_the_slow_params_every_k_steps() -> None:
    """Six steps of 0.6 each from 1: the slow weights end half way."""
    opt, params = fs.lookahead(fs.sgd(lr=0.1)), T(1.0, dtype=torch.float64)
    state = opt.init(params)
    for _ in range(5):
        params, state = opt(params, T(1.0), state)
    assert float(state["slow_param"]) == 1.0
    params, state = opt(params, T(1.0), state)
    assert float(params) == float(state["slow_param"]) == pytest.approx(1 * 0.5 + (1 - 0.6) * 0.5)


def test_lookahead_keeps_the_averages_across_a_sync() -> None:
    plain, ahead = fs.momentum(), fs.lookahead(fs.momentum(), sync_every=1)
    params = T([1.0])
    first, second = (
        plain(params, params, plain.init(params)),
        ahead(params, params, ahead.init(params)),
    )
    assert_same(first[1]["grad_avg"], second[1]["grad_avg"])


def test_lookahead_that_never_syncs_is_the_optimizer() -> None:
    opt = fs.adam(lr=0.1)
    assert path(fs.lookahead(opt, sync_every=1000), [1.0, -2.0, 3.0]) == path(opt, [1.0, -2.0, 3.0])


def test_lookahead_can_be_nested_under_other_names() -> None:
    inner = fs.lookahead(fs.sgd(lr=1.0), sync_every=2)
    outer = fs.rename(fs.sync_slow_params, slow_param="slower", sync_every="outer_every")
    assert chain(inner, outer, outer_every=4).init(T(1.0)).keys() == {
        "step",
        "slow_param",
        "slower",
    }


def test_decay_of_the_other_kind_goes_in_front() -> None:
    opt = chain(fs.weight_decay, fs.radam(lr=0.5), wd=1.0)
    assert path(opt, [2.0]) == [-0.5]


def test_lr_of_zero_leaves_params_as_they_are() -> None:
    assert path(fs.adamw(), [1.0, 2.0], lr=0.0) == [1.0, 1.0]


def test_hypers_can_change_from_step_to_step() -> None:
    """B16: (lr, mom) = (1, 0.5), then (0.5, 0)."""
    opt, params = fs.momentum(), T(0.0)
    state = opt.init(params)
    for lr, mom in ((1.0, 0.5), (0.5, 0.0)):
        params, state = opt(params, T(1.0), state, {"lr": lr, "mom": mom})
    assert_close(params, T(-1.0))


@pytest.mark.parametrize("name", fs.catalogue.NAMES)
def test_an_unknown_keyword_is_answered_with_the_known_names(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}: got an unexpected keyword 'lrr'.*Known names: "):
        getattr(fs, name)(lrr=0.1)


def test_a_keyword_of_torch_is_answered_with_ours() -> None:
    with pytest.raises(TypeError, match="'betas' is called mom and sqr_mom here"):
        fs.adamw(betas=(0.9, 0.95))  # type: ignore[call-arg]


def names_of_parts(opt: Any) -> dict[str, list[str]]:
    parts: dict[str, list[str]]
    parts = opt.owned({"embed": torch.ones(3, 2), "w": torch.eye(2), "b": torch.ones(2)})
    return parts


def test_a_single_pattern_gives_its_leaf_to_adamw() -> None:
    opt = fs.muon_with_adamw(others="embed")
    assert names_of_parts(opt) == {"adamw": ["b", "embed"], "muon": ["w"]}


def test_a_pattern_for_adamw_that_matches_no_leaf_is_an_error_at_init() -> None:
    with pytest.raises(ValueError, match="partition: pattern 'embde' matches no leaf. Leaves: b"):
        names_of_parts(fs.muon_with_adamw(others=("embde",)))


def test_adamc_asks_for_the_largest_rate_of_its_schedule() -> None:
    """At lr = 0.1 with max_lr = 0.001 it would decay by 10 % a step."""
    opt = fs.scheduled(fs.adamc(), lr=lambda step: 0.1)
    with pytest.raises(ValueError, match="'max_lr' has no default, so it must be passed"):
        opt(T(1.0), T(1.0), opt.init(T(1.0)))


def test_adamc_takes_a_rate_of_zero() -> None:
    assert path(fs.adamc(lr=0.0), [1.0], max_lr=1.0) == [1.0]


def test_apollo_moves_in_the_step_after_a_gradient_of_zeros() -> None:
    """So small a matrix is its own sketch: Adam's 0.1 / sqrt(0.001), with the bias of step 2."""
    opt, params = fs.apollo(lr=1.0, eps=1e-12), torch.zeros(1, 2)
    params, state = opt(params, torch.zeros(1, 2), opt.init(params))
    params, state = opt(params, torch.ones(1, 2), state)
    step = 0.1 / 0.19 * (0.001999 / 0.001) ** 0.5
    assert_close(params, T([[-step, -step]]), rtol=1e-5)


def test_soap_without_eps_only_finds_its_bases_in_the_first_step() -> None:
    opt, params = fs.soap(lr=0.5, eps=0.0, wd=0.0), T([[1.0, 2.0], [3.0, 4.0]])
    assert_same(opt(params, T([[1.0, 2.0], [0.0, 1.0]]), opt.init(params))[0], params)


def test_d_adapt_adam_without_eps_counts_nothing_in_the_first_step() -> None:
    opt, params = fs.d_adapt_adam(eps=0.0), T([1.0, 2.0])
    _, state = opt(params, T([1.0, -1.0]), opt.init(params))
    assert_same(state["dot_sum"], T(0.0).double())


def test_adai_leaves_an_element_that_has_had_no_gradient() -> None:
    """1 - 1e-9 is 1 in float32."""
    opt, params = fs.adai(lr=1.0, eps=1e-9), T([3.0, 3.0])
    assert_same(opt(params, T([0.0, 1.0]), opt.init(params))[0][0], T(3.0))


MODEL = torch.nn.Linear(1, 1)
HOLDERS: dict[str, Any] = {
    "generator": MODEL.parameters(),
    "list": list(MODEL.parameters()),
    "groups": [{"params": MODEL.parameters()}],
    "names": MODEL.named_parameters(),
    "module": MODEL,
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_parameters_are_no_rate(kind: str) -> None:
    said = r"chain: hyper 'lr' must be a number, got .* no parameters in it: .*to_torch\(opt, model"
    with pytest.raises(TypeError, match=said):
        fs.adamw(HOLDERS[kind])
