"""A guard lets trees pass that are just like the known ones, and no others; with torch's own check
and without it.
"""

import sys

import pytest
import torch
from torch import Tensor, nn

from functional_sgd.guard import Guard
from functional_sgd.tree import flatten


def params() -> dict[str, Tensor]:
    return {"a": torch.ones(3, 4), "b": torch.zeros(4, 4, dtype=torch.float64), "c": torch.ones(())}


@pytest.fixture(params=["torch's check", "ours"])
def guard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Guard:
    if request.param == "ours":
        monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)
    leaves, spec = flatten(params())
    return Guard(spec, [leaves, leaves])


def test_other_tensors_of_the_same_kind_pass(guard: Guard) -> None:
    one, other = params(), {name: value + 1 for name, value in params().items()}
    found = guard.flatten((one, other))
    assert found is not None
    assert [
        [value is leaf for value, leaf in zip(column, tree.values(), strict=True)]
        for column, tree in zip(found.columns, (one, other), strict=True)
    ] == [[True] * 3] * 2
    wanted = [[value.data_ptr() for value in tree.values()] for tree in (one, other)]
    assert [column.tolist() for column in found.addresses] == wanted


class Sub(Tensor):
    """Another class."""


DIFFERENT = {
    "dtype": lambda value: value.to(torch.float16),
    "shape": lambda value: value[:2],
    "order in memory": lambda value: torch.empty_strided(value.shape, (1, value.shape[0])),
    "gaps in memory": lambda value: torch.ones(
        value.shape[0], 2 * value.shape[1], dtype=value.dtype
    )[:, ::2],
    "requires_grad": lambda value: value.clone().requires_grad_(),
    "parameter": lambda value: nn.Parameter(value, requires_grad=False),
    "class": lambda value: value.as_subclass(Sub),
    "negated": torch._neg_view,
    "device": lambda value: value.to("meta"),
    "layout": lambda value: value.to_sparse(),
    "none": lambda value: None,
    "number": lambda value: 1.0,
    "complex": lambda value: value + 0j,
}


@pytest.mark.parametrize("change", DIFFERENT.values(), ids=DIFFERENT)
@pytest.mark.parametrize("place", [0, 1])
def test_a_tensor_of_another_kind_does_not_pass(guard: Guard, change, place: int) -> None:  # type: ignore[no-untyped-def]
    trees = [params(), params()]
    trees[place]["a"] = change(trees[place]["a"])
    assert guard.flatten(trees) is None


def test_a_transposed_square_does_not_pass(guard: Guard) -> None:
    assert guard.flatten(({**params(), "b": params()["b"].t()}, params())) is None


@pytest.mark.parametrize(
    "tree", [{}, {"a": torch.ones(3, 4)}, [1, 2, 3], None, 3.0, {**params(), "d": torch.ones(1)}]
)
def test_a_tree_of_another_structure_does_not_pass(guard: Guard, tree: object) -> None:
    assert guard.flatten((params(), tree)) is None


NESTED = {"a": [torch.ones(1), {"b": torch.ones(1), "c": (torch.ones(1),)}], "d": None}


@pytest.mark.parametrize(
    "other",
    [
        {"a": [torch.ones(1), {"b": torch.ones(1), "x": (torch.ones(1),)}], "d": None},
        {
            "a": [torch.ones(1), {"b": torch.ones(1), "c": (torch.ones(1), torch.ones(1))}],
            "d": None,
        },
        {"a": (torch.ones(1), {"b": torch.ones(1), "c": (torch.ones(1),)}), "d": None},
        {"a": [torch.ones(1)], "d": None},
        {"a": torch.ones(1), "d": None},
        {"a": [torch.ones(1), {"b": torch.ones(1), "c": (torch.ones(1),)}]},
    ],
)
def test_trees_of_another_model_are_told_apart_without_a_look_at_their_tensors(
    other: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of optree has the whole tree in its message: seconds, for a large model, and a wait
    for a GPU.
    """
    leaves, spec = flatten(NESTED)
    guard = Guard(spec, [leaves])
    monkeypatch.setattr(Tensor, "__repr__", lambda self: pytest.fail("it was written out"))
    assert guard.flatten([other]) is None
    assert guard.flatten([NESTED]) is not None


def test_inference_tensors_do_not_pass(guard: Guard) -> None:
    with torch.inference_mode():
        inner = params()
    assert guard.flatten((inner, params())) is None


def test_the_tensors_are_not_kept_alive() -> None:
    import weakref

    leaves, spec = flatten(params())
    guard = Guard(spec, [leaves])
    refs = [weakref.ref(leaf) for leaf in leaves]
    del leaves
    assert all(ref() is None for ref in refs)
    assert guard.flatten((params(),)) is not None


def test_a_tree_with_another_branch_between_the_first_and_the_last_does_not_pass() -> None:
    x = torch.ones(1)
    leaves, spec = flatten({"a": x, "b": {"w": x}, "c": x})
    assert Guard(spec, [leaves]).flatten([{"a": x, "x": {"w": x}, "c": x}]) is None
