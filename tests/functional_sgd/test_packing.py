"""pack: one flat tensor for each dtype, the tree again, and the same steps."""

from typing import Any

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from functional_sgd import apply, fuse, pack, split, value_and_grad
from tests.catalogue import RECIPES
from tests.comparing import Untouched, assert_close, assert_same

ELEMENTWISE = ["sgd", "momentum", "adam", "adamw", "lion", "rmsprop", "radam"]


def tree(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"body": [(3, 4), (4,)], "head": [(), (2, 1, 3)], "empty": [(0, 5)]}
    return {
        name: [torch.randn(s, generator=generator).to(dtype) for s in own]
        for name, own in shapes.items()
    }


def test_by_hand() -> None:
    flat, packing = pack([torch.tensor([[1.0, 2.0]]), torch.tensor(3.0)])
    assert_same(flat, {"float32": torch.tensor([1.0, 2.0, 3.0])})
    assert_same(
        packing.unpack({"float32": torch.tensor([4.0, 5.0, 6.0])}),
        [torch.tensor([[4.0, 5.0]]), torch.tensor(6.0)],
    )


def test_there_and_back_is_nothing() -> None:
    params = tree()
    untouched = Untouched(params)
    flat, packing = pack(params)
    assert_same(packing.unpack(flat), params)
    assert_same(packing(packing.unpack(flat)), flat)
    flat["float32"].zero_()
    untouched.check()


def test_every_dtype_has_its_own() -> None:
    params = {
        "a": torch.ones(2),
        "b": torch.ones(3, dtype=torch.float64),
        "c": torch.zeros(1),
        "d": torch.ones(1) + 1j,
    }
    flat, packing = pack(params)
    assert {name: len(value) for name, value in flat.items()} == {
        "float32": 3,
        "float64": 3,
        "complex64": 1,
    }
    assert_same(packing.unpack(flat), params)


def test_gradients_arrive_flat() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    params, buffers = split(model)
    flat, packing = pack(params)
    x = torch.randn(5, 3)

    def loss(params: Any) -> Tensor:
        result: Tensor = apply(model, params, buffers, x)[0].square().mean()
        return result

    value, grads = value_and_grad(loss)(params)
    flat_value, flat_grads = value_and_grad(lambda flat: loss(packing.unpack(flat)))(flat)
    assert_same(flat_value, value)
    assert_same(flat_grads, packing(grads))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_chains_take_the_same_steps(name: str, fused: bool) -> None:
    opt = fuse(RECIPES[name]()) if fused else RECIPES[name]()
    params = tree()
    grads = optree.tree_map(lambda leaf: leaf * 0.1 + 0.01, params)
    flat, packing = pack(params)
    state, flat_state = opt.init(params), opt.init(flat)
    for _ in range(5):
        params, state = opt(params, grads, state)
        flat, flat_state = opt(flat, packing(grads), flat_state)
    assert_close(packing.unpack(flat), params, rtol=1e-6, atol=1e-7)


@given(st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=6))
@settings(max_examples=40, deadline=None)
def test_any_shapes(shapes: list[list[int]]) -> None:
    params = [torch.randn(shape) for shape in shapes]
    flat, packing = pack(params)
    assert_same(packing.unpack(flat), params)


def test_vmap_over_members() -> None:
    flat, packing = pack(tree())
    members = {name: torch.stack([value, value + 1]) for name, value in flat.items()}
    found = torch.vmap(packing.unpack)(members)
    assert_same(
        optree.tree_map(lambda leaf: leaf[1], found),
        packing.unpack({n: v + 1 for n, v in flat.items()}),
    )


def test_errors() -> None:
    flat, packing = pack(tree())
    with pytest.raises(
        TypeError, match="pack: expected a tree of tensors, got a leaf of type float"
    ):
        pack({"a": 1.0})
    with pytest.raises(ValueError, match="'empty.0' is missing"):
        packing({"body": tree()["body"]})
    with pytest.raises(ValueError, match=r"expected a leaf of shape \(3, 4\), got \(4, 3\)"):
        packing({**tree(), "body": [torch.ones(4, 3), torch.ones(4)]})
    with pytest.raises(ValueError, match="unpack: expected flat tensors float32, got float64"):
        packing.unpack({"float64": flat["float32"]})
    with pytest.raises(ValueError, match="float32 must have 23 elements in one axis"):
        packing.unpack({"float32": flat["float32"][:5]})


def test_a_leaf_of_another_dtype_is_an_error() -> None:
    """It would lie in the flat tensor called float32."""
    packing = pack({"w": torch.ones(2)})[1]
    with pytest.raises(ValueError, match=r"expected a leaf of torch.float32, got torch.float64"):
        packing({"w": torch.ones(2).double()})
