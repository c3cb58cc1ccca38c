"""The catalogue is complete."""

import importlib
import inspect
import pkgutil
from typing import Any, get_args, get_type_hints

import pytest

import functional_sgd
from functional_sgd import Optimizer, Rule, recipes, rules, wrappers
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


def _makes_an_optimizer(function: Any) -> bool:
    made = get_type_hints(function).get("return")
    kinds = get_args(made) or (made,)
    return all(isinstance(kind, type) and issubclass(kind, Optimizer) for kind in kinds)


WRAPPERS = {
    name: getattr(module, name)
    for found in pkgutil.iter_modules(wrappers.__path__, f"{wrappers.__name__}.")
    for module in [importlib.import_module(found.name)]
    for name in _functions_of(module)
    if _makes_an_optimizer(getattr(module, name))
}


def test_there_are_wrappers() -> None:
    assert {"accumulate", "freeze", "lookahead", "schedule_free_sgd"} <= WRAPPERS.keys()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_has_to_keep_the_laws(wrapper: str) -> None:
    assert any(name.startswith(wrapper) for name in OPTIMIZERS)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_is_exported(wrapper: str) -> None:
    assert getattr(functional_sgd, wrapper) is WRAPPERS[wrapper]
