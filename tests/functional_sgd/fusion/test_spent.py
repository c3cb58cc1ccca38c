"""Donated trees: what cannot be overwritten is refused, and so is what has been overwritten."""

import optree
import pytest
import torch

import functional_sgd as fs
from functional_sgd import chain, elementwise, fuse, norm
from functional_sgd.fusion.backends.c.launch import CBackend
from functional_sgd.fusion.backends.foreach import ForeachBackend
from functional_sgd.fusion.buffers import LARGE
from tests.comparing import Untouched, assert_same, copy_of
from tests.functional_sgd.fusion.helpers import draw


def refused(opt, params, state, match):
    """The step is refused, and nothing was written to."""
    given = Untouched(params, state)
    with pytest.raises(ValueError, match=match):
        opt(params, optree.tree_map(torch.ones_like, params), state)
    given.check()


@pytest.mark.parametrize("debug", [False, True], ids=["usual", "debug"])
def test_donating_tied_leaves_is_refused(debug):
    """Both steps would hit both: 0.8 for 0.9."""
    tied, fused = torch.ones(3), fuse(fs.sgd(lr=0.1), donate=True, debug=debug)
    params = {"embed": {"w": tied}, "head": tied}
    refused(fused, params, fused.init(params), "param 'embed.w' and param 'head' share memory")
    pure, _ = fuse(fs.sgd(lr=0.1))(params, copy_of(params), fused.init(params))
    assert_same(pure, {"embed": {"w": torch.full((3,), 0.9)}, "head": torch.full((3,), 0.9)})


OVERLAPPING = {
    "shifted": lambda buffer: (buffer[:4], buffer[3:7]),
    "inside": lambda buffer: (buffer[:10], buffer[4:6]),
    "rows and columns": lambda buffer: (buffer.view(4, 5)[1], buffer.view(4, 5)[:, 2]),
    "a view of all": lambda buffer: (buffer, buffer.view(4, 5)),
}


@pytest.mark.parametrize("views", OVERLAPPING.values(), ids=OVERLAPPING)
def test_donating_overlapping_views_is_refused(views):
    params = dict(zip("ab", views(torch.zeros(20)), strict=True))
    fused = fuse(fs.sgd(lr=0.1), donate=True)
    refused(fused, params, fused.init(params), "param '[ab]' and param '[ab]' share memory, so a")


def test_views_that_begin_to_overlap_are_refused():
    """Though the trees are just like those of the steps before."""
    fused, buffer = fuse(fs.sgd(lr=0.1), donate=True), torch.zeros(20)
    params = {"a": buffer[:4], "b": buffer[10:14]}
    state = fused.init(params)
    for _ in range(3):
        params, state = fused(params, {"a": torch.ones(4), "b": torch.ones(4)}, state)
    refused(fused, {"a": buffer[:4], "b": buffer[2:6]}, state, "'a' and param 'b' share memory")


def test_a_slot_in_the_memory_of_a_param_is_refused():
    fused, params = fuse(fs.momentum(), donate=True), {"w": torch.ones(3)}
    state = {**fused.init(params), "grad_avg": {"w": params["w"]}}
    refused(fused, params, state, "param 'w' and grad_avg 'w' share memory")


def test_views_between_each_other_may_be_donated():
    """Columns of one matrix: their spans cross, their elements do not."""
    whole, fused = torch.zeros(4, 6), fuse(fs.sgd(lr=1.0), donate=True)
    params = {"query": whole[:, :2], "key": whole[:, 2:4], "value": whole[:, 4:]}
    grads = {name: torch.full((4, 2), n + 1.0) for n, name in enumerate(params)}
    fused(params, grads, fused.init(params))
    assert whole[0].tolist() == [-1, -1, -2, -2, -3, -3]


def test_what_has_no_memory_of_its_own_may_be_donated():
    fused, odd = fuse(fs.sgd(lr=0.5), donate=True), torch.ones(3).to_sparse()
    params = {"w": torch.ones(2), "empty": torch.zeros(0, 3), "none": torch.zeros(0), "odd": odd}
    after, _ = fused(params, copy_of(params), fused.init(params))
    assert after["w"].tolist() == [0.5, 0.5]
    assert odd.to_dense().tolist() == [0.5, 0.5, 0.5]


SPENT = {
    "params": lambda old, new: (old[0], new[1]),
    "state": lambda old, new: (new[0], old[1]),
    "both": lambda old, new: old,
}


@pytest.mark.parametrize("opt", [fs.adamw(), chain(fs.clip_norm, fs.centralize, fs.sgd(mom=0.9))])
@pytest.mark.parametrize("which", SPENT.values(), ids=SPENT)
def test_the_spent_message_is_reached(opt, which):
    """Its shape and the other checks do not come first."""
    fused = fuse(opt, donate=True, debug=True)
    params = {"body": {"w": torch.ones(2, 3)}, "head": torch.ones(())}
    old = (params, fused.init(params))
    grads = optree.tree_map(torch.ones_like, params)
    new = fused(params, grads, old[1])
    spent = which(old, new)
    match = "leaf 'body.w' was donated to an earlier step, .* Go on with the params and state that"
    with pytest.raises(ValueError, match=match):
        fused(spent[0], grads, spent[1])
    fused(new[0], grads, new[1])


def test_a_spent_tree_is_no_use_to_anybody_else():
    fused, params = fuse(fs.sgd(lr=0.1), donate=True, debug=True), {"w": torch.ones(2)}
    fused(params, {"w": torch.ones(2)}, fused.init(params))
    assert params["w"].isnan().all()
    assert params["w"].shape == (2,)


def test_a_tree_with_a_leaf_that_no_kernel_treats_is_spent_as_a_whole():
    fused = fuse(fs.sgd(lr=0.5), donate=True, debug=True)
    params = {"z": torch.ones(2, dtype=torch.complex64), "w": torch.ones(2)}
    grads = optree.tree_map(torch.ones_like, params)
    new, state = fused(params, grads, fused.init(params))
    assert_same(new["w"], torch.full((2,), 0.5))
    assert_same(new["z"], torch.full((2,), 0.5, dtype=torch.complex64))
    with pytest.raises(ValueError, match="leaf 'w' was donated to an earlier step"):
        fused(params, grads, state)
    fused(new, grads, state)


def test_a_spent_gradient_is_refused_too():
    fused = fuse(fs.sgd(lr=0.5), donate="grads", debug=True)
    params, grads = {"w": torch.ones(LARGE)}, {"w": torch.ones(LARGE)}
    new, state = fused(params, grads, fused.init(params))
    assert_same((params, new), ({"w": torch.ones(LARGE)}, {"w": torch.full((LARGE,), 0.5)}))
    with pytest.raises(ValueError, match="leaf 'w' was donated to an earlier step"):
        fused(new, grads, state)


def test_leaves_that_no_kernel_treats_are_not_tracked_either() -> None:
    """Complex leaves run with torch: a donated step is not differentiated, so nothing is kept."""
    opt = fuse(fs.rmsprop(lr=0.1, wd=0.1), donate=True)
    params = {"w": torch.ones(3, dtype=torch.complex64, requires_grad=True)}
    grads, state = {"w": torch.ones(3, dtype=torch.complex64)}, opt.init(params)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        opt(params, grads, state)
    assert not kept


@elementwise(seen=torch.zeros_like)
def look_back(param, grad, seen, *, size=norm("param")):
    """Reads the gradient in a pass after that which moves the params and takes their norm."""
    return dict(seen=grad * size)


LATE_READ = chain(fs.heavy_ball, fs.sgd_step, look_back, lr=0.1)


@pytest.mark.parametrize("part", [slice(0, 4), slice(1, 5)], ids=["the same", "shifted"])
def test_a_gradient_in_the_memory_of_a_param_is_read_as_it_was(part):
    """Also by a pass that comes after the one that overwrites the param; and in later steps."""
    fused = fuse(LATE_READ, donate=True)
    for number in range(3):
        memory = draw((5,), torch.float32, number)
        params, grads = {"w": memory[:4]}, {"w": memory[part]}
        expected = LATE_READ(params, grads, LATE_READ.init(params))
        found = fused(params, grads, fused.init(params))
        torch.testing.assert_close(found, expected)


def test_a_gradient_in_the_memory_of_a_slot_is_read_as_it_was():
    params, slot = {"w": draw((4,), torch.float32, 1)}, draw((4,), torch.float32, 2)
    state = {**LATE_READ.init(params), "velocity": {"w": slot}}
    expected = LATE_READ(params, {"w": slot}, state)
    found = fuse(LATE_READ, donate=True)(params, {"w": slot}, state)
    torch.testing.assert_close(found, expected)


def test_gradients_apart_from_params_are_not_copied(monkeypatch):
    fused, params = fuse(LATE_READ, donate=True), {"w": torch.ones(4)}
    state = fused.init(params)
    monkeypatch.setattr(torch.Tensor, "clone", None)
    fused(params, {"w": torch.ones(4)}, state)


@pytest.mark.parametrize("debug", [False, True], ids=["usual", "debug"])
def test_a_gradient_in_the_memory_of_another_leaf_is_read_before_that_is_written(debug):
    """One pass is enough: it writes leaf after leaf."""
    params = {"x": torch.tensor([1.0]), "y": torch.tensor([2.0])}
    one = fuse(fs.sgd(lr=0.5), donate=True, debug=debug)
    moved, _ = one(params, {"x": params["y"], "y": params["x"]}, one.init(params))
    assert (moved["x"].item(), moved["y"].item()) == (0.0, 1.5)


def test_a_gradient_may_be_a_shifted_view_of_its_param():
    memory = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    one, params = fuse(fs.sgd(lr=0.5), donate=True), {"x": memory[:4]}
    moved, _ = one(params, {"x": memory[1:]}, one.init(params))
    assert moved["x"].tolist() == [0.0, 0.5, 1.0, 1.5]


def test_that_is_found_at_any_step():
    """Also where earlier steps had gradients of their own."""
    one, params = fuse(fs.sgd(lr=0.5), donate=True), {"x": torch.ones(1), "y": torch.ones(1)}
    state = one.init(params)
    for _ in range(3):
        params, state = one(params, {"x": torch.zeros(1), "y": torch.zeros(1)}, state)
    params["x"].fill_(1.0)
    params["y"].fill_(2.0)
    moved, _ = one(params, {"x": params["y"], "y": params["x"]}, state)
    assert (moved["x"].item(), moved["y"].item()) == (0.0, 1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", [ForeachBackend, CBackend])
def test_a_reduction_is_of_what_was_there_before_the_pass(backend, dtype):
    @elementwise(seen=torch.zeros_like)
    def note_mean(param, seen, *, size=fs.mean(lambda param: param)):
        return dict(seen=param * 0 + size)

    opt = fuse(chain(note_mean, fs.sgd_step, lr=1.0), donate=True, backends=[backend()])
    params = {"w": torch.tensor([1.0, 2.0, 3.0], dtype=dtype)}
    _, state = opt(params, {"w": torch.full((3,), 10.0, dtype=dtype)}, opt.init(params))
    assert state["seen"]["w"].tolist() == [2.0, 2.0, 2.0]
