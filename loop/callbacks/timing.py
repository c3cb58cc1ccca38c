"""See where the time goes: a clock for every part of a run, and PyTorch's profiler."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch.profiler import profile, record_function, schedule

from loop.callback import Callback, Order
from loop.run.stages import device_of
from loop.state import State

PHASES = ("train", "validate")
INSIDE = ("", " between", " batch", " [predict]", " [loss]", " [gradients]", " [update]")
PARTS = (
    *("fit", "epoch"),
    *(f"train{part}" for part in INSIDE),
    *(f"validate{part}" for part in INSIDE),
)


@dataclass
class Times:
    """Wall-clock seconds of the parts of a run: how often each ran, and how long in all. As text, a
    table.

    The parts are fit, epoch, train and validate; the batches of a phase ("train batch") and the
    stages in them ("train [predict]"). What a phase spends between batches, such as waiting for
    data, is "train between".

    >>> times = Times()
    >>> times.add("train", 4.0), times.add("train batch", 1.5), times.add("train batch", 1.5)
    (None, None, None)
    >>> print(times)
    part                   times     seconds     ms each
    train                      1       4.000    4000.000
    train between              2       1.000     500.000
    train batch                2       3.000    1500.000
    """

    counts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, part: str, seconds: float) -> None:
        """Count one more."""
        self.counts[part] = self.counts.get(part, 0) + 1
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def rows(self) -> dict[str, tuple[int, float]]:
        """Part -> (times, seconds), with what lies between batches, in the order of a run."""
        found = {part: (count, self.seconds[part]) for part, count in self.counts.items()}
        for phase in PHASES:
            if phase in found and f"{phase} batch" in found:
                count, seconds = found[f"{phase} batch"]
                found[f"{phase} between"] = count, found[phase][1] - seconds
        return {part: found[part] for part in PARTS if part in found}

    def __str__(self) -> str:
        lines = [f"{'part':20}{'times':>8}{'seconds':>12}{'ms each':>12}"]
        for part, (count, seconds) in self.rows().items():
            lines.append(f"{part:20}{count:8}{seconds:12.3f}{1000 * seconds / count:12.3f}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Timer(Callback):
    """Measure how long the parts of a run take, and report it when the run ends, in whatever way.

    `report` is called with the Times: `print` shows a table, the `append` of a list keeps them.
    They are nowhere in the state, which does not depend on the clock. A device that works on its
    own is not waited for, so that its time shows up where something else waits for it; with `wait`
    it is waited for after every part, which slows the run down. Handlers of other callbacks count
    in the scope that they are in. `validate` and `predict` are not measured.
    """

    report: Callable[[Times], object] = print
    wait: bool = False
    clock: Callable[[], float] = time.perf_counter
    order: ClassVar[int] = Order.FRAME
    reports: ClassVar[bool] = True

    @contextmanager
    def around_fit(self, state: State) -> Iterator[Times]:
        """Measure the run, and report."""
        times, device = Times(), device_of(state)
        del state  # its tensors would live as long as the run
        try:
            with self._measure(times, "fit", device):
                yield times
        finally:
            self.report(times)

    def around_epoch(self, state: State) -> AbstractContextManager[Times | None]:
        """Measure an epoch."""
        return self._part("epoch", state)

    def around_train(self, state: State) -> AbstractContextManager[Times | None]:
        """Measure a training phase."""
        return self._part("train", state)

    def around_validate(self, state: State) -> AbstractContextManager[Times | None]:
        """Measure a validation phase."""
        return self._part("validate", state)

    def around_batch(self, state: State) -> AbstractContextManager[Times | None]:
        """Measure a batch."""
        return self._part(f"{_phase(state)} batch", state)

    def around_predict(self, state: State) -> AbstractContextManager[Times | None]:
        """Measure the model."""
        return self._part(f"{_phase(state)} [predict]", state)

    def around_loss(self, state: State) -> AbstractContextManager[Times | None]:
        """Measure the loss."""
        return self._part(f"{_phase(state)} [loss]", state)

    def around_gradients(self, state: State) -> AbstractContextManager[Times | None]:
        """Measure the derivatives."""
        return self._part("train [gradients]", state)

    def around_update(self, state: State) -> AbstractContextManager[Times | None]:
        """Measure the optimizer."""
        return self._part("train [update]", state)

    def _part(self, part: str, state: State) -> AbstractContextManager[Times | None]:
        # None in `validate` and `predict`, which do not open around_fit.
        times: Times | None = state.resources.get(self.name)
        return nullcontext() if times is None else self._measure(times, part, device_of(state))

    @contextmanager
    def _measure(self, times: Times, part: str, device: torch.device) -> Iterator[Times]:
        start = self._now(device)
        try:
            yield times
        finally:
            times.add(part, self._now(device) - start)

    def _now(self, device: torch.device) -> float:
        if self.wait and device.type != "cpu":
            torch.accelerator.synchronize(device)
        return self.clock()


@dataclass(frozen=True)
class Profiler(Callback):
    """Look at a few training batches with torch.profiler, once a run: the most expensive
    operations, or a trace.

    The first `wait` batches are left alone, `warmup` more start the profiler up, and `active` are
    recorded. Then `report` gets the table of the `rows` operations that took most time, as text;
    or, if there is a `path`, a trace is written there, to look at in Perfetto or chrome://tracing.
    The stages have labels: "[predict]", "[loss]", "[gradients]", "[update]". If the run ends while
    it is recorded, that is what there is; if before, the report says so. `memory` measures memory
    too. PyTorch has one profiler, so a run can have one of these.

    Raises ValueError for numbers out of range.
    """

    path: str | Path | None = None
    wait: int = 1
    warmup: int = 1
    active: int = 3
    rows: int = 15
    memory: bool = False
    report: Callable[[str], object] = print
    order: ClassVar[int] = Order.PROFILE
    reports: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # torch warns about warmup=0, which can skew what is measured.
        for name, least in {"wait": 0, "warmup": 1, "active": 1, "rows": 1}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"Profiler: {name} must be a whole number, {least} or more, got {value!r}."
                )

    @contextmanager
    def around_fit(self, state: State) -> Iterator[profile]:
        """Have a profiler at hand, and end it whatever happens."""
        shown: list[profile] = []
        by = "cpu" if device_of(state).type == "cpu" else "device"
        del state  # its tensors would live as long as the run

        def show(profiler: profile) -> None:
            # In a shorter run, it has only recorded what came after the last batch.
            if profiler.step_num > self.wait + self.warmup:
                shown.append(profiler)
                self._show(profiler, by)

        plan = schedule(wait=self.wait, warmup=self.warmup, active=self.active, repeat=1)
        with profile(schedule=plan, on_trace_ready=show, profile_memory=self.memory) as profiler:
            yield profiler
        if not shown:
            self.report(
                f"Profiler: nothing was recorded: the run has no more than "
                f"{self.wait + self.warmup} batches."
            )

    @contextmanager
    def around_batch(self, state: State) -> Iterator[profile | None]:
        """A training batch is a step of the profiler."""
        profiler: profile | None = state.resources.get(self.name)
        try:
            yield profiler
        finally:
            # A batch ended by a signal is a step too, else the batches recorded are later ones.
            if profiler is not None and state.training:
                profiler.step()

    def around_predict(self, state: State) -> AbstractContextManager[object]:
        """Label the model."""
        return record_function("[predict]")

    def around_loss(self, state: State) -> AbstractContextManager[object]:
        """Label the loss."""
        return record_function("[loss]")

    def around_gradients(self, state: State) -> AbstractContextManager[object]:
        """Label the derivatives."""
        return record_function("[gradients]")

    def around_update(self, state: State) -> AbstractContextManager[object]:
        """Label the optimizer."""
        return record_function("[update]")

    def _show(self, profiler: profile, by: str) -> None:
        if self.path is not None:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.path))
        else:
            averages = profiler.key_averages()
            table = averages.table(sort_by=f"self_{by}_time_total", row_limit=self.rows)
            self.report(table)


def _phase(state: State) -> str:
    return "train" if state.training else "validate"
