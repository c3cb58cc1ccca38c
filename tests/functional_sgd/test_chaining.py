"""Chains: what is checked when they are built, and how they print, compare and call."""

import copy
import pickle
from typing import Any

import pytest
import torch

import functional_sgd as fs
from functional_sgd import (
    Chain,
    Optimizer,
    accumulate,
    adam,
    adamw,
    average_grad,
    average_sqr_grad,
    center,
    chain,
    clip_norm,
    clip_rms,
    clip_value,
    debias,
    identity,
    larc_ratio,
    momentum,
    nesterov,
    prodigy,
    rename,
    scale_by_rms,
    sgd,
    sgd_step,
    sign_of_average,
    snapshot_mean,
    weight_decay,
)
from tests.catalogue import RECIPES
from tests.comparing import Untouched, assert_same
from tests.functional_sgd import user_rules


@pytest.mark.parametrize(
    ("parts", "given", "message"),
    [
        (
            (scale_by_rms, sgd_step),
            {},
            r"rule scale_by_rms reads 'sqr_avg', .* Put .*average_sqr_grad.* before it",
        ),
        (
            (nesterov, sgd_step),
            {},
            r"nesterov reads 'velocity', .* Put heavy_ball before it",
        ),
        (
            (scale_by_rms, average_sqr_grad, sgd_step),
            {},
            r"scale_by_rms reads 'sqr_avg' before average_sqr_grad has",
        ),
        (
            (average_grad, sign_of_average, sgd_step),
            {},
            r"'grad_avg' has two owners, average_grad and sign_of_average.*rename\(",
        ),
        ((average_grad, average_grad, sgd_step), {}, r"slot 'grad_avg' has two owners"),
        (
            (average_grad,),
            {},
            r"no rule writes 'param'.*: average_grad\. End the chain with a step, such as sgd_step",
        ),
        (
            (rename(average_sqr_grad, sqr_avg="param"), sgd_step),
            {},
            r"may not keep a slot called 'param'",
        ),
        *(
            ((rename(average_grad, grad_avg=name), sgd_step), {}, f"may not keep a slot .*'{name}'")
            for name in ("step", "calls", "seed", "key")
        ),
        ((sgd_step,), {"mom": 0.9}, r"no rule reads 'mom'\. Known names: lr"),
        ((average_grad, sgd_step), {"moms": 0.9}, r"no rule reads 'moms'\. Did you mean 'mom'\?"),
        ((), {"lr": 0.1}, r"no rule reads 'lr'\. Known names: none"),
        (
            (weight_decay, larc_ratio, sgd_step),
            {},
            r"'wd' has two defaults, 0\.01 from weight_decay and 0\.0 from larc",
        ),
        (
            (sgd(0.1), momentum(0.2)),
            {},
            r"two of its parts give 'lr' different defaults, 0\.1 and 0\.2\. Decide with",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_a_chain_that_cannot_run_is_refused(
    parts: tuple[Any, ...], given: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        chain(*parts, **given)


@pytest.mark.parametrize("part", [adam, lambda update: {"update": update}, "adam", None, 0.1])
def test_only_rules_and_chains_can_be_chained(part: Any) -> None:
    with pytest.raises(
        TypeError, match=r"chain: expected rules, chains or an optimizer, got .*adam\(\), not adam"
    ):
        chain(part, sgd_step)


def test_conflicting_defaults_can_be_decided() -> None:
    assert chain(weight_decay, larc_ratio, sgd_step, wd=0.5).hyper["wd"] == 0.5
    assert chain(sgd(0.1), momentum(0.2), lr=0.3).hyper == {"lr": 0.3, "mom": 0.9}


def test_an_outer_default_wins_over_an_inner_one() -> None:
    assert chain(sgd(lr=0.1), lr=0.2).hyper == {"lr": 0.2}


def test_a_later_rule_may_shadow_a_slot_but_the_owner_decides_what_is_kept() -> None:
    opt, params = chain(average_grad, debias, sgd_step, lr=1.0, mom=0.75), torch.tensor([0.0])
    after, state = opt(params, torch.tensor([2.0]), opt.init(params))
    assert_same(after, torch.tensor([-2.0]))
    assert_same(state["grad_avg"], torch.tensor([0.5]))


def test_optional_columns_are_left_out_where_nobody_writes_them() -> None:
    """debias without grad_avg leaves the update alone."""
    opt = chain(average_sqr_grad, debias, scale_by_rms, sgd_step, lr=0.5, sqr_mom=0.75, eps=0.0)
    params = torch.tensor([0.0])
    assert_same(opt(params, torch.tensor([-3.0]), opt.init(params))[0], torch.tensor([0.5]))


def test_shadowing_a_slot_before_its_owner_has_run_is_refused() -> None:
    early = rename(user_rules.plain_step, param="sqr_avg")
    with pytest.raises(ValueError, match="sqr_avg"):
        chain(early, average_sqr_grad, sgd_step, lr=0.1)


def test_chains_flatten() -> None:
    assert chain(chain(weight_decay), chain(average_grad, sgd_step)).rules == (
        weight_decay,
        average_grad,
        sgd_step,
    )


def test_nested_chains_are_flat_chains() -> None:
    assert chain(weight_decay, adam(), wd=0.01) == adamw()


@pytest.mark.parametrize(
    "other",
    [sgd(lr=0.2), momentum(lr=0.1), chain(user_rules.plain_step, lr=0.1), chain(sgd_step), "sgd"],
    ids=str,
)
def test_chains_differ_when_rules_or_defaults_differ(other: object) -> None:
    assert sgd(lr=0.1) != other


def test_order_of_rules_matters() -> None:
    clips = (clip_norm, clip_value)
    assert chain(*clips, sgd_step, lr=0.1) != chain(*reversed(clips), sgd_step, lr=0.1)


def test_chains_can_be_keys() -> None:
    assert {sgd(lr=0.1): "a", momentum(): "b"}[chain(sgd_step, lr=0.1)] == "a"


def test_repr_is_the_call_that_makes_the_chain() -> None:
    opt = adamw(lr=0.1)
    names = {rule.name: rule for rule in opt.rules}
    assert eval(repr(opt), {"chain": chain, **names}) == opt


@pytest.mark.parametrize("name", RECIPES)
def test_chains_survive_pickle_and_deepcopy(name: str) -> None:
    opt = RECIPES[name]()
    for twin in (pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt), copy.copy(opt)):
        assert twin == opt
        assert (hash(twin), repr(twin), twin.hyper) == (hash(opt), repr(opt), opt.hyper)


def test_a_pickled_chain_runs() -> None:
    opt, params = pickle.loads(pickle.dumps(chain(sgd_step))), torch.tensor([1.0])
    assert_same(opt(params, params, opt.init(params), {"lr": 0.5})[0], torch.tensor([0.5]))
    with pytest.raises(ValueError, match="'lr' has no default"):
        opt(params, params, opt.init(params))


def test_a_chain_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        sgd().rules = ()  # type: ignore[misc]


def test_changing_the_hypers_that_a_chain_shows_does_not_change_the_chain() -> None:
    opt = sgd(lr=0.1)
    opt.hyper["lr"] = 5.0
    assert opt.hyper == {"lr": 0.1}


def test_required_names_are_those_without_default() -> None:
    opt = chain(weight_decay, user_rules.by_loss, sgd_step)
    assert opt.required == ("lr", "value")
    assert opt.hyper == {"wd": 0.01}


def test_chains_are_optimizers() -> None:
    assert isinstance(sgd(), Optimizer)


def test_identity_moves_nothing_and_counts() -> None:
    params = {"a": torch.tensor([1.0])}
    after, state = identity()(params, params, identity().init(params))
    assert_same((after, state), (params, {"step": torch.tensor([1])}))


def test_describe_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    chain(rename(average_grad, grad_avg="slow"), sgd_step, lr=0.5).describe()
    assert (
        capsys.readouterr().out
        == """\
rule                                   scope        reads          hypers   writes        keeps
rename(average_grad, grad_avg='slow')  elementwise  grad, slow     mom=0.9  slow, update  slow
sgd_step                               elementwise  param, update  lr=0.5   param
"""
    )


def test_describe_leaves_out_columns_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    chain(average_sqr_grad, debias, scale_by_rms, sgd_step).describe()
    assert (
        capsys.readouterr().out
        == """\
rule              scope        reads                hypers                 writes   keeps
average_sqr_grad  elementwise  grad, sqr_avg        sqr_mom=0.99           sqr_avg  sqr_avg
debias            elementwise  grad, sqr_avg, step  mom=0.9, sqr_mom=0.99  sqr_avg
scale_by_rms      elementwise  grad, sqr_avg        eps=1e-08              update
sgd_step          elementwise  param, update        lr                     param
"""
    )


def test_describe_says_of_what_reductions_are_made(capsys: pytest.CaptureFixture[str]) -> None:
    chain(clip_norm, sgd_step, lr=0.5).describe()
    assert (
        capsys.readouterr().out
        == """\
rule       scope        reads        hypers                                         writes  keeps
clip_norm  elementwise  grad         max_norm=1.0, grad_norm=norm(grad, over tree)  grad
sgd_step   elementwise  param, grad  lr=0.5                                         param
"""
    )


def test_columns_of_the_table_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    momentum(lr=0.1).describe()
    lines = capsys.readouterr().out.splitlines()
    assert {line.index("elementwise") for line in lines[1:]} == {lines[0].index("scope")}


def test_describe_of_identity_prints_the_header(capsys: pytest.CaptureFixture[str]) -> None:
    identity().describe()
    assert capsys.readouterr().out.split() == [
        "rule",
        "scope",
        "reads",
        "hypers",
        "writes",
        "keeps",
    ]


def test_numbers_that_the_state_keeps_are_read_and_are_no_hypers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    prodigy().describe()
    rows = {row.split()[0]: row for row in capsys.readouterr().out.splitlines()}
    assert rows["rate_by_distance"].split()[2:] == "distance, rate lr=1.0 rate rate".split()
    adam().describe()
    rows = {row.split()[0]: row for row in capsys.readouterr().out.splitlines()}
    assert "update, grad_avg, sqr_avg, step  mom=0.9" in rows["debias"]


def test_extras_reach_the_rules_that_read_them() -> None:
    opt, params = chain(user_rules.by_loss, sgd_step, lr=1.0), torch.tensor([0.0])
    after, _ = opt(params, torch.tensor([2.0]), opt.init(params), value=torch.tensor(3.0))
    assert_same(after, torch.tensor([-6.0]))


@pytest.mark.parametrize(
    ("extras", "expected"), [({}, -2.0), ({"value": torch.tensor(3.0)}, -6.0)], ids=["no", "yes"]
)
def test_extras_with_a_default_may_be_left_out(extras: dict[str, Any], expected: float) -> None:
    opt, params = chain(user_rules.maybe_by_loss, sgd_step, lr=1.0), torch.tensor([0.0])
    after, _ = opt(params, torch.tensor([2.0]), opt.init(params), **extras)
    assert_same(after, torch.tensor([expected]))


def test_a_missing_extra_is_named() -> None:
    opt, params = chain(user_rules.by_loss, sgd_step, lr=1.0), torch.tensor([0.0])
    with pytest.raises(
        ValueError, match=r"'value' has no default, so it must be passed: .*value=\.\.\."
    ):
        opt(params, params, opt.init(params))


def test_an_optimizer_of_ones_own_takes_one_function() -> None:
    """R4, Q3: two steps of a rule that adds the last gradient, 1, then 2 + 1."""
    opt, params = chain(user_rules.add_last, sgd_step, lr=1.0), torch.tensor([0.0])
    params, state = opt(params, torch.tensor([1.0]), opt.init(params))
    assert_same(opt(params, torch.tensor([2.0]), state)[0], torch.tensor([-4.0]))


def test_center_needs_the_mean_square_first() -> None:
    with pytest.raises(ValueError, match=r"center reads 'sqr_avg', .*average_sqr_grad"):
        chain(center, sgd_step)


def test_a_refused_call_leaves_its_arguments_alone() -> None:
    opt, params = adamw(), {"a": torch.ones(2), "b": torch.ones(3)}
    state, grads = opt.init(params), {"a": torch.ones(2), "b": torch.ones(2)}
    snapshot = Untouched(params, grads, state)
    with pytest.raises(ValueError, match=r"gradient of 'b' must have its shape \(3,\), got \(2,\)"):
        opt(params, grads, state)
    snapshot.check()


def test_equal_chains_made_of_parts_are_one_value() -> None:
    assert len({Chain((sgd_step,), {"lr": 0.1}), sgd(lr=0.1)}) == 1


def test_a_rule_renamed_to_its_own_names_survives_pickle() -> None:
    """It is equal to the rule of its module, but another object."""
    opt = chain(rename(sgd_step), lr=0.1)
    assert pickle.loads(pickle.dumps(opt)) == opt


def test_rules_around_another_optimizer_can_be_pickled() -> None:
    """Also those whose reductions are lambdas: what is pickled are the rules, not their plan."""
    opt = chain(snapshot_mean, clip_rms, accumulate(adamw(lr=0.1), every=2))
    twin = pickle.loads(pickle.dumps(opt))
    assert (twin, repr(twin)) == (opt, repr(opt))


def test_a_default_decides_between_parts_in_front_of_an_optimizer() -> None:
    """As it does in a chain of rules alone."""
    first, second = fs.part(fs.adaptive_clip, eps=1e-3), fs.part(fs.normalize, eps=1e-6)
    inner = fs.partition({"all": fs.sgd(lr=0.1)}, {"*": "all"})
    assert fs.chain(first, second, inner, eps=1e-5).hyper["eps"] == 1e-5
    with pytest.raises(ValueError, match=r"different defaults, 0.001 and 1e-06. Decide with"):
        fs.chain(first, second, inner)
