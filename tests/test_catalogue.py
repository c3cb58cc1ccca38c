"""The catalogue is complete."""

import inspect

import pytest

import functional_sgd
from functional_sgd import Rule, recipes, rules, wrappers
from tests.catalogue import OPTIMIZERS, RECIPES, RULES


def _rules_in(module: object) -> dict[str, Rule]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Rule)}


def _functions_of(module: object) -> list[str]:
    own = inspect.getmembers(module, inspect.isfunction)
    return [
        name
        for name, function in own
        if not name.startswith("_") and function.__module__ == module.__name__
    ]


@pytest.mark.parametrize("name", sorted({**_rules_in(functional_sgd), **_rules_in(rules)}))
def test_every_rule_is_in_the_catalogue(name: str) -> None:
    assert name in {rule.name for rule in RULES}


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_rule_is_exported(rule: Rule) -> None:
    assert getattr(functional_sgd, rule.name) == rule


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_rule_has_to_keep_the_laws_inside_some_chain(rule: Rule) -> None:
    assert any(part.function is rule.function for make in RECIPES.values() for part in make().rules)


@pytest.mark.parametrize("recipe", _functions_of(recipes))
def test_every_recipe_is_in_the_catalogue(recipe: str) -> None:
    assert recipe in RECIPES


@pytest.mark.parametrize("recipe", _functions_of(recipes))
def test_every_recipe_is_exported(recipe: str) -> None:
    assert getattr(functional_sgd, recipe) is getattr(recipes, recipe)


WRAPPERS = [
    name
    for name, value in vars(wrappers).items()
    if inspect.isfunction(value) and name != "averaged"
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_has_to_keep_the_laws(wrapper: str) -> None:
    assert any(name.startswith(wrapper) for name in OPTIMIZERS)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_is_exported(wrapper: str) -> None:
    assert getattr(functional_sgd, wrapper) is getattr(wrappers, wrapper)
