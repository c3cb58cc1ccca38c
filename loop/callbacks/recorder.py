"""Write down what happens: losses, hypers, and a row of means for every epoch."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from loop.callback import Callback, Order
from loop.disk.encoding import storable
from loop.history import History
from loop.hyper_log import logged
from loop.metrics import Sums, add_batch, means, metrics_by_name
from loop.run.stages import learner_of
from loop.state import State

RECORDER = "recorder"
"""Where the Recorder of a run, whatever its name, keeps its memory."""


@storable
@dataclass(frozen=True)
class Record:
    """What the Recorder remembers: a run's smooth loss, and the sums of the phase at hand."""

    average: Tensor | float = 0.0  # exponential, not debiased
    count: int = 0
    debiased: float = 1.0
    sums: Sums = field(default_factory=dict)
    row: dict[str, float] = field(default_factory=dict)
    written: int = 0  # the count when the last row was written

    @property
    def smooth_loss(self) -> Tensor | float:
        """The exponential average of the run's training losses, debiased; a 0-d tensor once there
        was a batch.
        """
        return self.average / self.debiased


@dataclass(frozen=True)
class Recorder(Callback):
    """Fill `state.history`: every training loss and hyper, and for every epoch a row of means.

    train_loss is the exponential average of the batches' losses, debiased, as in the book: average
    = beta * average + (1 - beta) * loss, divided by 1 - beta**n. valid_loss and metrics that are
    functions are means over all samples, whatever the batch sizes; a Mergeable metric says itself
    how batches add up. With `train_metrics`, metrics of the training batches (taken while the model
    learns) are columns too: train_accuracy and so on. A batch cancelled before its loss is known is
    not recorded.

    Nothing here waits for a device before the epoch is over. Every fit has a Recorder; list one to
    configure it.
    """

    beta: float = 0.98
    train_metrics: bool = False
    order: ClassVar[int] = Order.RECORD

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"Recorder: beta must be in [0, 1), got {self.beta}.")

    def before_fit(self, state: State) -> State:
        """Start the smooth loss of this run. Raises TypeError or ValueError for metrics that cannot
        be columns.
        """
        self._check_columns(state)
        return state.remember(RECORDER, Record())

    def before_validate(self, state: State) -> State:
        """Start the sums of the validation phase. Raises as `before_fit` does, which is no part of
        `validate`.
        """
        self._check_columns(state)
        return self._update(state, sums={})

    def after_loss(self, state: State) -> State:
        """Count a validation batch in; write down the loss and the hypers of a training batch."""
        record, metrics = recorded(state), learner_of(state).metrics
        if not state.training:
            return self._update(state, sums=add_batch(record.sums, state, metrics, "valid_loss"))
        assert state.loss is not None
        loss, count = state.loss.detach(), record.count + 1
        if record.count:
            # One kernel less than beta * average + (1 - beta) * loss.
            average = torch.add(self.beta * record.average, loss, alpha=1 - self.beta)
        else:
            average = loss * (1 - self.beta)
        sums = record.sums
        if self.train_metrics:
            sums = add_batch(sums, state, metrics, "mean_loss")
        debiased = 1 - self.beta**count
        # This runs in every batch, and `replace` takes twice as long as the constructor.
        record = Record(average, count, debiased, sums, record.row, record.written)
        history = state.history
        hypers = logged(history.hypers, state.hyper, len(history.losses))
        history = History(history.losses.append(loss), hypers, history.rows)
        return state.replace(memory={**state.memory, RECORDER: record}, history=history)

    def after_train(self, state: State) -> State:
        """The training half of the row."""
        record = recorded(state)
        trained = record.count > record.written  # else nothing was trained in this epoch
        row = {"train_loss": float(record.smooth_loss)} if trained else {}
        for name, value in self._means(state).items():
            row[f"train_{name}"] = value
        return self._update(state, row=row, sums={})

    def after_validate(self, state: State) -> State:
        """The validation half of the row."""
        record = recorded(state)
        return self._update(state, row={**record.row, **self._means(state)}, sums={})

    def after_epoch(self, state: State) -> State:
        """Write the row; a column that was not measured is None."""
        record = recorded(state)
        row: dict[str, Any] = {"epoch": state.epoch, "train_iter": state.train_iter}
        for name in self.columns(state):
            row[name] = record.row.get(name)
        history = state.history
        state = state.replace(history=replace(history, rows=(*history.rows, row)))
        return self._update(state, sums={}, row={}, written=record.count)

    def columns(self, state: State) -> list[str]:
        """The measured columns of this run's rows."""
        learner = learner_of(state)
        names = list(metrics_by_name(learner.metrics))
        columns = ["train_loss"]
        if self.train_metrics:
            columns += [f"train_{name}" for name in ("mean_loss", *names)]
        if learner.data.valid is not None:
            columns += ["valid_loss", *names]
        return columns

    def _check_columns(self, state: State) -> None:
        """Raise ValueError for a metric whose column is there already."""
        counted = Counter(("epoch", "train_iter", *self.columns(state)))
        name, times = counted.most_common(1)[0]
        if times > 1:
            raise ValueError(
                f"Recorder: every column needs a name of its own, got {name!r} for a metric and "
                f"for what is always written (or, with train_metrics, for the training half of "
                f"another). Give the metric another name: a function's is its __name__, an "
                f"object's its `name`."
            )

    def _means(self, state: State) -> dict[str, float]:
        return means(recorded(state).sums, learner_of(state).metrics)

    def _update(self, state: State, **changes: Any) -> State:
        return state.remember(RECORDER, replace(recorded(state), **changes))


def recorded(state: State) -> Record:
    """What the Recorder remembers in this state."""
    # get(RECORDER, Record()) would build a record at each call.
    record: Record | None = state.memory.get(RECORDER)
    return Record() if record is None else record
