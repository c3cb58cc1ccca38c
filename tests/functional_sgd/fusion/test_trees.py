"""Fused optimizers on trees of every kind: mixed dtypes, changing sets of gradients, changing
shapes, several trees.
"""

import optree
import pytest
import torch

import functional_sgd as fs
from functional_sgd import fuse
from tests.catalogue import RECIPES
from tests.comparing import assert_same, copy_of
from tests.functional_sgd.fusion.helpers import (
    check_steps,
    count_kernels,
    draw,
    grads_for,
    plain_tree,
)

NAMES = ["adamw", "lamb", "larc", "clip_norm_adam", "centralize_sgd", "clip_norm_inside", "ranger"]
donating = pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])


def mixed_tree():
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
    return {
        str(dtype): {"m": draw((3, 4), dtype, 1), "v": [draw((5,), dtype, 2), draw((), dtype, 3)]}
        for dtype in dtypes
    }


def mixed_reals():
    return {name: value for name, value in mixed_tree().items() if "complex" not in name}


@donating
@pytest.mark.parametrize("tree", [mixed_tree, mixed_reals])
@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes(name, tree, donate):
    check_steps(RECIPES[name](), tree(), donate=donate)


@donating
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_of_another_dtype(dtype, name, donate):
    others = {
        torch.float32: torch.bfloat16,
        torch.float64: torch.float32,
        torch.bfloat16: torch.float32,
    }

    def grads(params, number):
        return optree.tree_map(lambda g: g.to(others[dtype]), grads_for(params, number))

    check_steps(RECIPES[name](), plain_tree(dtype), donate, grads=grads)


@donating
@pytest.mark.parametrize("name", NAMES)
def test_another_set_of_gradients_each_step(name, donate):
    def grads(params, number):
        leaves, spec = optree.tree_flatten(grads_for({"t": params}, number)["t"])
        masks = [[0, 1], [1, 0], [1, 1], [0, 0], [1, 1]]
        return optree.tree_unflatten(
            spec, [g if masks[number][i % 2] else None for i, g in enumerate(leaves)]
        )

    params = {
        key: draw(shape, torch.float32, 5)
        for key, shape in zip("abcd", [(3, 4), (5,), (), (7,)], strict=True)
    }
    check_steps(RECIPES[name](), params, donate, steps=5, grads=grads)


@donating
@pytest.mark.parametrize("name", NAMES)
def test_trees_whose_shapes_change_between_calls(name, donate):
    opt = RECIPES[name]()
    fused = fuse(opt, donate=donate)
    for shapes in [
        [(3,), (2, 2)],
        [(4,), (2, 2)],
        [(2, 2), (3,)],
        [(2, 2)],
        [(70_000,)],
        [(3,), (2, 2)],
        [],
        [(0,)],
    ]:
        params = [draw(shape, torch.float32, 3) for shape in shapes]
        check_steps(opt, params, steps=2, fused=fused)


@donating
@pytest.mark.parametrize("name", NAMES)
def test_two_trees_in_turn(name, donate):
    opt = RECIPES[name]()
    fused = fuse(opt, donate=donate)
    trees = [
        plain_tree(torch.float32),
        optree.tree_map(lambda leaf: 2 * leaf, plain_tree(torch.float32)),
    ]
    alone = [check_steps(opt, tree, donate=donate) for tree in trees]
    runs = [(copy_of(tree), opt.init(tree)) for tree in trees]
    for number in range(3):
        runs = [fused(params, grads_for(params, number), state) for params, state in runs]
    assert_same(runs, alone)


def test_more_kinds_of_trees_than_are_remembered():
    opt = fs.adamw()
    fused = fuse(opt)
    for _ in range(2):
        for size in range(40):
            check_steps(opt, {"w": draw((size,), torch.float32, 3)}, steps=1, fused=fused)


@donating
def test_leaves_move_between_kinds(donate):
    """A tree with the same structure and shapes, but a leaf of another dtype."""
    opt = fs.adamw()
    fused = fuse(opt, donate=donate)
    for dtype in (torch.float32, torch.float64, torch.float32, torch.bfloat16):
        check_steps(
            opt,
            {"a": draw((4,), dtype, 1), "b": draw((4,), torch.float32, 2)},
            steps=2,
            donate=donate,
            fused=fused,
        )


@donating
def test_a_leaf_may_get_other_memory_between_calls(donate):
    """`tensor.data = ...` (as `module.to()` does) keeps the tensor and changes what is in it."""
    opt = fs.sgd(lr=0.5)
    fused = fuse(opt, donate=donate)
    params, state = fused([torch.zeros(3)], [torch.ones(3)], opt.init([torch.zeros(3)]))
    params[0].data = torch.full((3,), 10.0)
    params, state = fused(params, [torch.ones(3)], state)
    assert_same(params, [torch.full((3,), 9.5)])


@donating
def test_a_leaf_may_get_another_dtype_between_calls(donate):
    opt = fs.sgd(lr=0.5)
    fused = fuse(opt, donate=donate)
    params, state = fused([torch.zeros(3)], [torch.ones(3)], opt.init([torch.zeros(3)]))
    params[0].data = torch.full((3,), 10.0, dtype=torch.float64)
    params, state = fused(params, [torch.ones(3)], state)
    assert_same(params, [torch.full((3,), 9.5, dtype=torch.float64)])


@donating
def test_a_leaf_may_get_another_shape_between_calls(donate):
    opt = fs.sgd(lr=0.5)
    fused = fuse(opt, donate=donate)
    params, state = fused([torch.zeros(3)], [torch.ones(3)], opt.init([torch.zeros(3)]))
    params[0].data = torch.full((2,), 10.0)
    params, state = fused(params, [torch.ones(2)], state)
    assert_same(params, [torch.full((2,), 9.5)])


def test_a_leaf_may_be_turned_in_place_between_calls():
    opt = fs.sgd(lr=1.0)
    fused = fuse(opt)
    params, state = fused(
        [torch.zeros(2, 2)], [torch.tensor([[0.0, -1], [-2, -3]])], opt.init([torch.zeros(2, 2)])
    )
    params[0].t_()
    params, state = fused(params, [torch.zeros(2, 2)], state)
    assert_same(params, [torch.tensor([[0.0, 2], [1, 3]])])


def test_a_gradient_whose_sign_is_a_flag():
    """The imaginary part of a conjugate: memory holds the negative."""
    grad = torch.tensor([1 + 2j]).conj().imag
    assert grad.is_neg()
    opt = fs.sgd(lr=1.0)
    found, _ = fuse(opt)([torch.zeros(1)], [grad], opt.init([torch.zeros(1)]))
    assert_same(found, [torch.tensor([2.0])])


def test_a_parameter_whose_sign_is_a_flag():
    param = torch.tensor([1 + 2j]).conj().imag
    opt = fs.sgd(lr=1.0)
    found, _ = fuse(opt)([param], [torch.zeros(1)], opt.init([param]))
    assert_same([found[0].resolve_neg()], [torch.tensor([-2.0])])


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 4)])
@donating
def test_an_empty_leaf_keeps_its_shape(donate, shape):
    opt = fs.adamw()
    params, state = fuse(opt, donate=donate)(
        [torch.zeros(shape)], [torch.zeros(shape)], opt.init([torch.zeros(shape)])
    )
    assert params[0].shape == state["grad_avg"][0].shape == shape


def test_no_leaves_and_no_gradients():
    opt = fs.adamw()
    params = {"w": torch.ones(2)}
    for tree, grads in (({}, {}), (params, {"w": None})):
        assert_same(fuse(opt)(tree, grads, opt.init(tree)), opt(tree, grads, opt.init(tree)))


def test_the_same_tensor_at_two_places():
    """Tied leaves are two leaves, as they are leaf by leaf."""
    tied = torch.ones(3)
    opt = fs.adamw()
    params, grads = [tied, tied], [torch.ones(3), -torch.ones(3)]
    check_steps(opt, params, steps=1, grads=lambda *_: grads)
    assert_same(
        fuse(fs.sgd(lr=1.0))(params, grads, fs.sgd().init(params))[0],
        [torch.zeros(3), 2 * torch.ones(3)],
    )


@pytest.mark.parametrize("name", ["adamw", "clip_norm_adam", "centralize_sgd", "lamb"])
def test_as_many_kernels_for_many_leaves_as_for_few(monkeypatch, name):
    counts = []
    for leaves in (10, 1000):
        made = count_kernels(monkeypatch)
        params = [torch.ones(3) for _ in range(leaves)]
        opt = fuse(RECIPES[name]())
        opt(params, params, opt.init(params))
        counts.append(len(made))
        monkeypatch.undo()
    assert counts[0] == counts[1] <= 2


def test_errors_are_those_of_the_chain():
    opt = fs.adamw()
    params = {"w": torch.ones(2)}
    state = opt.init(params)
    cases = [
        (params, {"v": torch.ones(2)}, state, {}),
        (params, {"w": torch.ones(3)}, state, {}),
        (params, params, {}, {}),
        (params, params, state, dict(learning_rate=1.0)),
    ]
    for case in cases:
        with pytest.raises(ValueError, match=".") as plain:
            opt(*case)
        with pytest.raises(ValueError, match=".") as fused:
            fuse(opt)(*case)
        assert str(fused.value) == str(plain.value)
