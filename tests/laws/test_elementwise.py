"""Law 5: elementwise rules commute with reshaping and concatenation, alone and in chains."""

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

from functional_sgd import Rule
from functional_sgd.signature import REQUIRED
from tests.catalogue import (
    ELEMENTWISE_RECIPES,
    ELEMENTWISE_RULES,
    RECIPES,
    random_like,
    sample_tree,
)
from tests.comparing import assert_close
from tests.each import for_each


def call(rule: Rule, change: Callable[[Tensor], Tensor], step: int) -> dict[str, Tensor]:
    """The rule on random columns, each changed first; squares are positive, as their owners make
    them.
    """
    generator = torch.Generator().manual_seed(0)
    columns = {}
    for name in rule.columns:
        values = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        columns[name] = change(values.square() if name.startswith("sqr_") else values)
    scalars = {
        name: 0.3 if default is REQUIRED else default for name, default in rule.scalars.items()
    }
    if "step" in scalars:
        scalars["step"] = torch.tensor(step, dtype=torch.float64)
    if rule.signature.rounds:
        scalars["dtype"] = torch.bfloat16
    return rule(**columns, **scalars)


def assert_same_elements(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to the last bits, in which vectorised exp and log differ from scalar ones."""
    assert found.keys() == expected.keys()
    assert_close(found, expected, rtol=1e-14, atol=1e-15)


@for_each("step", [1, 12])
@pytest.mark.parametrize("rule", ELEMENTWISE_RULES, ids=repr)
def test_rule_commutes_with_reshape(rule: Rule, step: int) -> None:
    whole = call(rule, lambda values: values, step)
    flat = call(rule, lambda values: values.reshape(2, 3, 4), step)
    assert_same_elements(flat, {name: value.reshape(2, 3, 4) for name, value in whole.items()})


@for_each("step", [1, 12])
@pytest.mark.parametrize("rule", ELEMENTWISE_RULES, ids=repr)
def test_rule_commutes_with_permutation(rule: Rule, step: int) -> None:
    order = torch.randperm(4, generator=torch.Generator().manual_seed(1))
    whole = call(rule, lambda values: values, step)
    turned = call(rule, lambda values: values[order].T.contiguous(), step)
    assert_same_elements(turned, {name: value[order].T for name, value in whole.items()})


@for_each("step", [1, 12])
@pytest.mark.parametrize("rule", ELEMENTWISE_RULES, ids=repr)
def test_rule_commutes_with_concatenation(rule: Rule, step: int) -> None:
    whole = call(rule, lambda values: values, step)
    halves = [
        call(rule, half, step) for half in (lambda values: values[:1], lambda values: values[1:])
    ]
    assert_same_elements(
        {name: torch.cat([half[name] for half in halves]) for name in halves[0]}, whole
    )


@pytest.mark.parametrize("name", ELEMENTWISE_RECIPES)
def test_recipe_commutes_with_packing_all_leaves_into_one(name: str) -> None:
    opt, params = RECIPES[name](), sample_tree(dtype=torch.float64)
    packed, state, packed_state = pack(params), opt.init(params), opt.init(pack(params))
    for seed in range(4):
        grads = random_like(params, seed)
        params, state = opt(params, grads, state)
        packed, packed_state = opt(packed, pack(grads), packed_state)
    assert_close(packed, pack(params), rtol=1e-13, atol=1e-15)
    for slot in state.keys() - {"step"}:
        assert_close(packed_state[slot], pack(state[slot]), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", ELEMENTWISE_RECIPES)
def test_complex_params_are_pairs_of_reals(name: str) -> None:
    opt, params = RECIPES[name](), sample_tree(dtype=torch.complex128)
    grads = random_like(params, seed=5)
    after, _ = opt(params, grads, opt.init(params))
    pairs = as_pairs(params)
    assert_close(as_pairs(after), opt(pairs, as_pairs(grads), opt.init(pairs))[0], rtol=1e-14)


def pack(tree: Any) -> Tensor:
    """All leaves in one vector."""
    return torch.cat([leaf.reshape(-1) for leaf in optree.tree_leaves(tree)])


def as_pairs(tree: Any) -> Any:
    """Complex leaves as real ones with one axis more."""
    return optree.tree_map(torch.view_as_real, tree)
