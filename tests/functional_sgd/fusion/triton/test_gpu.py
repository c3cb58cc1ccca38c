"""On a GPU: fused chains do what they do leaf by leaf, in one launch for each pass, and the host
never waits.
"""

from contextlib import contextmanager

import optree
import pytest
import torch

import functional_sgd as fs
from functional_sgd import by_path, chain, fuse
from tests.catalogue import RECIPES
from tests.comparing import Untouched, assert_close, copy_of
from tests.functional_sgd.fusion.helpers import (
    assert_near,
    check_steps,
    draw,
    grads_for,
    kinds,
    odd_tree,
    tolerance_of,
)
from tests.functional_sgd.fusion.test_operators import ALL, rule_of, stay, table
from tests.functional_sgd.fusion.triton.helpers import odd_sizes

if not torch.cuda.is_available():  # a thousand tests, which would be collected one by one
    pytest.skip("there is no GPU", allow_module_level=True)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
donating = pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])


def gpu(tree):
    return optree.tree_map(
        lambda leaf: leaf if leaf is None else leaf.cuda(), tree, none_is_leaf=True
    )


def gpu_grads(params, number):
    return gpu(grads_for(params, number))


def check(opt, params, donate=False, **more):
    return check_steps(opt, gpu(params), donate, grads=gpu_grads, **more)


@contextmanager
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launches(function):
    """How many kernels of ours a call launches."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum("fused_rules" in event.name for event in profile.events())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@donating
@pytest.mark.parametrize("name", RECIPES)
def test_a_fused_recipe_equals_the_chain(name, donate, dtype):
    opt = RECIPES[name]()
    params, state = check(opt, {**odd_sizes(dtype), "long": draw((70_001,), dtype, 3)}, donate)
    late = {**state, "step": torch.full_like(state["step"], 40)}
    grads, before = gpu_grads(params, 9), copy_of((params, late))
    expected = opt(before[0], grads, before[1])
    found = fuse(opt, donate=donate)(params, grads, late)
    assert_near(found, expected, before, **tolerance_of(opt))


@donating
@pytest.mark.parametrize("name", ["adamw", "lamb", "clip_norm_adam", "centralize_sgd"])
def test_leaves_of_every_layout(name, donate):
    check(RECIPES[name](), odd_tree(torch.float32), donate)
    check(RECIPES[name](), odd_tree(torch.complex64), donate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_functions_give_what_torch_gives_there(dtype):
    """To a few roundings: CUDA's functions are called by both, with other fused multiply-adds."""
    opt = chain(*map(rule_of, ALL), stay)
    x, y = (values.cuda() for values in table(dtype))
    state = opt.init([y])
    found, expected = (one([y], [x], state)[1] for one in (fuse(opt), opt))
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    plain = [v.isfinite() & ((v == 0) | (v.abs() >= tiny)) & (v.abs() < huge) for v in (x, y)]
    usual = plain[0] & plain[1] & ~((x / y).isinf() | (5 / x).isinf())
    for name in ALL:
        scale = torch.finfo(dtype).eps * 16
        (one,), (wanted,) = found[name], expected[name]
        size = torch.stack(
            [x.abs(), y.abs(), y * y, (x / y).abs(), wanted.abs(), torch.ones_like(x)]
        ).amax(0)
        good = (
            ((one - wanted).abs() <= scale * size)
            | (one == wanted)
            | (one.isnan() & wanted.isnan())
        )
        assert good[usual].all(), f"{name}: {x[usual & ~good][:3]} {y[usual & ~good][:3]}"


@donating
def test_leaves_that_begin_anywhere(donate):
    """Addresses that are no multiples of 16 bytes, and sizes that are none of 16 elements."""
    whole = draw((5000,), torch.float32, 1)

    def pieces(buffer):
        return [
            buffer[1:1025],
            buffer[1026:2050],
            buffer[2052:3076],
            buffer[3076:3076],
            buffer[3077:3080],
        ]

    params, opt = pieces(whole.cuda()), fs.adamw()
    fused, state = fuse(opt, donate=donate), opt.init(pieces(whole.cuda()))
    grads = pieces(draw((5000,), torch.float32, 2).cuda())
    before = copy_of((params, state))
    expected = opt(before[0], grads, before[1])
    assert_near(fused(params, grads, state), expected, before)


@donating
@pytest.mark.parametrize("name", ["adamw", "lamb", "clip_norm_adam", "radam"])
def test_the_host_never_waits(name, donate):
    opt = fuse(RECIPES[name](), donate=donate)
    params = gpu(odd_sizes(torch.float32))
    grads, state = gpu_grads(params, 1), opt.init(params)
    rate = torch.tensor(0.1, device="cuda")
    trees = [by_path(params, {"b*": 0.1, "*": 0.2}), by_path(params, {"b*": rate, "*": 0.2})]
    for value in (0.1, rate, *trees):
        params, state = opt(params, grads, state, dict(lr=value))
    with no_waiting():
        for value in (0.2, rate, *trees, 0.3, torch.tensor(0.1)):
            params, state = opt(params, grads, state, dict(lr=value))
        for _ in range(20):
            params, state = opt(params, grads, state)
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["adamw", "lamb", "clip_norm_adam", "sgd"])
@donating
def test_one_launch_for_each_pass(name, donate):
    opt = fuse(RECIPES[name](), donate=donate)
    params = gpu([draw((size,), torch.float32, size) for size in range(1, 400)])
    state = opt.init(params)
    assert launches(lambda: opt(params, params, state)) == kinds(opt).count("kernel")


def test_other_values_compile_nothing_again():
    opt, params = fuse(fs.adamw()), gpu(odd_sizes(torch.float32))
    state, grads = opt.init(params), gpu_grads(params, 1)
    for value in (0.1, 1, 0.0, 1e-300, 0.5):
        params, state = opt(params, grads, state, dict(lr=value))
    one = [torch.ones(1, device="cuda")]
    opt(one, one, opt.init(one))
    (kernel,) = opt.program.steps[0].compiled.values()
    assert [len(caches[0]) for caches in kernel.function.device_caches.values()] == [1]


@pytest.mark.parametrize("name", ["adamw", "clip_norm_adam", "lamb"])
def test_a_step_in_a_graph(name):
    """Replayed with other gradients and another learning rate, it is that many steps."""
    opt = RECIPES[name]()
    fused, start = fuse(opt, donate=True), gpu(odd_sizes(torch.float32))
    params, state = copy_of(start), opt.init(start)
    grads = optree.tree_map(torch.Tensor.contiguous, gpu_grads(start, 0))
    rate = torch.tensor(0.1, dtype=torch.float64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a step that is not captured, on copies: it compiles
        fused(copy_of(params), grads, copy_of(state), dict(lr=rate))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, after = fused(params, grads, state, dict(lr=rate))
        state["step"].copy_(after["step"])
    expected = start, opt.init(start)
    for number in range(4):
        optree.tree_map(lambda old, new: old.copy_(new), grads, gpu_grads(start, number))
        rate.fill_(0.1 / (1 + number))
        before = copy_of(expected)
        expected = opt(before[0], grads, before[1], dict(lr=rate))
        fuse(fs.adamw())(start, grads, fs.adamw().init(start))  # other work, with other tables
        graph.replay()
        assert_near((params, state), expected, before, **tolerance_of(opt))
        expected = copy_of((params, state))


def test_steps_on_several_streams():
    opt, params = fuse(fs.adamw()), gpu(odd_sizes(torch.float32))
    grads, state = gpu_grads(params, 1), opt.init(params)
    expected = opt(params, grads, state)
    torch.cuda.synchronize()
    results = []
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(opt(params, grads, state))
    torch.cuda.synchronize()
    for found in results:
        assert_close(found, expected)


@donating
def test_leaves_on_two_devices(donate):
    """Those on the CPU by C, those on the GPU by Triton; the counter is on the CPU."""
    for name in ("adamw", "lamb"):
        cpu, there = odd_sizes(torch.float32), gpu(odd_sizes(torch.float32))
        opt = RECIPES[name]()
        fused = fuse(opt, donate=donate)

        def grads(params, number):
            return {
                "cpu": grads_for(params["cpu"], number),
                "gpu": gpu_grads(params["gpu"], number),
            }

        check_steps(opt, {"cpu": cpu, "gpu": there}, donate, grads=grads, fused=fused)
        made = {
            type(one).__module__ for work in fused.program.steps for one in work.compiled.values()
        }
        assert {module.split(".")[-2] for module in made} == {"c", "triton"}


def test_a_pure_step_overwrites_nothing():
    opt = fuse(fs.adamw())
    params = gpu(odd_sizes(torch.float32))
    state, held = opt.init(params), []
    for number in range(10):
        grads = gpu_grads(params, number)
        held.append(Untouched(params, grads, state))
        params, state = opt(params, grads, state)
    for old in held:
        old.check()


def test_donating_allocates_nothing_that_grows():
    opt = fuse(fs.adamw(), donate=True)
    params = gpu([torch.ones(500_000), torch.ones(500_000)])
    grads, state = copy_of(params), opt.init(params)
    params, state = opt(params, grads, state)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    opt(params, grads, state)
    assert torch.cuda.max_memory_allocated() - before < 100_000
