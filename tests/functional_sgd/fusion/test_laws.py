"""Over random trees, a fused elementwise recipe is the chain: alone, in parts, with any hypers."""

from typing import Any

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import functional_sgd as fs
from functional_sgd.schedules import Cosine
from tests.catalogue import ELEMENTWISE_RECIPES, RECIPES
from tests.comparing import copy_of
from tests.functional_sgd.fusion.helpers import ExactRoots, assert_near, draw

HUGE = 70_001  # more than a chunk of the kernel

LAYOUTS = {
    "dense": lambda shape, seed: draw(shape, torch.float32, seed),
    "turned": lambda shape, seed: draw(shape[::-1], torch.float32, seed).permute(
        tuple(reversed(range(len(shape))))
    ),
    "strided": lambda shape, seed: draw((*shape, 2), torch.float32, seed)[..., 0],
    "expanded": lambda shape, seed: draw((1,) * len(shape), torch.float32, seed).expand(shape),
}

shapes = st.sampled_from([(), (0,), (1,), (3,), (4, 5), (2, 0, 3), (3, 2, 4), (HUGE,)])
layouts = st.sampled_from(
    sorted(set(LAYOUTS) - {"expanded"})
)  # of params; several elements in one place cannot be
grad_layouts = st.sampled_from([*LAYOUTS, None])
leaves = st.tuples(shapes, layouts, grad_layouts)
trees = st.recursive(
    leaves.map(lambda leaf: [leaf]),  # as a list, since a tuple would be a branch
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3)
    ),
    max_leaves=6,
)


def is_leaf(value: Any) -> bool:
    return isinstance(value, tuple)


def tensors(tree: Any, place: int, seed: int) -> Any:
    """A tensor for every leaf, laid out as it says at this place."""
    number = iter(range(seed, seed + 1000))
    return optree.tree_map(
        lambda leaf: None if leaf[place] is None else LAYOUTS[leaf[place]](leaf[0], next(number)),
        tree,
        is_leaf=is_leaf,
    )


def by_size(path: str, leaf: Tensor) -> str | None:
    """A label for every leaf: matrices stay, short ones go with the recipe."""
    return None if leaf.dim() == 2 else "recipe" if leaf.numel() < 10 else "momentum"


def partitioned(opt: fs.Chain) -> fs.Optimizer:
    return fs.partition({"recipe": opt, "momentum": fs.momentum(lr=0.05)}, by_size)


WAYS = {
    "alone": lambda opt: opt,
    "partition": partitioned,
    "scheduled": lambda opt: (
        fs.scheduled(opt, steps=4, lr=Cosine(0.1, 0.001)) if "lr" in opt.hyper else opt
    ),
    "frozen": lambda opt: fs.freeze(opt, lambda path, leaf: leaf.dim() == 0),
}


def hyper_of(kind: str, opt: Any, params: Any) -> dict[str, Any]:
    """A number, a tensor, or numbers that differ by leaf."""
    if kind == "none" or "lr" not in opt.hyper:
        return {}
    count = iter(range(1000))
    lr = {
        "number": lambda: 0.03,
        "tensor": lambda: torch.tensor(0.03),
        "by leaf": lambda: optree.tree_map(lambda leaf: 0.01 * (1 + next(count)), params),
    }[kind]()
    return dict(lr=lr)


@pytest.mark.parametrize("name", ELEMENTWISE_RECIPES)
@settings(max_examples=12, deadline=None)
@given(
    tree=trees,
    way=st.sampled_from(list(WAYS)),
    kind=st.sampled_from(["none", "number", "tensor", "by leaf"]),
    donate=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_fused_recipe_is_the_chain(
    name: str, tree: Any, way: str, kind: str, donate: bool, seed: int
) -> None:
    opt = WAYS[way](RECIPES[name]())
    fused = fs.fuse(opt, donate=donate)
    params = tensors(tree, 1, seed)
    state = opt.init(params)
    hyper = hyper_of(kind, opt, params)
    for number in range(3):
        grads, before = tensors(tree, 2, seed + 100 * (1 + number)), copy_of((params, state))
        with ExactRoots():
            expected = opt(copy_of(params), grads, before[1], hyper)
            params, state = fused(params, grads, state, hyper)
        assert_near((params, state), expected, before, ulps=0)
