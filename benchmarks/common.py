"""What the benchmarks share: trees of parameters, a fair race, tables, and a description of the
machine.
"""

import datetime
import gc
import importlib.metadata
import itertools
import math
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from rich.table import Table
from torch import Tensor

TreeName = Literal["resnet34", "gpt10", "gpt124", "many1000", "one100m"]
Device = Literal["cpu", "cuda"]
Tensors = dict[str, Tensor]
T = TypeVar("T")
RESULTS = Path(__file__).parent / "results"


def trees(name: TreeName, seed: int = 0, device: Device = "cpu") -> Tensors:
    """The parameters of a network, by name, as small random numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator).mul_(0.02).to(device)
        for key, shape in shapes(name).items()
    }


def gradients(tree: Tensors) -> Tensors:
    """Small random numbers, where the leaves are."""
    generator = torch.Generator().manual_seed(1)
    return {
        leaf: torch.randn(value.shape, generator=generator).mul_(0.01).to(value.device)
        for leaf, value in tree.items()
    }


def shapes(name: TreeName) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf."""
    if name == "resnet34":
        return _resnet34()
    if name == "gpt10":
        return _gpt(width=384, layers=6, vocab=65, context=256)
    if name == "gpt124":
        return _gpt(width=768, layers=12, vocab=50257, context=1024)
    if name == "many1000":
        return {f"leaf{index:04d}": (500,) for index in range(1000)}
    return {"leaf": (100_000_000,)}


def _resnet34() -> dict[str, tuple[int, ...]]:
    sizes: dict[str, tuple[int, ...]] = {}

    def conv_and_norm(name: str, inputs: int, outputs: int, kernel: int) -> None:
        sizes[f"{name}.conv"] = (outputs, inputs, kernel, kernel)
        sizes[f"{name}.scale"] = sizes[f"{name}.shift"] = (outputs,)

    conv_and_norm("stem", 3, 64, 7)
    inputs = 64
    for stage, (blocks, outputs) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(blocks):
            conv_and_norm(f"{stage}.{block}.0", inputs, outputs, 3)
            conv_and_norm(f"{stage}.{block}.1", outputs, outputs, 3)
            if inputs != outputs:
                conv_and_norm(f"{stage}.{block}.shortcut", inputs, outputs, 1)
            inputs = outputs
    return {**sizes, "head.weight": (1000, 512), "head.bias": (1000,)}


def _gpt(width: int, layers: int, vocab: int, context: int) -> dict[str, tuple[int, ...]]:
    sizes: dict[str, tuple[int, ...]] = {"tokens": (vocab, width), "positions": (context, width)}
    for layer in range(layers):
        for name, outputs, inputs in (("qkv", 3, 1), ("out", 1, 1), ("up", 4, 1), ("down", 1, 4)):
            sizes[f"{layer}.{name}.weight"] = (outputs * width, inputs * width)
            sizes[f"{layer}.{name}.bias"] = (outputs * width,)
        for name in ("norm1", "norm2"):
            sizes[f"{layer}.{name}.scale"] = sizes[f"{layer}.{name}.shift"] = (width,)
    return {**sizes, "norm.scale": (width,), "norm.shift": (width,)}


class Timing(NamedTuple):
    """Seconds of one call: the median of all rounds, and the 10th and 90th percentile."""

    low: float
    median: float
    high: float


def spread(seconds: Sequence[float]) -> Timing:
    """The middle and the ends of what the rounds took."""
    return Timing(*map(float, np.percentile(seconds, (10, 50, 90))))


def race(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int = 30,
    warmup: int = 3,
    collector: bool = False,
    device: Device = "cpu",
    cold: bool = False,
) -> dict[str, Timing]:
    """The time of one call of each contender.

    In every round every contender has a turn, in an order that is drawn anew, so that a slow minute
    of the machine meets all of them. A turn is one call that is not timed, and then as many as take
    10 ms, whose mean counts; or a single call, if that takes longer. The garbage collector is off,
    since it would charge one for what another has left; with `collector` it is on, and what was
    left is collected before each turn.

    With `cold` a turn is one call, right after another contender's: nothing that it needs is in a
    cache.

    On a GPU the calls of a turn are between two events: the time of one is that of the host or of
    the device, whichever is longer.
    """
    clock = _seconds_on_gpu if device == "cuda" else timed if cold else _seconds
    generator = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        for _ in range(warmup):
            contender()
    gc.collect()
    gc.freeze() if collector else gc.disable()
    try:
        for _ in range(rounds):
            for name in generator.sample(list(contenders), len(contenders)):
                if collector:
                    gc.collect()
                seconds[name].append(clock(contenders[name]))
    finally:
        gc.unfreeze() if collector else gc.enable()
    return {name: spread(values) for name, values in seconds.items()}


class Duel:
    """The shortest times of something and of a baseline, which take turns.

    On a machine that others use too, a turn counts as quiet if the baseline took at most
    `close_to` times its best ever, right before and right after it.
    """

    def __init__(self, baseline: Callable[[], object], close_to: float = 1.1) -> None:
        self.baseline, self.close_to, self.best = baseline, close_to, math.inf

    def __call__(
        self, other: Callable[[], object], quiet: int = 5, most: int = 50
    ) -> tuple[float, float, int]:
        """(seconds of the other, of the baseline, quiet turns), once there are so many quiet turns,
        or after `most` turns.
        """
        before, turns = [timed(self.baseline)], []
        while len(turns) < most:
            turns.append(timed(other))
            before.append(timed(self.baseline))
            self.best = min(self.best, *before[-2:])
            calm = [one <= self.close_to * self.best for one in before]
            count = sum(a and b for a, b in itertools.pairwise(calm))
            if count >= quiet:
                break
        return min(turns), min(before), count


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _seconds(call: Callable[[], object], at_least: float = 0.01) -> float:
    """The mean time of a call, of as many as take so many seconds, after one that counts only if it
    takes longer.
    """
    first = timed(call)
    if first >= at_least:
        return first
    calls = math.ceil(at_least / first)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls


def _seconds_on_gpu(call: Callable[[], object], at_least: float = 0.02) -> float:
    """The mean time of a call, of as many as take so many seconds."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    calls = min(max(int(at_least / (time.perf_counter() - started)), 1), 100)
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    for _ in range(calls):
        call()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1000 / calls


def bandwidths(
    elements: int = 100_000_000, rounds: int = 7, device: Device = "cpu"
) -> tuple[float, float]:
    """Bytes per second of a long copy and of a long addition in place; what is read and what is
    written counts once.
    """
    source, target = torch.ones(elements, device=device), torch.zeros(elements, device=device)
    times = race(
        {"copy": lambda: target.copy_(source), "add": lambda: target.add_(source)},
        rounds,
        device=device,
    )
    return 2 * 4 * elements / times["copy"].median, 3 * 4 * elements / times["add"].median


def on_ranks(world: int, measure: Callable[..., T], *args: Any) -> T:
    """What `measure(*args)` returns on the first of several processes that talk through gloo, each
    with one thread.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        torch.multiprocessing.start_processes(
            _rank, (world, store, measure, args), nprocs=world, start_method="spawn"
        )
        found: T = torch.load(f"{store}.found")
    return found


def _rank(
    rank: int, world: int, store: str, measure: Callable[..., object], args: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=300),
    )
    found = measure(*args)
    if rank == 0:
        torch.save(found, f"{store}.found")
    dist.destroy_process_group()


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Print a table; returns it as markdown."""
    table = Table(*(f"[bold]{name}" for name in header), title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=max(100, 16 * len(header) + 20)).print(table)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def say(text: str) -> str:
    """Print a paragraph; returns it as markdown."""
    print(text)
    return f"{text}\n"


PACKAGES = ("torch", "triton", "numpy", "optree", "jax", "optax", "torchopt", "heavyball")


def machine(packages: Sequence[str] = PACKAGES) -> str:
    """What the numbers were measured on."""
    versions = ", ".join(f"{name} {version}" for name in packages if (version := _version(name)))
    system, today = platform.system(), datetime.date.today()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"Measured on {today}: {gpu}{_processor()}, {len(_cores())} cores, "
        f"{torch.get_num_threads()} torch threads, "
        f"{system}, Python {platform.python_version()}, {versions}."
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _cores() -> Sequence[int]:
    return (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else range(os.cpu_count() or 1)
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def save(name: str, text: str, packages: Sequence[str] = PACKAGES) -> Path:
    """Write results/<date>-<name>.md: what was measured, and on what."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.date.today()}-{name}.md"
    path.write_text(f"# {name}\n\n{machine(packages)}\n\n{text}")
    print(f"saved {path}")
    return path
