"""The peers of loop_overhead.py: the training of loop_contenders.py, as each library's manual has
it, with no bar.
"""

import importlib
import logging
import os
import warnings
from typing import Any

import torch
from loop_contenders import BETA, CLASSES, WIDTH, Absent, Restart, Task, Timed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from functional_sgd.schedules import one_cycle, three_cosines


def imported(name: str) -> Any:
    """A module, without what it warns of. Raises Absent if it cannot be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise Absent(str(error)) from error


class FastAI:
    """A Learner with its default callbacks but for the bar; AdamW is fastai's own, or torch's in
    its wrapper.
    """

    def __init__(self, task: Task, torchs: bool = False) -> None:
        fastai, self.task, self.restart = imported("fastai.basics"), task, Restart(task)
        imported("fastai.callback.all")  # adds fit_one_cycle and no_bar to the Learner
        data = fastai.DataLoaders(task.train, task.valid)
        data._device, data.n_inp = torch.device("cpu"), 1  # as its own loaders have it
        opt = fastai.partial(fastai.Adam, sqr_mom=0.999, eps=1e-8)
        if torchs:
            opt = fastai.partial(fastai.OptimWrapper, opt=torch.optim.AdamW)
        make, metric = fastai.Learner, fastai.accuracy
        self.learner = make(
            data, self.restart.model, cross_entropy, opt, metrics=metric, wd=task.wd
        )

    def fit(self) -> float:
        self.restart()
        with self.learner.no_bar(), self.learner.no_logging():
            self.learner.fit_one_cycle(self.task.epochs, self.task.lr, reset_opt=True)
        return float(self.learner.recorder.values[-1][-1])


class Lightning:
    """A LightningModule that keeps the smooth loss itself and logs the validation; no logger, no
    checkpoints.
    """

    def __init__(self, task: Task) -> None:
        self.lightning, self.task, self.restart = imported("lightning"), task, Restart(task)
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

        class Module(self.lightning.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.model, self.smooth = model, torch.zeros(())

            def training_step(self, batch: Any, index: int) -> Tensor:
                x, y = batch
                loss = cross_entropy(self.model(x), y)
                self.smooth = BETA * self.smooth + (1 - BETA) * loss.detach()
                return loss

            def validation_step(self, batch: Any, index: int) -> None:
                x, y = batch
                pred = self.model(x)
                right = (pred.argmax(-1) == y).float().mean()
                self.log_dict(
                    {"valid_loss": cross_entropy(pred, y), "accuracy": right}, batch_size=len(y)
                )

            def configure_optimizers(self) -> dict[str, Any]:
                opt = torch.optim.AdamW(self.parameters(), lr=task.lr, weight_decay=task.wd)
                return {
                    "optimizer": opt,
                    "lr_scheduler": {"scheduler": task.one_cycle(opt), "interval": "step"},
                }

        self.make = Module

    def fit(self) -> float:
        quiet = dict(
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
        )
        once = dict(max_epochs=self.task.epochs, num_sanity_val_steps=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = self.lightning.Trainer(accelerator="cpu", devices=1, **quiet, **once)
            trainer.fit(self.make(self.restart()), self.task.train, self.task.valid)
        return float(trainer.callback_metrics["accuracy"])


class Ignite:
    """The supervised trainer and evaluator, with ignite's running average, accuracy and loss."""

    def __init__(self, task: Task) -> None:
        self.engine, self.metrics = imported("ignite.engine"), imported("ignite.metrics")
        self.task, self.restart = task, Restart(task)

    def fit(self) -> float:
        task, model, events = self.task, self.restart(), self.engine.Events
        opt = torch.optim.AdamW(model.parameters(), lr=task.lr, weight_decay=task.wd)
        schedule = task.one_cycle(opt)
        trainer = self.engine.create_supervised_trainer(
            model, opt, cross_entropy, output_transform=lambda x, y, pred, loss: loss.detach()
        )
        self.metrics.RunningAverage(alpha=BETA, output_transform=lambda loss: loss).attach(
            trainer, "loss"
        )
        metrics = {"accuracy": self.metrics.Accuracy(), "loss": self.metrics.Loss(cross_entropy)}
        evaluator = self.engine.create_supervised_evaluator(model, metrics)
        trainer.add_event_handler(events.ITERATION_COMPLETED, lambda: schedule.step())
        trainer.add_event_handler(events.EPOCH_COMPLETED, lambda: evaluator.run(task.valid))
        trainer.run(task.train, task.epochs)
        return float(evaluator.state.metrics["accuracy"])


class Keras:
    """Keras on torch; it keeps the plain mean of the loss, and measures accuracy while it trains as
    well.
    """

    def __init__(self, task: Task) -> None:
        os.environ.update(KERAS_BACKEND="torch", KERAS_TORCH_DEVICE="cpu")
        keras, self.task = imported("keras"), task
        layers = keras.layers
        between = [layers.ReLU()]
        if task.norm:
            norm = layers.BatchNormalization(momentum=0.9, epsilon=1e-5)
            between = [norm, layers.ReLU(), layers.Dropout(0.1)]
        dense = [layers.Dense(WIDTH), layers.Dense(CLASSES)]
        self.model = keras.Sequential([keras.Input((WIDTH,)), dense[0], *between, dense[1]])
        tensors = (
            value
            for name, value in task.network().state_dict().items()
            if "num_batches" not in name
        )
        self.first = [value.T.numpy() if value.dim() == 2 else value.numpy() for value in tensors]
        self.keras, self.data = (
            keras,
            [DataLoader(Stream(timed), batch_size=None) for timed in (task.train, task.valid)],
        )

        class OneCycle(keras.callbacks.Callback):  # type: ignore[misc, name-defined]
            def on_train_begin(self, logs: Any = None) -> None:
                self.step, self.lr, self.mom = (
                    0,
                    one_cycle(task.lr),
                    three_cosines(0.25, 0.95, 0.85, 0.95),
                )

            def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
                position = self.step / task.steps
                self.model.optimizer.learning_rate = self.lr(position)
                self.model.optimizer.beta_1 = self.mom(position)
                self.step += 1

        self.one_cycle = OneCycle

    def fit(self) -> float:
        train, valid = self.data
        self.model.set_weights(self.first)
        opt = self.keras.optimizers.AdamW(self.task.lr, weight_decay=self.task.wd, epsilon=1e-8)
        loss = self.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(opt, loss, metrics=["accuracy"])
        rest = dict(
            callbacks=[self.one_cycle()], validation_data=valid, verbose=0, shuffle=False
        )  # the data is shuffled
        past = self.model.fit(train, epochs=self.task.epochs, **rest)
        return float(past.history["val_accuracy"][-1])


class Stream(IterableDataset[tuple[Tensor, ...]]):
    """Batches as the dataset of a torch DataLoader, which Keras asks for."""

    def __init__(self, timed: Timed) -> None:
        self.timed = timed

    def __len__(self) -> int:
        return len(self.timed)

    def __iter__(self) -> Any:
        return iter(self.timed)
