"""recipes: facts about the catalogue, of which those that can be computed are."""

import pytest

from functional_sgd import catalogue, recipes

RECIPES = recipes()


def test_every_recipe_is_listed() -> None:
    assert RECIPES.keys() == set(catalogue.__all__)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_it_comes_from(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.title.endswith(".")
    assert recipe.source, f"{name}: write 'Source: ...' into its docstring"


def test_what_adamw_costs() -> None:
    """Two slots of 4 bytes; param, grad and slots are read, param and slots written."""
    adamw = RECIPES["adamw"]
    assert (adamw.memory, adamw.passes, adamw.moved) == (8.0, 1, 28.0)
    assert adamw.by_torch == ()


def test_a_norm_costs_a_pass() -> None:
    """LAMB: moments are written before the ratio is known, and read again."""
    assert RECIPES["lamb"].passes == 2
