"""The catalogue is complete."""

import importlib
import inspect
import pkgutil
from typing import Any, get_args, get_type_hints

import pytest

import functional_sgd
from functional_sgd import Chain, Optimizer, Rule, catalogue, rules, wrappers
from tests.catalogue import NARROW, OPTIMIZERS, RANDOM, RULES, WITH_EXTRAS


def _functions_of(module: object) -> list[str]:
    own = inspect.getmembers(module, inspect.isfunction)
    return [
        name
        for name, function in own
        if not name.startswith("_") and function.__module__ == module.__name__
    ]


def _rules_of_this_package() -> list[Rule]:
    """Those that are public by their names, whatever the lists say."""
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.iter_modules(rules.__path__, f"{rules.__name__}.")
    ]
    return [one for module in modules for one in vars(module).values() if isinstance(one, Rule)]


@pytest.mark.parametrize("rule", _rules_of_this_package(), ids=repr)
def test_every_rule_is_exported(rule: Rule) -> None:
    assert getattr(functional_sgd, rule.name) == rule
    assert rule in RULES


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_rule_has_to_keep_the_laws_inside_some_chain(rule: Rule) -> None:
    makers = [*OPTIMIZERS.values(), *RANDOM.values(), *NARROW.values()]
    chains = [make() for make in (*makers, *(make for make, _ in WITH_EXTRAS.values()))]
    parts = [part for one in chains if isinstance(one, Chain) for part in one.rules]
    assert any(part.function is rule.function for part in parts)


@pytest.mark.parametrize("recipe", catalogue.__all__)
def test_every_recipe_has_to_keep_the_laws(recipe: str) -> None:
    assert recipe in {**OPTIMIZERS, **RANDOM, **WITH_EXTRAS}


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
    assert {"accumulate", "freeze", "lookahead", "schedule_free"} <= WRAPPERS.keys()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_has_to_keep_the_laws(wrapper: str) -> None:
    assert any(name.startswith(wrapper) for name in OPTIMIZERS)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_is_exported(wrapper: str) -> None:
    assert getattr(functional_sgd, wrapper) is WRAPPERS[wrapper]
