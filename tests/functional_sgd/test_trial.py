"""The trial run of a rule, when a chain is built: what is found out, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from functional_sgd import (
    Rule,
    average_grad,
    chain,
    clip_norm,
    debias,
    elementwise,
    leafwise,
    norm,
    normal,
    rename,
    sgd_step,
    treewise,
    uniform,
)
from functional_sgd.trial import writes_of
from tests.catalogue import RULES
from tests.comparing import assert_same

Columns = dict[str, Tensor]


def step_after(*rules: Rule) -> Any:
    """A chain that these rules and a step make."""
    return chain(*rules, sgd_step, lr=1.0)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_rule_of_ours_passes(rule: Rule) -> None:
    """And writes its slots."""
    assert {*writes_of(rule, frozenset(rule.columns))} >= {*rule.slots}


def test_what_is_written_may_depend_on_which_columns_there_are() -> None:
    assert writes_of(debias, frozenset(["update", "sqr_avg"])) == ("sqr_avg",)
    assert writes_of(debias, frozenset(["update", "grad_avg"])) == ("grad_avg", "update")
    assert writes_of(debias, frozenset(["update"])) == ()


# Works in place.


def multiplies(grad: Tensor) -> Columns:
    return dict(grad=grad.mul_(2))


def multiplies_with_an_operator(grad: Tensor) -> Columns:
    grad *= 2
    return dict(grad=grad)


def sets_an_element(grad: Tensor) -> Columns:
    grad.view(-1)[0] = 0
    return dict(grad=grad)


def writes_into_data(param: Tensor, grad: Tensor) -> Columns:
    """As optimizers of torch were once written."""
    param.data.add_(-0.1 * grad)
    return dict(update=grad)


def writes_into_a_detached_one(grad: Tensor) -> Columns:
    grad.detach().zero_()
    return dict(grad=grad)


def writes_into_a_view(grad: Tensor) -> Columns:
    grad.reshape(-1).neg_()
    return dict(grad=grad)


def writes_and_restores(grad: Tensor) -> Columns:
    """Others may look in between."""
    grad.mul_(2).div_(2)
    return dict(update=grad)


def changes_the_step(grad: Tensor, *, step: Tensor) -> Columns:
    step.add_(1)
    return dict(grad=grad / step)


def changes_a_reduction(grad: Tensor, *, length: Tensor = norm("grad")) -> Columns:
    length += 1e-6
    return dict(grad=grad / length)


def changes_a_hyper(grad: Tensor, *, lr: Any) -> Columns:
    """With a number this is a name for another; with a tensor it is the caller's."""
    lr *= 0.5
    return dict(update=lr * grad)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (multiplies, "grad"),
        (multiplies_with_an_operator, "grad"),
        (sets_an_element, "grad"),
        (writes_into_data, "param"),
        (writes_into_a_detached_one, "grad"),
        (writes_into_a_view, "grad"),
        (writes_and_restores, "grad"),
        (changes_the_step, "step"),
        (changes_a_reduction, "length"),
        (changes_a_hyper, "lr"),
    ],
)
@pytest.mark.parametrize("scope", [elementwise, leafwise])
def test_a_rule_that_works_in_place_is_refused(scope: Any, function: Any, what: str) -> None:
    message = f"rule {function.__name__}: works in place: it changes '{what}', which belongs to the"
    with pytest.raises(TypeError, match=message):
        step_after(scope(function))


def test_a_slot_is_not_changed_in_place_either() -> None:
    @elementwise(grad_avg=torch.zeros_like)
    def average(grad: Tensor, grad_avg: Tensor) -> Columns:
        return dict(grad_avg=grad_avg.mul_(0.9).add_(grad), update=grad_avg)

    with pytest.raises(TypeError, match="average: works in place: it changes 'grad_avg'.* Write g"):
        step_after(average)


def test_a_number_of_the_tree_is_not_changed_in_place_either() -> None:
    @elementwise(count=0.0)
    def counts(grad: Tensor, *, count: Tensor) -> Columns:
        return dict(grad=2 * grad, count=count.add_(1))

    with pytest.raises(TypeError, match="rule counts: works in place: it changes 'count'"):
        step_after(counts)


def test_a_rule_of_whole_trees_works_not_in_place_either() -> None:
    @treewise
    def halves(grad: Any) -> dict[str, Any]:
        for leaf in grad.values():
            leaf.div_(2)
        return dict(grad=grad)

    with pytest.raises(TypeError, match="rule halves: works in place: it changes 'grad'"):
        step_after(halves)


def test_what_a_rule_has_made_itself_it_may_change() -> None:
    @elementwise
    def shifts(grad: Tensor) -> Columns:
        return dict(grad=(2 * grad).add_(1))

    opt, params = step_after(shifts), torch.zeros(1)
    assert_same(opt(params, torch.ones(1), opt.init(params))[0], torch.tensor([-3.0]))


def test_handing_a_column_on_is_not_working_in_place() -> None:
    @elementwise(last=torch.zeros_like)
    def keeps(grad: Tensor, last: Tensor) -> Columns:
        return dict(last=grad, update=grad)

    assert writes_of(keeps, frozenset(["grad", "last"])) == ("last", "update")


# Is called elementwise, but is not.

NOT_ELEMENTWISE: dict[str, Any] = {
    "mean": lambda x: x - x.mean(),
    "mean of rows": lambda x: x - x.mean(-1, keepdim=True) if x.dim() > 1 else x,
    "mean of columns": lambda x: x - x.mean(0),
    "max": lambda x: x / x.max(),
    "min": lambda x: x - x.min(),
    "median": lambda x: x - x.median(),
    "norm": lambda x: x / x.norm(),
    "first": lambda x: x - x.reshape(-1)[0],
    "last": lambda x: x - x.reshape(-1)[-1],
    "roll": lambda x: x.roll(1),
    "roll of rows": lambda x: x.roll(1, 0),
    "roll back": lambda x: x.roll(-1),
    "flip": lambda x: x.flip(0),
    "flip all": lambda x: x.flip(list(range(x.dim()))),
    "sort": lambda x: x.sort(-1).values,
    "sort down": lambda x: x.sort(0, descending=True).values,
    "sort all": lambda x: x.reshape(-1).sort().values.reshape(x.shape),
    "cumsum": lambda x: x.cumsum(-1),
    "cummax": lambda x: x.cummax(0).values,
    "softmax": lambda x: x.softmax(0),
    "top two": lambda x: torch.where(x >= x.reshape(-1).topk(2).values[-1], x, 0.0),
    "count": lambda x: x * x.numel(),
    "axes": lambda x: x * x.dim(),
    "places": lambda x: x + torch.arange(x.numel()).reshape(x.shape),
    "turned": lambda x: x.T.reshape(x.shape) if x.dim() == 2 else x,
}


@pytest.mark.parametrize("name", NOT_ELEMENTWISE)
def test_a_rule_that_looks_at_other_elements_is_not_elementwise(name: str) -> None:
    @elementwise
    def looks(grad: Tensor) -> Columns:
        return dict(grad=NOT_ELEMENTWISE[name](grad))

    with pytest.raises(TypeError, match="rule looks: is called elementwise, but 'grad' of one ele"):
        step_after(looks)


@pytest.mark.parametrize("name", NOT_ELEMENTWISE)
def test_it_is_leafwise(name: str) -> None:
    @leafwise
    def looks(grad: Tensor) -> Columns:
        return dict(grad=NOT_ELEMENTWISE[name](grad))

    assert writes_of(looks, frozenset(["grad"])) == ("grad",)


def test_looking_at_other_elements_of_a_slot_is_found_though_it_begins_as_zeros() -> None:
    @elementwise(speed=torch.zeros_like)
    def looks(grad: Tensor, speed: Tensor) -> Columns:
        return dict(speed=speed + grad, update=grad + speed.mean())

    with pytest.raises(
        TypeError, match="looks: is called elementwise, but 'update' of one element"
    ):
        step_after(looks)


@pytest.mark.parametrize(
    "function",
    [
        lambda grad: dict(grad=grad.clamp(-1, 1)),
        lambda grad: dict(grad=torch.where(grad > 1, 1.0, grad.sqrt())),
        lambda grad: dict(grad=torch.full_like(grad, 3.0)),
        lambda grad, *, length=norm("grad"): dict(grad=grad / length),
        lambda grad, *, step: dict(grad=grad / step),
        lambda grad, *, key: dict(grad=grad * uniform(key, grad)),
        lambda grad, *, key: dict(grad=grad + normal(key, grad) - normal(key, grad, draw=1)),
    ],
    ids=["clamp", "where", "constant", "reduction", "step", "uniform", "normal"],
)
def test_what_looks_at_one_element_and_at_numbers_is_elementwise(function: Any) -> None:
    assert writes_of(elementwise(function), frozenset(["grad"])) == ("grad",)


def test_a_slot_of_another_shape_is_not_elementwise() -> None:
    @elementwise(rows=lambda param: param.new_zeros(param.shape[0]))
    def average_rows(grad: Tensor, rows: Tensor) -> Columns:
        return dict(rows=grad, update=grad)

    with pytest.raises(TypeError, match=r"slot 'rows' .* begins as \(4,\) for a leaf of \(4, 2\)"):
        step_after(average_rows)


# Slots and numbers.


def test_a_slot_keeps_its_shape() -> None:
    @leafwise(rows=lambda param: param.new_zeros(param.shape[0]))
    def average_rows(grad: Tensor, rows: Tensor) -> Columns:
        return dict(rows=grad.mean(0), update=grad)

    with pytest.raises(TypeError, match=r"slot 'rows' begins with the shape \(2,\), .* as \(3,\)"):
        step_after(average_rows)


@pytest.mark.parametrize("scope", [elementwise, leafwise, treewise])
def test_a_first_value_that_fails_is_named(scope: Any) -> None:
    @scope(third=lambda param: param.new_zeros(param.shape[5]))
    def keeps(grad: Tensor, third: Tensor) -> Columns:
        return dict(third=third)

    with pytest.raises(TypeError, match=r"rule keeps: the first value of slot 'third', .*IndexErr"):
        step_after(keeps)


@pytest.mark.parametrize("scope", [elementwise, leafwise])
@pytest.mark.parametrize(
    "make",
    [
        lambda grad, count, length: count + grad.sum(),
        lambda grad, count, length: count + grad.numel(),
        lambda grad, count, length: count + length,
    ],
    ids=["a column", "a shape", "a number of the leaf"],
)
def test_a_number_of_the_tree_made_of_one_leaf_is_refused(make: Any, scope: Any) -> None:
    @scope(count=0.0)
    def counts(grad: Tensor, *, count: Tensor, length: Tensor = norm("grad")) -> Columns:
        return dict(grad=2 * grad, count=make(grad, count, length))

    with pytest.raises(
        TypeError, match="'count' is one number of the whole tree, so it must be ma"
    ):
        step_after(counts)


def test_a_number_of_the_tree_may_be_made_of_numbers_of_the_tree() -> None:
    """The longest gradient so far: 5, then still 5."""

    @elementwise(longest=0.0)
    def keeps(
        grad: Tensor, *, longest: Tensor, length: Tensor = norm("grad", over="tree")
    ) -> Columns:
        return dict(longest=torch.maximum(longest, length))

    opt, params = step_after(keeps), [torch.zeros(1), torch.zeros(1)]
    state = opt.init(params)
    for grads in ([3.0, -4.0], [0.0, 1.0]):
        params, state = opt(params, [torch.tensor([grad]) for grad in grads], state)
    assert_same(state["longest"], torch.tensor(5.0, dtype=torch.float64))


def test_a_number_of_the_tree_is_no_column() -> None:
    @elementwise(count=0.0)
    def counts(grad: Tensor, *, count: Tensor) -> Columns:
        return dict(grad=2 * grad, count=count + grad)

    with pytest.raises(TypeError, match=r"'count' .* came out with the shape \(2, 3\). Make it of"):
        step_after(counts)


# What is found out is kept, and stays right.


def test_the_trial_leaves_no_trace_in_random_numbers() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()

    @elementwise
    def fresh(grad: Tensor) -> Columns:
        return dict(grad=grad + 1)

    step_after(fresh)
    assert_same(torch.get_rng_state(), before)


def test_the_trial_is_made_on_the_cpu_in_float32_whatever_the_defaults_are() -> None:
    seen = []

    @elementwise(writes=None)
    def look(grad: Tensor) -> Columns:
        seen.append((grad.device.type, grad.requires_grad))
        return dict(grad=2 * grad)

    with torch.device("meta"):
        step_after(look)
    assert {*seen} == {("cpu", False)}


def test_a_rule_that_says_what_it_writes_is_not_tried() -> None:
    calls = []

    @elementwise(writes=("grad",))
    def silent(grad: Tensor) -> Columns:
        calls.append(grad)
        return dict(grad=grad)

    step_after(silent)
    assert calls == []


# Names.


@pytest.mark.parametrize("name", ["writes", "belongs", "before"])
def test_a_slot_cannot_have_the_name_of_an_option(name: str) -> None:
    with pytest.raises(TypeError, match=f"rule: a slot cannot be called '{name}'"):
        elementwise(**{name: torch.zeros_like})


@pytest.mark.parametrize("old", ["grad", "grad_avg", "mom", "update"])
def test_everything_that_a_rule_reads_or_writes_can_be_renamed(old: str) -> None:
    assert rename(average_grad, **{old: "other"}).renames == {old: "other"}


def test_numbers_of_the_tree_can_be_renamed() -> None:
    @elementwise(count=0.0)
    def counts(grad: Tensor, *, count: Tensor) -> Columns:
        return dict(grad=count * grad, count=count + 1)

    opt = step_after(rename(counts, count="rounds"))
    assert opt.init(torch.ones(1))["rounds"] == 0


@pytest.mark.parametrize("name", ["step", "key", "nothing"])
def test_what_a_rule_does_not_have_cannot_be_renamed(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"rule clip_norm has no name '{name}'; it has grad, grad_"
    ):
        rename(clip_norm, **{name: "other"})
