"""Whose memory is whose: a pure step overwrites nothing that anybody holds, a donating one what it
is given.
"""

import io
import subprocess
import sys
import threading

import optree
import pytest
import torch

import functional_sgd as fs
from functional_sgd import chain, elementwise, fuse, leafwise, treewise
from functional_sgd.fusion import fused
from functional_sgd.fusion.backends.foreach import ForeachBackend
from functional_sgd.fusion.buffers import LARGE
from tests.catalogue import RECIPES
from tests.comparing import Untouched, assert_same, copy_of
from tests.functional_sgd.fusion.helpers import (
    check_steps,
    draw,
    grads_for,
    memory_of,
    odd_tree,
    plain_tree,
)
from tests.functional_sgd.user_rules import add_last, remember

NAMES = ["adamw", "lamb", "larc", "clip_norm_adam", "centralize_sgd", "lookahead_sgd", "sgd"]


@leafwise(previous=torch.clone)
def remember_leaf(param, previous):
    return dict(previous=param)


@treewise(last_grad=torch.zeros_like)
def remember_tree(grad, last_grad):
    return dict(last_grad=grad)


@leafwise
def jump(update):
    return dict(param=update)


@elementwise(previous=torch.zeros_like)
def swap(param, previous):
    return dict(param=previous, previous=param)


@elementwise(one=torch.clone, other=torch.zeros_like)
def take_turns(one, other):
    return dict(one=other, other=one)


KEEPERS = {
    "slot_is_grad": chain(add_last, fs.sgd_step, lr=0.1),
    "slot_is_param": chain(remember, fs.sgd_step, lr=0.1),
    "slot_is_new_param": chain(fs.sgd_step, remember, lr=0.1),
    "leafwise_slot_is_param": chain(remember_leaf, fs.sgd_step, lr=0.1),
    "leafwise_slot_is_new_param": chain(fs.sgd_step, remember_leaf, lr=0.1),
    "treewise_slot_is_grad": chain(remember_tree, fs.sgd_step, lr=0.1),
    "param_is_grad": chain(jump),
    "swap": chain(swap),
}


@pytest.mark.parametrize("backends", [fused.BACKENDS, (ForeachBackend(),)], ids=["own", "foreach"])
def test_donated_columns_that_change_places_keep_what_they_held(backends):
    """In kernels, with foreach operators, and leaf by leaf (strided)."""
    params = {name: draw((8,), torch.float32, 1) for name in ("dense", "strided")}
    params["strided"] = params["strided"][::2]
    first, opt = copy_of(params), chain(take_turns, fs.sgd_step, lr=0.1)
    donated, zeros = (
        fuse(opt, donate=True, backends=backends),
        optree.tree_map(torch.zeros_like, first),
    )
    params, state = donated(params, grads_for(params, 1), opt.init(params))
    assert_same((state["one"], state["other"]), (zeros, first))
    params, state = donated(params, grads_for(params, 2), state)
    assert_same((state["one"], state["other"]), (first, zeros))


@pytest.mark.parametrize("tree", [plain_tree, odd_tree])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_is_held_is_ever_overwritten(name, tree):
    opt = fuse(RECIPES[name]())
    params = tree(torch.float32)
    state = opt.init(params)
    held = []
    for number in range(10):
        grads = grads_for(params, number)
        held.append(Untouched(params, grads, state))
        params, state = opt(params, grads, state)
    for old in held:
        old.check()


@pytest.mark.parametrize("opt", KEEPERS.values(), ids=KEEPERS)
def test_results_share_no_memory_with_arguments(opt):
    params = {
        "w": draw((3, 4), torch.float32, 1),
        "b": draw((4,), torch.float32, 2),
        "s": torch.tensor(3.0),
    }
    state, fused = opt.init(params), fuse(opt)
    for number in range(3):
        grads = grads_for(params, number)
        before = Untouched(params, grads, state)
        new_params, new_state = fused(params, grads, state)
        slots = {name: value for name, value in new_state.items() if name != "step"}
        before.check()
        assert_same((new_params, new_state), opt(params, grads, state))
        assert not memory_of((new_params, slots)) & memory_of((params, grads, state))
        assert len(memory_of((new_params, slots))) > len(slots), (
            "a slot shares the memory of another column"
        )
        params, state = new_params, new_state


@pytest.mark.parametrize("opt", KEEPERS.values(), ids=KEEPERS)
def test_donated_columns_do_not_run_into_each_other(opt):
    params = {"w": draw((3, 4), torch.float32, 1), "b": draw((4,), torch.float32, 2)}
    pure, donated = (params, opt.init(params)), (copy_of(params), opt.init(params))
    fused = fuse(opt, donate=True)
    for number in range(3):
        grads = grads_for(params, number)
        keep = Untouched(grads)
        pure, donated = opt(pure[0], grads, pure[1]), fused(donated[0], grads, donated[1])
        keep.check()
        assert_same(donated, pure)


HOLDS = {
    "view": lambda leaf: leaf[:2],
    "numpy": lambda leaf: leaf.numpy(),
    "detached": lambda leaf: leaf.detach(),
    "storage": lambda leaf: leaf.untyped_storage(),
    "dlpack": lambda leaf: torch.from_dlpack(leaf),
    "parameter": lambda leaf: torch.nn.Parameter(leaf),
    "alias": lambda leaf: torch.ops.aten.alias(leaf),
}


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_a_view_of_an_old_leaf_keeps_its_numbers(hold):
    opt = fuse(fs.adamw(lr=0.1))
    params = {"a": torch.ones(LARGE), "b": torch.ones(LARGE + 3)}
    params, state = opt(params, params, opt.init(params))
    held, numbers = hold(params["b"]), params["b"].tolist()
    for number in range(4):
        params, state = opt(params, grads_for(params, number), state)
    value = (
        torch.empty(0).set_(held)[-LARGE - 3 :] if isinstance(held, torch.UntypedStorage) else held
    )
    found = value.tolist()
    assert found == numbers[: len(found)]


def test_a_tensor_saved_for_backward_keeps_its_numbers():
    opt = fuse(fs.sgd(lr=0.1))
    params, grads = [torch.ones(LARGE)], [torch.ones(LARGE)]
    params, state = opt(params, grads, opt.init(params))
    expected = params[0].clone()
    x = torch.ones(LARGE, requires_grad=True)
    loss = (x * params[0]).sum()
    for _ in range(4):
        params, state = opt(params, grads, state)
    loss.backward()
    assert torch.equal(x.grad, expected)


FREED = {
    "clip, larc": chain(fs.clip_norm, fs.larc(lr=0.1)),
    "value, larc": chain(fs.clip_value, fs.larc(lr=0.1)),
    "l2, larc": chain(fs.l2_reg, fs.larc(lr=0.1), wd=0.1),
    "decay, value, clip, adam": chain(fs.weight_decay, fs.clip_value, fs.clip_norm, fs.adam()),
    "centralize, clip, larc": chain(fs.centralize, fs.clip_norm, fs.larc(lr=0.1)),
    "lamb": fs.lamb(lr=0.1),
}


def turned(leaf, seed):
    return draw(leaf.shape[::-1], leaf.dtype, seed).permute(tuple(reversed(range(leaf.dim()))))


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("opt", FREED.values(), ids=FREED)
def test_a_kernel_never_reads_memory_that_was_freed(opt, donate):
    """Gradients that lie otherwise than their params are copied; the copies, and what torch makes
    of them, must live until every kernel has run that was given their addresses.
    """
    params = [draw((64, 64), torch.float32, seed) for seed in range(6)]
    images = [draw((8, 3, 4, 4), torch.float32, 7).contiguous(memory_format=torch.channels_last)]

    def grads(params, number):
        return [turned(leaf, 10 * number + place) for place, leaf in enumerate(params)]

    check_steps(opt, params, donate, grads=grads)
    check_steps(opt, params, donate)  # contiguous ones, too
    check_steps(opt, [*images, *params], donate, grads=grads)


QUEUE = """
import torch, torch.multiprocessing as mp
from functional_sgd import fuse, sgd

def read(queue, go, back):
    received = queue.get()
    go.wait()
    back.put(received[0].mean().item())

if __name__ == "__main__":
    context = mp.get_context("fork")
    queue, go, back = context.SimpleQueue(), context.Event(), context.SimpleQueue()
    reader = context.Process(target=read, args=(queue, go, back))
    reader.start()
    opt, params, grads = fuse(sgd(lr=0.1)), [torch.ones(100_000)], [torch.ones(100_000)]
    state = opt.init(params)
    for step in range(8):
        params, state = opt(params, grads, state)
        if step == 0:
            queue.put(params)
    go.set()
    print(back.get())
    reader.join()
"""


def test_results_that_were_sent_to_another_process_stay():
    """Through a queue: how long the other process reads them, nobody knows here."""
    done = subprocess.run(
        [sys.executable, "-c", QUEUE], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert float(done.stdout) == pytest.approx(0.9)


def test_memory_is_used_again_once_it_is_dropped():
    opt = fuse(fs.adamw())
    params = [torch.ones(20_000), torch.ones(LARGE)]
    state, seen = opt.init(params), set()
    for _ in range(20):
        params, state = opt(params, params, state)
        seen |= memory_of((params, state["grad_avg"], state["sqr_avg"]))
    assert len(seen) <= 3 * 3


def test_leaves_can_be_written_to_one_by_one():
    """A leaf that was saved for backward does not mind that another leaf is written to."""
    opt = fuse(fs.sgd(lr=0.1))
    params = {"a": torch.ones(LARGE), "b": torch.ones(LARGE)}
    params, _ = opt(params, params, opt.init(params))
    x = torch.ones(LARGE, requires_grad=True)
    loss = (x * params["a"]).sum()
    params["b"].zero_()
    loss.backward()
    assert torch.equal(x.grad, params["a"])


def test_a_saved_tree_is_as_large_as_the_tree():
    """Leaves of a column share a buffer, which torch.save writes once: for the tree that is as much
    as it should be.
    """
    opt = fuse(fs.sgd(lr=0.1))
    params = {"a": torch.ones(100_000), "b": torch.ones(3)}
    params, _ = opt(params, params, opt.init(params))
    file = io.BytesIO()
    torch.save(params, file)
    assert file.tell() < 410_000


@pytest.mark.parametrize(
    "name", ["adamw", "sgd", "lookahead_sgd", "clip_norm_adam", "larc", "lamb"]
)
def test_donated_results_are_the_buffers_that_were_given(name):
    opt = fuse(RECIPES[name](), donate=True)
    params = odd_tree(torch.float32)
    state = opt.init(params)
    where = [leaf.data_ptr() for leaf in optree.tree_leaves((params, {**state, "step": None}))]
    for number in range(3):
        params, state = opt(params, grads_for(params, number), state)
        assert [
            leaf.data_ptr() for leaf in optree.tree_leaves((params, {**state, "step": None}))
        ] == where


def test_donating_allocates_nothing_that_grows():
    opt = fuse(fs.adamw(), donate=True)
    params = [torch.ones(500_000), torch.ones(500_000)]
    grads, state = copy_of(params), opt.init(params)
    params, state = opt(params, grads, state)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        opt(params, grads, state)
    assert sum(max(event.cpu_memory_usage, 0) for event in profile.events()) < 10_000


def test_a_spent_tree_is_an_error_that_names_the_leaf(monkeypatch):
    monkeypatch.setenv("FUNCTIONAL_SGD_DEBUG", "1")
    for opt in (fuse(fs.adamw(), donate=True), fuse(fs.adamw(), donate=True, debug=True)):
        params = {"body": {"w": torch.ones(2)}, "head": torch.ones(3), "idle": torch.ones(1)}
        grads = {"body": {"w": torch.ones(2)}, "head": torch.ones(3), "idle": None}
        state = opt.init(params)
        new_params, new_state = opt(params, grads, state)
        for spent in (
            (params, state),
            (new_params, state),
            ({**new_params, "body": params["body"]}, new_state),
        ):
            with pytest.raises(ValueError, match="body.w"):
                opt(spent[0], grads, spent[1])
        again, _ = opt(new_params, grads, new_state)
        assert again["body"]["w"].shape == (2,)


def test_debug_changes_no_numbers():
    opt = fs.adamw()
    params = plain_tree(torch.float32)
    runs = [(copy_of(params), opt.init(params)) for _ in range(2)]
    fused = [fuse(opt, donate=True, debug=True), fuse(opt, donate=True, debug=False)]
    for number in range(3):
        runs = [one(p, grads_for(p, number), s) for one, (p, s) in zip(fused, runs, strict=True)]
    assert_same(*runs)


def test_debug_does_not_matter_without_donation(monkeypatch):
    monkeypatch.setenv("FUNCTIONAL_SGD_DEBUG", "1")
    opt, params = fuse(fs.sgd(lr=0.1)), [torch.ones(2)]
    state = opt.init(params)
    assert_same(opt(params, params, state), opt(params, params, state))


def test_threads_may_share_a_fused_optimizer():
    opt = fs.adamw(lr=0.1)
    fused, failed = fuse(opt), []

    def work(seed):
        params = [draw((30_000,), torch.float32, seed)]
        state = expected_state = opt.init(params)
        expected = params
        for number in range(20):
            expected, expected_state = alone[seed](
                expected, grads_for(expected, number), expected_state
            )
            params, state = fused(params, grads_for(params, number), state)
            if not torch.equal(params[0], expected[0]):
                failed.append(number)

    alone = [fuse(opt) for _ in range(4)]
    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed


def test_a_call_is_not_confused_by_another_thread_between_its_checks_and_its_kernels(monkeypatch):
    """Trees that differ in nothing but their layout belong to one group; the calls alternate."""
    opt, fused_opt = fs.sgd(lr=0.5), fuse(fs.sgd(lr=0.5))
    params = [draw((3, 4), torch.float32, 1)]
    usual, other = [draw((3, 4), torch.float32, 2)], [draw((4, 3), torch.float32, 3).T]
    state = opt.init(params)
    expected = [opt(params, grads, state) for grads in (usual, other)]
    for first, second in ((usual, other), (other, usual)):
        for _ in range(2):
            fused_opt(params, first, state)  # until it is recognised
        real = fused.take_apart

        def interrupted(*args, real=real, second=second):
            leaves = real(*args)
            monkeypatch.setattr(fused, "take_apart", real)
            fused_opt(params, second, state)
            return leaves

        monkeypatch.setattr(fused, "take_apart", interrupted)
        found = fused_opt(params, first, state)
        assert_same(found, expected[0 if first is usual else 1])
