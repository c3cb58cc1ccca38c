"""Every recipe, fused, does what it does leaf by leaf: for all dtypes, leaf sizes and layouts."""

from contextlib import nullcontext

import pytest
import torch

from functional_sgd import fuse
from tests.catalogue import RECIPES
from tests.comparing import copy_of
from tests.functional_sgd.fusion.helpers import (
    NUMBERS_OF_ROOTS,
    ExactRoots,
    assert_near,
    check_steps,
    grads_for,
    kinds,
    odd_tree,
    plain_tree,
    tolerance_of,
)
from tests.turns import in_turns

ULPS = {"rmsprop_centered": 3, "lamb": 3, "adadelta": 5}
"""2 for all others. With AVX512, a fifth of torch's own float32 roots are an ulp off: here, of a
small difference, or of many numbers whose norm is then taken; or of two numbers whose quotient is
then squared.
"""


WAYS = [
    (plain_tree, torch.float32, True),
    (plain_tree, torch.float64, False),
    (plain_tree, torch.bfloat16, True),
    (odd_tree, torch.float32, False),
]


@pytest.mark.parametrize(
    ("name", "way"),
    in_turns(RECIPES, WAYS),
    ids=lambda value: value if type(value) is str else f"{value[0].__name__}-{value[1]}",
)
def test_a_fused_recipe_equals_the_chain(name, way):
    """But for torch's own roots, and the order in which it adds up, bit for bit."""
    opt, (tree, dtype, donate) = RECIPES[name](), way
    params, state = check_steps(opt, tree(dtype), donate=donate, ulps=0)
    late = {**state, "step": torch.full_like(state["step"], 40)}  # where RAdam trusts its variance
    grads, before = grads_for(params, 9), copy_of((params, late))
    with ExactRoots() if name in NUMBERS_OF_ROOTS else nullcontext():
        expected = opt(before[0], grads, before[1])
        found = fuse(opt, donate=donate)(params, grads, late)
    assert_near(found, expected, before, ULPS.get(name, 2), **tolerance_of(opt))


@pytest.mark.parametrize("name", ["adamw", "lamb", "clip_norm_adam"])
def test_half_precision_with_a_small_exponent(name):
    check_steps(RECIPES[name](), plain_tree(torch.float16))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize(
    "name", ["adamw", "lion", "lamb", "larc", "clip_norm_adam", "centralize_sgd", "ranger"]
)
def test_a_complex_tree(name, donate, dtype):
    check_steps(RECIPES[name](), odd_tree(dtype), donate=donate)


TWO_PASSES = {
    *("adai", "cautious_adamw", "cautious_lion", "fromage"),
    *("clip_norm_adam", "clip_norm_inside", "clip_rms_sgd"),
    *("d_adapt_sgd", "dog", "dowg"),
    *("l2_ball", "l2_sphere", "lamb", "larc", "lars", "lars_fastai", "mars"),
    *("normalized_sgd", "stable_adamw", "tiger"),
}
"""Recipes with a number made of columns, which a second pass is called with."""

WITH_TORCH = {
    "adafactor": ["torch", "kernel", "kernel"],
    "adafactor_wd": ["torch", "kernel", "kernel"],
    "adam_mini": ["torch", "kernel"],
    "adamp": ["kernel", "torch", "kernel"],
    "adamuon": ["kernel", "torch", "kernel", "kernel"],
    "adaptive_clip_sgd": ["torch", "kernel"],
    "came": ["torch", "kernel", "kernel", "torch", "kernel"],
    "centralize_sgd": ["torch", "kernel"],
    "l1_ball": ["kernel", "torch"],
    "muon": ["kernel", "torch", "torch", "kernel"],
    "muon_float32": ["kernel", "torch", "torch", "kernel"],
    "normuon": ["kernel", "torch", "torch", "torch", "kernel"],
    "novograd": ["torch", "kernel"],
    "sgdp": ["kernel", "torch", "kernel"],
    "shampoo": ["torch", "kernel"],
    "shampoo_every": ["torch", "kernel"],
    "simplex": ["kernel", "torch"],
    "sm3": ["torch", "kernel"],
    "soap": ["torch", "kernel"],
    "soap_every": ["torch", "kernel"],
}
"""Recipes with rules that look at shapes, which torch runs."""


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "identity"])
def test_recipes_are_one_pass_and_another_for_a_norm(name):
    expected = {**WITH_TORCH, **dict.fromkeys(TWO_PASSES, ["kernel"] * 2)}
    assert kinds(fuse(RECIPES[name]())) == expected.get(name, ["kernel"])
