"""What each rank does: functions that tests call on all ranks at once."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import functional_sgd as fs
from loop import (
    Batches,
    Callback,
    CancelBatch,
    Checkpoint,
    DataLoaders,
    EarlyStopping,
    Learner,
    SaveModel,
    State,
    TerminateOnNaN,
    fit,
    global_batch_norm,
    load_latest,
    lr_find,
    parallel,
    predict,
    unshard,
    validate,
)
from loop.tools.interpret import sample_losses
from tests.loop.ranks.learners import (
    Normed,
    batches,
    learner,
    numbers,
    plain,
    samples,
)
from tests.loop.ranks.towers import EACH, started_in_pieces, tower


class Remembering(Callback):
    """Keeps all that can be resumed from."""

    reports: ClassVar[bool] = False

    def __init__(self) -> None:
        self.seen: list[State] = []

    def committed(self, state: State) -> None:
        self.seen.append(state)


def every_commit() -> list[list[Tensor]]:
    seen = Remembering()
    mine = parallel(learner(callbacks=[seen]))
    fit(mine, mine.init(), 1)
    return [[*state.params.values(), *state.history.losses] for state in seen.seen]


def measured() -> tuple[Any, ...]:
    return measured_by(parallel(learner()))


def measured_by(mine: Learner) -> tuple[Any, ...]:
    start, other = mine.init(), batches(7).valid
    assert other is not None
    found = lr_find(mine, start, iterations=20)
    return (
        *(predict(mine, start), predict(mine, start, other)),
        *(validate(mine, start), validate(mine, start, other)),
        *(torch.tensor(found.losses), sample_losses(mine, start)),
    )


def dense(data: DataLoaders | None = None, unused: bool = False) -> Learner:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        if unused:
            model.register_parameter("unused", nn.Parameter(torch.ones(2)))
        return model

    # Weight decay would move a parameter whose gradient is zero, and not None.
    return learner(fs.adamw(lr=0.02) if unused else fs.sgd(lr=0.1, mom=0.9), data, model=make)


@dataclass(frozen=True)
class Looking(Callback):
    """Is called with the gradients, so the graph ends there."""

    order: int = 0  # type: ignore[misc]

    def after_backward(self, state: State) -> None:
        assert state.loss is not None
        if state.training:
            assert torch.equal(state.loss, state.history.losses[-1])


def compiled(callbacks: Sequence[Callback]) -> list[Tensor]:
    mine = parallel(dense())
    return numbers(fit(mine, mine.init(), 2, callbacks, compile=True))


def compiled_with_an_unused() -> list[Tensor]:
    mine = parallel(dense(unused=True))
    return numbers(fit(mine, mine.init(), 2, compile=True))


def normed(kind: str) -> list[Tensor]:
    mine = learner(fs.sgd(lr=0.1, mom=0.9), model=Normed)
    if kind == "global":
        mine = replace(mine, model=global_batch_norm(mine.model))
    mine = parallel(mine)
    return numbers(fit(mine, mine.init(), 2))


def dropped() -> tuple[Tensor, list[Tensor]]:
    kept = []

    class Look(Callback):
        def after_pred(self, state: State) -> None:
            if state.training:
                kept.append(state.pred.detach())

    x = torch.ones(8, 5, dtype=torch.float64)
    data = DataLoaders(Batches((x, torch.zeros(8, dtype=torch.long)), 8))
    mine = parallel(learner(data=data, model=lambda: Normed(0.5), callbacks=[Look()]))
    end = fit(mine, mine.init(), 1)
    return kept[0], numbers(end)


class CancelSome(Callback):
    """Cancels every third batch when its model has been called."""

    def after_pred(self, state: State) -> None:
        if state.training and state.iter % 3 == 1:
            raise CancelBatch(state)


def cancelled() -> list[Tensor]:
    mine = parallel(learner(model=Normed, callbacks=[CancelSome()]))
    return numbers(fit(mine, mine.init(), 2))


def with_a_nan() -> tuple[int, list[Tensor]]:
    x, y = samples()
    x[99] = torch.nan
    data = DataLoaders(Batches((x, y), 16))
    mine = parallel(learner(data=data, callbacks=[TerminateOnNaN()]))
    end = fit(mine, mine.init(), 2)
    return end.train_iter, numbers(end)


def stopped_early() -> int:
    rules = EarlyStopping("valid_loss", patience=1, min_delta=10.0)
    mine = parallel(learner(callbacks=[rules]))
    return fit(mine, mine.init(), 20).epochs_seen


@dataclass(frozen=True)
class Send:
    """One of the ranks gets a signal, at one of its events. No Callback, so resume does not ask."""

    rank: int
    event: int
    number: int
    counted: ClassVar[list[int]] = [0]

    def _count(self, state: State) -> None:
        self.counted[0] += 1
        if self.counted[0] == self.event and dist.get_rank() == self.rank:
            os.kill(os.getpid(), self.number)

    before_batch = after_pred = after_loss = after_backward = after_step = after_batch = _count
    before_fit = before_epoch = before_train = after_train = before_validate = _count
    after_validate = after_epoch = after_fit = _count


class Moment:
    """SIGTERM for one of the ranks when so many seconds have passed, wherever it is then."""

    def __init__(self, rank: int, seconds: float) -> None:
        self.seconds = seconds if dist.get_rank() == rank else 0.0
        self.within, self.where, self.late = "", "", False

    def _note(self, state: State) -> None:
        self.within = "training" if state.training else "validation"

    before_batch = _note

    def _send(self, *_: object) -> None:
        self.where = self.within
        os.kill(os.getpid(), signal.SIGTERM)

    def _hear(self, *_: object) -> None:
        self.late = True  # or early: nobody listens

    def __enter__(self) -> "Moment":
        self.before = {
            number: signal.signal(number, heard)
            for number, heard in ((signal.SIGALRM, self._send), (signal.SIGTERM, self._hear))
        }
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in self.before.items():
            signal.signal(number, handler)


def started_as(kind: str) -> tuple[Learner, State]:
    """A learner, and where it begins."""
    if kind == "pieces":
        return started_in_pieces(tower("adamw", "average"), EACH, True)
    mine = parallel(learner())
    return mine, mine.init()


def signalled(rank: int, event: int, number: int) -> tuple[str, int, list[Tensor], list[Tensor]]:
    Send.counted[0] = 0
    mine = parallel(learner())
    sent = [Send(rank, event, number)]
    end = fit(mine, mine.init(), 2, sent, stop="return")
    again = fit(mine, end, 2, resume=True) if end.done else fit(mine, mine.init(), 2)
    return end.stopped, end.train_iter, numbers(end), numbers(again)


def signalled_in(
    folder: str, kind: str, rank: int, seconds: float
) -> tuple[str, int, str, list[Tensor]]:
    """What a signal at a moment of a run has done, and the end of the run that goes on from the
    folder.
    """
    mine, start = started_as(kind)
    keep = Checkpoint(folder, batches=3)
    with Moment(rank, seconds) as moment:
        end = fit(mine, start, 2, [keep, moment], stop="return")
    again = fit(mine, start, 2, [keep], resume=folder)
    return end.stopped, end.train_iter, moment.where, numbers(unshard(again))


def undisturbed(folder: str, kind: str) -> tuple[float, list[Tensor]]:
    """How long that takes, and its end."""
    mine, start = started_as(kind)
    fit(mine, start, 2)  # the first is slower
    began = time.perf_counter()
    end = fit(mine, start, 2, [Checkpoint(folder, batches=3)])
    return time.perf_counter() - began, numbers(unshard(end))


def as_numbers_of_two_epochs() -> list[Tensor]:
    mine = parallel(learner())
    return numbers(fit(mine, mine.init(), 2))


def kept_in(folder: str) -> tuple[list[str], list[Tensor]]:
    best = SaveModel(Path(folder) / f"best-{dist.get_rank()}.safetensors")
    mine = parallel(learner(callbacks=[best]))
    end = fit(mine, mine.init(), 3, [Checkpoint(Path(folder) / "run", batches=2)])
    return sorted(os.listdir(folder)), numbers(end)


def first_part(folder: str, epochs: int) -> None:
    mine = parallel(learner())
    stop = StopAt(9)
    fit(mine, mine.init(seed=5), epochs, [Checkpoint(folder), stop], stop="return")


class StopAt:
    """SIGTERM for rank 0 at a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def before_batch(self, state: State) -> None:
        first = not dist.is_initialized() or dist.get_rank() == 0
        if state.training and state.train_iter == self.batch and first:
            os.kill(os.getpid(), signal.SIGTERM)


class Last:
    """Rank 0 does this when a run is over, just before a Checkpoint writes what there is."""

    order: ClassVar[int] = Checkpoint.order + 1

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work

    @contextmanager
    def around_fit(self, state: State) -> Iterator[None]:
        try:
            yield
        finally:
            if dist.get_rank() == 0:
                self.work()


def read_at_once(folder: str) -> int:
    """What every rank finds when a run has been stopped, the write of which takes its time."""
    mine = parallel(learner())
    slow = Last(lambda: time.sleep(0.3))
    fit(mine, mine.init(), 2, [Checkpoint(folder), StopAt(4), slow], stop="return")
    return load_latest(folder).train_iter


def signalled_late() -> tuple[str, int, bool]:
    """Rank 0 gets a signal when all ranks have agreed on how the run ends."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
    mine = parallel(learner())
    send = Last(lambda: os.kill(os.getpid(), signal.SIGTERM))
    end = fit(mine, mine.init(), 1, [send], stop="return")
    signal.signal(signal.SIGTERM, before)
    return end.stopped, end.epochs_seen, bool(heard)


def not_written(folder: str) -> str:
    """What every rank is told when the folder is gone, and a file is in its place."""

    def spoil() -> None:
        Path(folder).rmdir()
        Path(folder).touch()

    mine = parallel(learner())
    try:
        fit(mine, mine.init(), 2, [Checkpoint(folder), StopAt(4), Last(spoil)], stop="return")
    except OSError as error:
        return str(error)
    return ""


def second_part(folder: str, epochs: int) -> list[Tensor]:
    mine = parallel(learner())
    return numbers(fit(mine, mine.init(seed=5), epochs, [Checkpoint(folder)], resume=folder))


def said(what: str) -> str:
    rank = dist.get_rank()
    try:
        if what == "params":
            mine = learner()
            with torch.no_grad():
                for value in mine.model.parameters():
                    value.add_(rank)
            mine = parallel(mine)
            fit(mine, mine.init(), 1)
        if what == "data":
            mine = parallel(learner(data=batches(16 + rank)))
            fit(mine, mine.init(), 1)
        if what == "place":
            mine = parallel(learner())
            stopped = fit(mine, mine.init(), 2, [StopAt(3)], stop="return")
            start = stopped if rank else mine.init()
            fit(mine, start, 2, resume=rank > 0)
        if what == "twice":
            parallel(parallel(learner()))
        if what == "sam":
            parallel(learner(fs.sam(fs.sgd(lr=0.1))))
        if what == "mesh":
            parallel(learner(), init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model")))
        if what == "sampler":
            dataset: Any = TensorDataset(*samples())
            loader = DataLoader(dataset, 16, sampler=DistributedSampler(dataset))
            parallel(learner(data=DataLoaders(loader)))
        if what == "weight":
            parallel(learner(), weight="tokens")
        if what == "other data":
            mine = replace(parallel(learner()), data=plain())
            fit(mine, mine.init(), 1)
    except ValueError as error:
        return str(error)
    return ""


def collectives(callbacks: Sequence[Callback]) -> float:
    """How many a batch takes."""
    from torch.distributed.tensor.debug import CommDebugMode

    mine = parallel(dense(DataLoaders(batches().train)))
    counts = []
    for epochs in (1, 2):
        with CommDebugMode() as mode:
            fit(mine, mine.init(), epochs, callbacks)
        counts.append(mode.get_total_counts())
    return (counts[1] - counts[0]) / len(mine.data.train)
