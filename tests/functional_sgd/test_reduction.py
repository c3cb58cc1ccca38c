"""Reductions: numbers made of columns, alone, in a rule that is called, and in a chain."""

from typing import Any

import pytest
import torch
from torch import Tensor

from functional_sgd import (
    all_finite,
    chain,
    clip_norm,
    elementwise,
    largest,
    leafwise,
    mean,
    norm,
    rename,
    sgd_step,
    total,
    trust_ratio,
)
from functional_sgd.reduction import global_norm, root
from tests.comparing import assert_close, assert_same

DOUBLE = torch.float64


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=DOUBLE)


def product(grad: Tensor, param: Tensor) -> Tensor:
    return grad * param


def magnitude(grad: Tensor) -> Tensor:
    return grad.abs()


PARAMS = {"a": double(1.0, 2.0), "b": double(2.0)}
GRADS = {"a": double(3.0, -4.0), "b": double(12.0)}

CASES: dict[str, tuple[Any, Any, float, dict[str, float]]] = {
    # name: over leaf, over tree, the number of the tree, those of the leaves
    "norm": (norm("grad"), norm("grad", over="tree"), 13.0, {"a": 5.0, "b": 12.0}),
    "total": (total(product), total(product, over="tree"), 19.0, {"a": -5.0, "b": 24.0}),
    "mean": (mean(magnitude), mean(magnitude, over="tree"), 19 / 3, {"a": 3.5, "b": 12.0}),
    "largest": (
        largest(lambda grad: grad),
        largest(lambda grad: grad, over="tree"),
        12.0,
        {"a": 3.0, "b": 12.0},
    ),
    "all_finite": (
        all_finite("grad", over="leaf"),
        all_finite("grad"),
        1.0,
        {"a": 1.0, "b": 1.0},
    ),
}


def rule_with(reduction: Any, scope: Any = elementwise) -> Any:
    """A rule that makes the number its update."""

    def show(param: Tensor, grad: Tensor, *, found: Tensor = reduction) -> dict[str, Tensor]:
        return dict(update=0 * param + 0 * grad.clamp(-1, 1) + found)

    return scope(show)


def seen_by(rule: Any, params: Any, grads: Any) -> Any:
    """The update of every leaf: a step of -1 from 0."""
    opt = chain(rule, sgd_step, lr=1.0)
    after, _ = opt(params, grads, opt.init(params))
    return {
        name: None if grads[name] is None else params[name] - leaf for name, leaf in after.items()
    }


@pytest.mark.parametrize("scope", [elementwise, leafwise])
@pytest.mark.parametrize("name", CASES)
def test_over_leaves_each_has_its_own(name: str, scope: Any) -> None:
    over_leaf, _, _, expected = CASES[name]
    found = seen_by(rule_with(over_leaf, scope), PARAMS, GRADS)
    assert_close(found, {n: torch.full_like(PARAMS[n], v) for n, v in expected.items()}, rtol=1e-14)


@pytest.mark.parametrize("scope", [elementwise, leafwise])
@pytest.mark.parametrize("name", CASES)
def test_over_the_tree_all_leaves_have_one(name: str, scope: Any) -> None:
    _, over_tree, expected, _ = CASES[name]
    found = seen_by(rule_with(over_tree, scope), PARAMS, GRADS)
    assert_close(found, {n: torch.full_like(p, expected) for n, p in PARAMS.items()}, rtol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_a_leaf_without_gradient_does_not_count(name: str) -> None:
    _, over_tree, _, expected = CASES[name]
    found = seen_by(rule_with(over_tree), PARAMS, {"a": GRADS["a"], "b": None})
    assert_close(found["a"], torch.full_like(PARAMS["a"], expected["a"]), rtol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_that_is_called_computes_it_of_what_it_is_given(name: str) -> None:
    over_leaf, over_tree, _, expected = CASES[name]
    for reduction in (over_leaf, over_tree):
        found = rule_with(reduction)(PARAMS["a"], GRADS["a"])
        assert_close(found["update"], torch.full_like(PARAMS["a"], expected["a"]), rtol=1e-14)


@pytest.mark.parametrize("value", [5.0, number(5.0)], ids=["number", "tensor"])
def test_a_rule_that_is_called_takes_the_callers(value: Any) -> None:
    found = rule_with(norm("grad"))(PARAMS["b"], GRADS["b"], found=value)
    assert_same(found, {"update": double(5.0)})


def test_all_finite_is_0_where_one_leaf_is_not() -> None:
    grads = {"a": double(1.0, float("nan")), "b": double(1.0)}
    assert_same(seen_by(rule_with(all_finite("grad", over="leaf")), PARAMS, grads)["b"], double(1))
    assert_same(seen_by(rule_with(all_finite("grad")), PARAMS, grads)["b"], double(0.0))


def test_infinity_is_not_finite() -> None:
    assert_same(all_finite("grad").of({"grad": double(1.0, -float("inf"))}), number(0.0))


def test_the_mean_over_the_tree_is_of_all_elements_not_of_all_leaves() -> None:
    grads = {"a": double(1.0, 1.0), "b": double(4.0)}
    found = seen_by(rule_with(mean(magnitude, over="tree")), PARAMS, grads)
    assert_same(found["b"], double(2.0))


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        (norm("grad"), 0.0),
        (total(magnitude), 0.0),
        (mean(magnitude), 0.0),
        (largest(magnitude), -float("inf")),
        (all_finite("grad"), 1.0),
    ],
    ids=["norm", "total", "mean", "largest", "all_finite"],
)
def test_of_no_elements(reduction: Any, expected: float) -> None:
    assert_same(reduction.of({"grad": torch.zeros(0, dtype=DOUBLE)}), number(expected))


def test_a_leaf_without_elements_does_not_change_the_number() -> None:
    params, grads = {**PARAMS, "none": torch.zeros(0)}, {**GRADS, "none": torch.zeros(0)}
    for _, over_tree, expected, _ in CASES.values():
        found = seen_by(rule_with(over_tree), params, grads)
        assert_close(found["b"], double(expected), rtol=1e-14)


def test_a_later_rule_reduces_what_earlier_ones_have_written() -> None:
    """Clipped from length 13 to 6.5, and then to 1.3."""
    again = rename(clip_norm, max_norm="second")
    opt = chain(clip_norm, again, sgd_step, lr=1.0, max_norm=6.5, second=1.3)
    zeros = {name: 0 * leaf for name, leaf in PARAMS.items()}
    after, _ = opt(zeros, GRADS, opt.init(zeros))
    assert_close(after, {"a": double(-0.3, 0.4), "b": double(-1.2)}, rtol=1e-6)


def test_two_rules_may_give_their_reductions_one_name() -> None:
    """Both call it `length`: of the gradient, 5, and of the update, 10."""

    @elementwise
    def double_grad(grad: Tensor, *, length: Tensor = norm("grad")) -> dict[str, Tensor]:
        return dict(update=2 * grad / grad * length)

    @elementwise
    def add_length(update: Tensor, *, length: Tensor = norm("update")) -> dict[str, Tensor]:
        return dict(update=update + length)

    found = seen_by_both(double_grad, add_length)
    assert_close(found, double(10 + 200**0.5, 10 + 200**0.5), rtol=1e-14)


def seen_by_both(one: Any, other: Any) -> Tensor:
    """The update of two rules for the gradient (3, 4)."""
    opt, params = chain(one, other, sgd_step, lr=1.0), double(0.0, 0.0)
    return -opt(params, double(3.0, 4.0), opt.init(params))[0]


def test_a_reduction_may_share_its_name_with_a_hyper_of_another_rule() -> None:
    @elementwise
    def add_hyper(grad: Tensor, *, length: float = 1.0) -> dict[str, Tensor]:
        return dict(update=grad + length)

    @elementwise
    def add_length(grad: Tensor, update: Tensor, *, length: Tensor = norm("grad")) -> Any:
        return dict(update=update + length)

    assert_same(seen_by_both(add_hyper, add_length), double(3 + 1 + 5, 4 + 1 + 5))


def test_a_renamed_rule_reduces_the_renamed_column() -> None:
    """(3, 4) is made twice as long, and then cut to length 1."""

    @elementwise
    def twice(grad: Tensor) -> dict[str, Tensor]:
        return dict(update=2 * grad)

    clip = rename(clip_norm, grad="update")
    assert_close(seen_by_both(twice, clip), double(0.6, 0.8), rtol=1e-6)


def test_a_renamed_reduction_is_given_under_its_new_name() -> None:
    renamed = rename(clip_norm, grad_norm="length")
    found = renamed(double(3.0), length=6.0, max_norm=3.0)["grad"]
    assert_close(found, double(9 / (6 + 1e-6)), rtol=1e-14)


def test_a_hyper_cannot_be_given_the_name_of_a_reduction() -> None:
    with pytest.raises(
        ValueError, match="two things in rule clip_norm would be called 'grad_norm'"
    ):
        rename(clip_norm, max_norm="grad_norm")


def test_half_precision_is_summed_in_float64() -> None:
    """In bfloat16, 256 + 1 would stay 256; in float32, 2**24 + 1 would stay 2**24."""
    assert_same(total(magnitude).of({"grad": torch.ones(1000).bfloat16()}), number(1000.0))
    grad = torch.cat([torch.tensor([2.0**24]), torch.ones(9)])
    assert_same(total(magnitude).of({"grad": grad}), number(2.0**24 + 9))


def test_numbers_are_float64_whatever_the_params_are() -> None:
    kinds = []

    @elementwise(writes=["update"])
    def look(grad: Tensor, *, length: Tensor = norm("grad")) -> dict[str, Tensor]:
        kinds.append(length.dtype)
        return dict(update=grad * length)

    opt, params = chain(look, sgd_step, lr=1.0), torch.ones(2)
    after, _ = opt(params, params, opt.init(params))
    assert (kinds, after.dtype) == ([torch.float64], torch.float32)


def test_complex_leaves_count_both_parts() -> None:
    """|3i| and 4 have the length 5 together."""
    opt = chain(clip_norm, sgd_step, lr=1.0, max_norm=2.5)
    grads = {"c": torch.tensor([3j]), "x": torch.tensor([4.0])}
    zeros = {name: 0 * leaf for name, leaf in grads.items()}
    after, _ = opt(zeros, grads, opt.init(zeros))
    assert_close(after, {"c": torch.tensor([-1.5j]), "x": torch.tensor([-2.0])}, rtol=1e-6)


def test_a_norm_has_a_finite_derivative_at_zero() -> None:
    grad = double(0.0, 0.0).requires_grad_()
    norm("grad").of({"grad": grad}).backward()
    assert_same(grad.grad, double(0.0, 0.0))


def test_global_norm_is_that_of_one_vector() -> None:
    assert_same(global_norm([double(2.0), double(3.0, 6.0)]), number(7.0))


def test_root_has_the_derivative_of_the_square_root_elsewhere() -> None:
    x = double(0.0, 4.0).requires_grad_()
    root(x).sum().backward()
    assert_same(x.grad, double(0.0, 0.25))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda grad, *, length=norm("update"): {},
            r"'length' is made of 'update', which is not among its required columns \['grad'\]",
        ),
        (
            lambda grad, other=None, *, length=norm("other"): {},
            r"'length' is made of 'other', .* Write it before the '\*', without a default",
        ),
        (
            lambda grad, *, dot=total(product): {},
            r"'dot' is made of 'param', which is not among its required columns",
        ),
        (lambda grad, *, length=norm("grads"): {}, "'length' is made of 'grads'.*is called grad"),
        (
            lambda grad, *, other=1.0, dot=total(lambda grad, other: grad * other): {},
            "'dot' is made of 'other', which is a keyword: a reduction sees columns only",
        ),
    ],
    ids=["not read", "optional", "expression", "misspelt", "keyword"],
)
def test_a_reduction_of_what_the_rule_does_not_read_is_refused(function: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        elementwise(function)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: total(3.0), r"total: expected a function of columns, .*, got 3\.0"),
        (lambda: mean(None), r"mean: expected a function of columns, .*, got None"),
        (lambda: largest(lambda: 1.0), r"largest: the expression must read at least one column"),
    ],
    ids=["number", "None", "no columns"],
)
def test_an_expression_is_a_function_of_columns(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("scope", [elementwise, leafwise])
@pytest.mark.parametrize(
    "expression", [lambda grad: grad.sum(), lambda grad: 1.0 + grad.mean(0)], ids=["sum", "mean"]
)
def test_an_expression_keeps_the_shape_of_its_columns(expression: Any, scope: Any) -> None:
    with pytest.raises(TypeError, match="rule show: the expression of 'found' must be elementwise"):
        chain(rule_with(total(expression), scope), sgd_step)


@pytest.mark.parametrize(
    "expression",
    [lambda grad: grad.cumsum(0), lambda grad: grad - grad.mean()],
    ids=["cumsum", "mean"],
)
def test_an_expression_sees_one_element_at_a_time(expression: Any) -> None:
    with pytest.raises(TypeError, match="rule show: the expression of 'found' must be elementwise"):
        chain(rule_with(total(expression)), sgd_step)


def test_over_is_a_leaf_or_the_tree() -> None:
    with pytest.raises(ValueError, match="over must be 'leaf' or 'tree', got 'forest'"):
        norm("grad", over="forest")  # type: ignore[arg-type]


def test_a_ratio_of_two_reductions_by_hand() -> None:
    """Lengths 5 and 10: the update is halved, whatever the other leaf is."""
    opt = chain(trust_ratio, sgd_step, lr=1.0)
    params = {"a": double(3.0, 4.0), "b": double(1.0)}
    after, _ = opt(params, {"a": double(6.0, 8.0), "b": double(100.0)}, opt.init(params))
    assert_close(after, {"a": double(0.0, 0.0), "b": double(0.0)}, atol=1e-14)
