"""Rules as values: signatures, names, equality, copies."""

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from functional_sgd import (
    Rule,
    add_noise,
    average_grad,
    average_sqr_grad,
    chain,
    clip_norm,
    debias,
    elementwise,
    heavy_ball,
    leafwise,
    norm,
    rename,
    sgd_step,
    treewise,
    weight_decay,
)
from tests.catalogue import RULES
from tests.comparing import assert_same
from tests.functional_sgd import user_rules

SLOW = rename(average_grad, grad_avg="slow_avg", mom="slow_mom")


def test_signature_tells_columns_hypers_and_slots() -> None:
    assert average_grad.columns == ("grad", "grad_avg")
    assert average_grad.scalars == {"mom": 0.9}
    assert average_grad.slots == ("grad_avg",)


def test_columns_with_a_default_are_optional() -> None:
    assert debias.signature.optional == {"grad_avg", "sqr_avg"}


@pytest.mark.parametrize("decorate", [elementwise, leafwise, treewise])
def test_decorators_are_scopes(decorate: Any) -> None:
    assert decorate(lambda update: dict(update=update)).scope == decorate.__name__


def test_a_rule_calls_as_its_function() -> None:
    assert_same(
        sgd_step(torch.tensor([1.0]), torch.tensor([2.0]), lr=0.25), {"param": torch.tensor([0.5])}
    )


def test_a_rule_can_be_called_with_names() -> None:
    found = sgd_step(update=torch.tensor([2.0]), param=torch.tensor([1.0]), lr=0.25)
    assert_same(found, {"param": torch.tensor([0.5])})


def test_a_rule_keeps_name_docstring_and_module() -> None:
    assert (average_grad.__name__, average_grad.__module__) == (
        "average_grad",
        "functional_sgd.rules.averaging",
    )
    assert average_grad.__doc__ == average_grad.function.__doc__


def test_a_rule_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        average_grad.scope = "leafwise"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("function", "slots", "message"),
    [
        (lambda *grads: {}, {}, r"'grads' must have a plain name: no \*args"),
        (lambda grad, **hypers: {}, {}, r"'hypers' must have a plain name"),
        (eval("lambda grad, /: {}"), {}, r"'grad' must have a plain name"),
        (lambda grad, step: {}, {}, r"'step' is a scalar; write it after a '\*'"),
        (
            lambda grad: {},
            {"avg": torch.zeros_like},
            r"slot 'avg' must be one of its own required columns.*\['grad'\]",
        ),
        (
            lambda grad, avg=None: {},
            {"avg": torch.zeros_like},
            r"slot 'avg' must be one of its own required columns",
        ),
        (lambda grad: {}, {"grad": torch.zeros_like}, r"slot 'grad' must be one of its own"),
        (
            lambda grad, avg: {},
            {"avg": 0.0},
            r"slot 'avg' needs a function param -> first value, got 0\.0",
        ),
        (3, {}, r"expected a function, got int"),
    ],
    ids=[
        "args",
        "kwargs",
        "positional-only",
        "step",
        "slot",
        "optional slot",
        "slot grad",
        "initializer",
        "number",
    ],
)
def test_signatures_that_cannot_be_read_are_refused(
    function: Any, slots: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        Rule(function, "elementwise", slots)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            user_rules.returns_none,
            r"rule returns_none: expected a dict of what it writes, got NoneType.*return dict",
        ),
        (user_rules.returns_number, r"rule returns_number: 'update' must be a tensor, got float"),
        (
            user_rules.returns_sum,
            r"rule returns_sum: .*came out as \(\) for a leaf of \(2, 3\)\. Use @leafwise",
        ),
        (user_rules.returns_step, r"rule returns_step: may not write 'step'"),
        (
            user_rules.raises,
            r"rule raises: its trial run .* raised RuntimeError: no luck.*@elementwise\(writes=",
        ),
        (user_rules.never_writes, r"rule never_writes: owns slot 'own' but does not write it"),
    ],
    ids=repr,
)
def test_a_wrong_result_is_found_when_the_chain_is_built(rule: Rule, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        chain(rule, sgd_step)


def test_a_rule_that_cannot_be_tried_may_say_what_it_writes() -> None:
    opt = chain(user_rules.picky, sgd_step, lr=1.0)
    params = torch.tensor([3.0])
    assert_same(opt(params, torch.tensor([0.5]), opt.init(params))[0], torch.tensor([2.0]))


def test_rename_changes_slots_and_hypers() -> None:
    assert SLOW.slots == ("slow_avg",)
    assert chain(SLOW, sgd_step, lr=0.1).hyper == {"slow_mom": 0.9, "lr": 0.1}


def test_a_renamed_rule_is_called_and_answers_with_the_new_names() -> None:
    found = SLOW(torch.tensor([1.0]), slow_avg=torch.tensor([0.0]), slow_mom=0.75)
    assert_same(found, {"slow_avg": torch.tensor([0.25]), "update": torch.tensor([0.25])})


def test_rename_leaves_the_rule_itself_alone() -> None:
    rename(average_grad, mom="other")
    assert average_grad.renames == {}


def test_rename_of_a_renamed_rule_uses_its_names() -> None:
    assert rename(SLOW, slow_avg="slower_avg").slots == ("slower_avg",)


def test_renaming_back_gives_the_rule() -> None:
    assert rename(SLOW, slow_avg="grad_avg", slow_mom="mom") == average_grad


def test_two_names_can_be_swapped() -> None:
    swapped = rename(sgd_step, param="update", update="param")
    found = swapped(update=torch.tensor([1.0]), param=torch.tensor([2.0]), lr=0.5)
    assert_same(found, {"update": torch.tensor([0.0])})


def test_two_averages_in_one_chain() -> None:
    opt = chain(
        average_grad, rename(SLOW, update="slow_update"), sgd_step, lr=1.0, mom=0.5, slow_mom=0.75
    )
    params = torch.tensor([0.0])
    after, state = opt(params, torch.tensor([1.0]), opt.init(params))
    assert_same(after, torch.tensor([-0.5]))
    assert_same(
        state,
        {
            "step": torch.tensor([1]),
            "grad_avg": torch.tensor([0.5]),
            "slow_avg": torch.tensor([0.25]),
        },
    )


def test_a_rule_of_gradients_can_be_applied_to_the_update() -> None:
    """Momentum of the average: update 0.5, then 0.5 * 0 + 0.5."""
    opt = chain(
        average_grad, rename(heavy_ball, grad="update", velocity="speed"), sgd_step, lr=1.0, mom=0.5
    )
    params, state = torch.tensor([0.0]), opt.init(torch.tensor([0.0]))
    for expected in (-0.5, -0.5 - (0.25 + 0.75)):
        params, state = opt(params, torch.tensor([1.0]), state)
        assert_same(params, torch.tensor([expected]))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"momentum": "mom"},
            r"rule average_grad has no name 'momentum'; it has grad, grad_avg, mom, update",
        ),
        ({"step": "count"}, r"no name 'step'"),
    ],
    ids=["unknown", "step"],
)
def test_rename_refuses_names_that_the_rule_has_not(names: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rename(average_grad, **names)


def test_the_counter_cannot_be_renamed() -> None:
    with pytest.raises(ValueError, match="no name 'step'"):
        rename(debias, step="count")


def test_rename_wants_a_rule() -> None:
    with pytest.raises(TypeError, match=r"rename: expected a rule, got .*before chaining"):
        rename(chain(sgd_step), lr="rate")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "names", [{"grad_avg": "update"}, {"mom": "grad"}, {"grad": "grad_avg"}], ids=str
)
def test_rename_refuses_to_give_two_things_one_name(names: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(names.values()))):
        chain(rename(average_grad, **names), sgd_step)


def test_repr_is_the_name() -> None:
    assert repr(average_grad) == "average_grad"


def test_repr_of_a_renamed_rule_is_the_call_that_makes_it() -> None:
    assert eval(repr(SLOW)) == SLOW


def test_rules_are_equal_when_function_scope_slots_and_names_are() -> None:
    assert rename(average_grad, mom="slow_mom", grad_avg="slow_avg") == SLOW
    assert hash(rename(average_grad, mom="slow_mom", grad_avg="slow_avg")) == hash(SLOW)


@pytest.mark.parametrize(
    "other",
    [
        SLOW,
        heavy_ball,
        Rule(average_grad.function, "leafwise", average_grad.initializers),
        "average_grad",
    ],
    ids=["names", "function", "scope", "kind"],
)
def test_rules_differ_when_one_of_these_differs(other: object) -> None:
    assert average_grad != other


@pytest.mark.parametrize("rule", [*RULES, SLOW, user_rules.remember, user_rules.picky], ids=repr)
def test_rules_survive_pickle_and_deepcopy(rule: Rule) -> None:
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert copy.deepcopy(rule) == rule
    assert copy.copy(rule) == rule


def test_a_local_rule_can_be_copied() -> None:
    @elementwise(speed=torch.ones_like)
    def local(grad: Tensor, speed: Tensor) -> dict[str, Tensor]:
        return dict(update=grad, speed=speed)

    renamed = rename(local, speed="velocity")
    assert copy.deepcopy(renamed) == renamed


def test_treewise_rules_see_none_for_missing_gradients() -> None:
    """sqrt(3**2 + 4**2) = 5, whatever else is in the tree."""
    opt, params = (
        chain(clip_norm, sgd_step, lr=1.0, max_norm=2.5),
        [torch.zeros(1) for _ in range(3)],
    )
    after, _ = opt(params, [torch.tensor([3.0]), None, torch.tensor([4.0])], opt.init(params))
    torch.testing.assert_close(after, [torch.tensor([-1.5]), torch.zeros(1), torch.tensor([-2.0])])


def test_slots_start_with_what_their_rule_says() -> None:
    state = chain(
        rename(average_sqr_grad, sqr_avg="squares"), user_rules.remember, weight_decay, lr=0.1
    ).init(torch.tensor([3.0]))
    assert_same(
        state,
        {
            "step": torch.tensor([0]),
            "squares": torch.tensor([0.0]),
            "last_param": torch.tensor([3.0]),
        },
    )


@pytest.mark.parametrize(
    "call",
    [lambda: clip_norm(1.0), lambda: clip_norm(max_norm=1.0), lambda: weight_decay(wd=0.1)],
    ids=["a number", "a hyper", "a hyper of an elementwise rule"],
)
def test_a_rule_that_is_called_with_hypers_alone_says_where_they_go(call: Any) -> None:
    with pytest.raises(TypeError, match=r"got only numbers.*chain\(\w+, ..., (max_norm|lr|wd)="):
        call()


def test_random_numbers_without_a_key_are_refused() -> None:
    @elementwise
    def noisy(grad: Tensor) -> dict[str, Tensor]:
        return dict(grad=grad + torch.randn_like(grad))

    with pytest.raises(TypeError, match="different in every call.*key.*uniform\\(key, grad\\)"):
        chain(noisy, sgd_step)


def test_a_number_that_is_not_declared_is_refused_with_how_to_declare_it() -> None:
    @elementwise
    def measure(grad: Tensor, *, length: Any = norm("grad", over="tree")) -> dict[str, Tensor]:
        return dict(grad=grad, ratio=2.0 * length)

    with pytest.raises(TypeError, match=r"'ratio' came out as \(\).*@elementwise\(ratio=0\.0\)"):
        chain(measure, sgd_step)


def test_a_default_of_several_numbers_is_refused() -> None:
    with pytest.raises(TypeError, match=r"default of 'betas' must be one number, got \(0\.9, 0"):
        elementwise(lambda grad, *, betas=(0.9, 0.99): dict(grad=grad * betas[0]))


@pytest.mark.parametrize("key", [{}, {"key": 0}])
def test_a_rule_that_draws_says_what_its_key_is(key: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="rule add_noise: draws random numbers, so key must be"):
        add_noise(torch.ones(2), step=torch.tensor(1), **key)


def centred(update: Tensor) -> dict[str, Tensor]:
    """Not elementwise, since it takes a mean."""
    return dict(update=update - update.mean())


def test_a_rule_that_was_declared_otherwise_is_another_one() -> None:
    assert elementwise(centred) != elementwise(writes=("update",))(centred)


def test_a_rule_is_tried_though_one_that_says_what_it_writes_was_not() -> None:
    chain(elementwise(writes=("update",))(centred), sgd_step, lr=0.1)
    with pytest.raises(TypeError, match="depends on others"):
        chain(elementwise(centred), sgd_step, lr=0.1)


def test_a_hyper_in_front_of_the_star_is_refused() -> None:
    with pytest.raises(TypeError, match="'mom' has a default, 0.9, so .* put it behind the '\\*'"):
        elementwise(lambda grad, mom=0.9: dict(update=mom * grad))


def test_a_partial_is_no_rule() -> None:
    with pytest.raises(TypeError, match="expected a function with a name, got a partial. Write"):
        elementwise(partial(lambda grad, k: dict(update=k * grad), k=2.0))
