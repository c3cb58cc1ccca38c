"""The text of GPU kernels: what every operation gives, and what Triton makes of it."""

import re

import pytest
import torch
from functional_sgd.fusion.device import DeviceLauncher, NoTriton
from functional_sgd.fusion.source import Kernel

import functional_sgd as fs
from functional_sgd import chain, fuse
from functional_sgd.fusion import device
from tests.catalogue import RECIPES
from tests.functional_sgd.fusion.helpers import then_step
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


def assembly(opt, dtype=torch.float32):
    """What is compiled for an H200, for each segment."""
    texts = []
    with pretending():
        for segment in fuse(opt).segments:
            dtypes = dict.fromkeys(segment.columns, dtype)
            results = dict.fromkeys(segment.outputs, dtype)
            hypers = [torch.tensor(3) if name == "step" else 0.1 for name in segment.hypers]
            working = torch.float64 if dtype == torch.float64 else torch.float32
            launcher = segment.on_device(torch.device("cpu"), hypers, dtypes, results, working)
            (caches,) = launcher.function.device_caches.values()
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


def test_every_function_is_compiled_for_a_gpu(monkeypatch):
    """Many at once: an argument of a wrong kind, or a function that is not there, is an error."""
    monkeypatch.setattr(device, "BLOCK", 128)
    for dtype, names in (
        (torch.float32, list(ALL)),
        (torch.float64, [*SPOILED, "fmod", "remainder", "copysign"]),
    ):
        for first in range(0, len(names), 16):
            assembly(chain(*map(rule_of, names[first : first + 16]), stay), dtype)


def test_the_source_is_one_text_for_each_kernel():
    for name, make in RECIPES.items():
        opt = fuse(make())
        kernels = sum(segment.graph is not None for segment in opt.segments)
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


def test_a_kernel_that_does_not_compile_is_no_triton():
    with pytest.raises(NoTriton, match="does not work here: ZeroDivisionError"):
        DeviceLauncher(Kernel("1 / 0", (), (), (), 0), {}, torch.device("cpu"))
