"""The text of GPU kernels: what every operation gives, and what Triton makes of it."""

import re

import pytest
import torch

import functional_sgd as fs
from functional_sgd import all_finite, chain, fuse, largest, total
from functional_sgd.call import take_apart
from functional_sgd.fusion.backends.backend import Unavailable
from functional_sgd.fusion.backends.triton import launch
from functional_sgd.fusion.backends.triton.launch import TritonBackend
from functional_sgd.fusion.backends.triton.source import COMBINE
from functional_sgd.fusion.group import Group, signatures
from functional_sgd.fusion.kernel import Dtypes
from functional_sgd.fusion.passes import Pass
from functional_sgd.fusion.scalars import Scalars
from tests.catalogue import NARROW, RECIPES
from tests.functional_sgd.fusion.helpers import kinds, then_step
from tests.functional_sgd.fusion.test_operators import (
    ALL,
    SPOILED,
    assert_what_torch_gives,
    rule_of,
    stay,
    table,
)
from tests.functional_sgd.fusion.triton.helpers import interpreting, pretending

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def interpreted_results(request):
    """The dtype, and what an interpreted kernel and torch find for all expressions at once."""
    opt = chain(*map(rule_of, ALL), stay)
    x, y = table(request.param)
    state = opt.init([y])
    with interpreting():
        found = fuse(opt)([y], [x], state)[1]
    return request.param, found, opt([y], [x], state)[1]


@pytest.mark.parametrize("name", ALL)
def test_a_function_gives_what_torch_gives(name, interpreted_results):
    dtype, found, expected = interpreted_results
    assert_what_torch_gives(name, dtype, found[name][0], expected[name][0])


def compiled(opt, dtype=torch.float32):
    """The runners of every pass, compiled for an H200."""
    fused, params = fuse(opt), [torch.ones(4, dtype=dtype)]
    leaves = take_apart(opt.plan, params, params, opt.init(params), None, {})
    needs = fused.needs()
    (group,), _ = Group.split(signatures(leaves, needs), needs.columns, leaves)
    scalars, runners = Scalars(leaves), []
    for work in fused.program_for([group]).steps:
        assert isinstance(work, Pass)
        reads = tuple(group.dtypes.get(name, group.working) for name in work.reads)
        writes = tuple(group.dtypes.get(name, group.working) for name in work.outputs)
        dtypes = Dtypes(reads, writes, group.working, group.dtypes["param"])
        runners.append(TritonBackend().compile(work, dtypes, scalars, group))
        for take in work.takes:
            scalars.of_leaves[take.name, id(group)] = torch.ones(1, dtype=torch.float64)
    return runners


def assembly(opt, dtype=torch.float32):
    """What is compiled for an H200, for each pass."""
    texts = []
    with pretending():
        for runner in compiled(opt, dtype):
            (caches,) = runner.function.device_caches.values()
            (kernel,) = caches[0].values()
            texts.append(kernel.asm["ptx"])
    return texts


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.float16], ids=str)
def test_adamw_is_compiled_for_a_gpu(dtype):
    (text,) = assembly(fs.adamw(), dtype)
    wide = {2: r"v4\.b32", 4: r"v4\.b32", 8: r"v2\.b64"}[dtype.itemsize]
    assert len(re.findall(rf"ld\.global\.{wide}", text)) >= 4, "16 bytes are loaded at once"
    assert len(re.findall(rf"st\.global\.{wide}", text)) >= 3
    kind = "f64" if dtype == torch.float64 else "f32"
    assert f"div.rn.{kind}" in text
    assert f"sqrt.rn.{kind}" in text
    assert not re.findall(r"(fma\.\w+\.f32|div\.(full|approx)|sqrt\.approx|\.ftz\.f32)", text), (
        "less than exact"
    )


def test_a_sum_of_products_is_rounded_twice():
    for dtype in DTYPES:
        (text,) = assembly(fs.sgd(mom=0.9), dtype)
        assert "fma" not in text


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NARROW)
def test_recipes_that_round_are_compiled_for_a_gpu(name, dtype):
    assert assembly(NARROW[name](), dtype)


def test_every_function_is_compiled_for_a_gpu(monkeypatch):
    """Many at once: an argument of a wrong kind, or a function that is not there, is an error."""
    monkeypatch.setattr(launch, "BLOCK", 128)
    for dtype, names in (
        (torch.float32, list(ALL)),
        (torch.float64, [*SPOILED, "fmod", "remainder", "copysign"]),
    ):
        for first in range(0, len(names), 16):
            assembly(chain(*map(rule_of, names[first : first + 16]), stay), dtype)


@fs.elementwise
def reduces(
    param,
    grad,
    *,
    dot=total(lambda grad, param: grad * param),
    top=largest(lambda grad: grad - 1),
    fine=all_finite("grad", over="leaf"),
):
    """A number of every kind."""
    return dict(param=param - grad * (dot + top) * fine)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_numbers_of_columns_are_taken_in_double_precision(dtype):
    first, second = assembly(chain(reduces), dtype)
    for operation in ("add.rn.f64", "mul.rn.f64", "setp.gt.f64"):
        assert operation in first
    assert "fma" not in first
    if dtype != torch.float64:
        assert "mul.rn.f32" in second
        assert "mul.rn.f64" not in second


def test_parts_are_combined_on_the_gpu():
    with pretending():
        combine = launch.loaded(COMBINE, "combine")
        wide = torch.float64
        for kind in ("sum", "max", "all"):
            combine.warmup(
                wide, torch.int64, wide, 0, 1, KIND=kind, BLOCK=launch.COMBINED,
                grid=(1,), **{**launch._options(), "num_warps": 1},
            )  # fmt: skip
        assert [len(caches[0]) for caches in combine.device_caches.values()] == [3]


def test_the_source_is_one_text_for_each_kernel():
    for name, make in RECIPES.items():
        opt = fuse(make())
        kernels = kinds(opt).count("kernel")
        text = opt.source(device="cuda")
        assert text.count("def fused_rules(") == kernels, name
        assert (text == opt.source()) == (not kernels)
    assert "tl.bfloat16" in fuse(fs.adamw()).source(torch.bfloat16, device="cuda")


def test_names_in_a_kernel_do_not_run_into_each_other():
    """Hypers and slots may be called anything, such as the kernel's own variables."""

    @fs.elementwise(i=torch.zeros_like, count=torch.zeros_like)
    def strange(grad, i, count, *, v0=1.0, leaf=2.0, start=0.5, pointers=0.1, BLOCK=3.0):
        return dict(
            i=i + v0 * grad, count=count + leaf, update=start * i + pointers * count + BLOCK * grad
        )

    opt = then_step(strange)
    params = {"w": torch.ones(5)}
    with interpreting():
        found = fuse(opt)(params, params, opt.init(params))
    expected = opt(params, params, opt.init(params))
    torch.testing.assert_close(found, expected)


def test_a_kernel_that_does_not_compile_is_no_triton(monkeypatch):
    monkeypatch.setattr(launch, "triton_source", lambda *_: "1 / 0")
    with pytest.raises(Unavailable, match="does not work here: ZeroDivisionError") as found:
        compiled(fs.sgd())
    assert isinstance(found.value.backend, TritonBackend)
    assert "Install triton" in found.value.cure
