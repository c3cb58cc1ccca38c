"""The fixed parts of a run, in one frozen record: storage only."""

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from functional_sgd import Optimizer, fuse, seeded, split
from functional_sgd.errors import elsewhere
from functional_sgd.fusion.fused import donating
from functional_sgd.fusion.spent import Donate
from functional_sgd.notebook import html_facts
from functional_sgd.optimizer import check_optimizer
from functional_sgd.sharded import distributed
from loop.callback import name_of
from loop.data.batches import DataLoaders, loader_text
from loop.donation import check_not_spent, taken
from loop.emptied import check_filled, fill, taken_from
from loop.metrics.outside import as_mergeables
from loop.metrics.tally import Metric, metric_name
from loop.replaced import evaluated
from loop.state import State


@dataclass(frozen=True, eq=False, repr=False)
class Learner:
    """What a run is made of and what does not change while it runs.

    `loss(pred, *targets)` returns a 0-d tensor, a mean over the batch. Each of `metrics` is a
    function `(pred, *targets) -> 0-d tensor`, also a mean over the batch; its name is the column.
    The first `n_inputs` entries of a batch are inputs, the rest targets; a batch of one entry has
    no targets. A batch may also be a dict, as Hugging Face's collators make them: the entries named
    in `targets` go to the loss, in that order, and the model is called with all others as keyword
    arguments. With `targets=()` the model gets the labels too, and the loss only its output:
    `loss=lambda output: output.loss`. Validation batches without targets have a loss if it can be
    called without, and no metrics. A metric of torchmetrics in `metrics` counts by a copy; a
    MetricCollection is all of its metrics.

    The optimizer is fused (`fuse`), unless `fused=False`: one pass over memory in place of a dozen.
    With `fit(donate=True)` it is fused in any case: leaf by leaf, no step overwrites what it is
    given. One that keeps an average to be evaluated (`average_params`, `schedule_free`) is
    validated with it; one that wants the gradient somewhere else (`sam`) gets a second one in every
    batch.

    The model is never changed: its tensors are copied by `init`, trained in the state, and put in
    place while a batch is at work. `learner.load(state)` puts those of a state into the model.

    `salt` is one more part of the seed of what is random within a training batch, such as dropout:
    equal learners with another salt draw other numbers. `parallel` gives every rank its own.

    Raises TypeError if the data, the loss, the optimizer or a metric is not of the right kind, and
    ValueError for an optimizer that donates its buffers, or a model that synchronises or shards its
    own parameters (DistributedDataParallel, FSDP).

    >>> from functional_sgd import sgd
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> data = DataLoaders(train=[(x, 3 * x + 1)])
    >>> learner = Learner(nn.Linear(1, 1), data, nn.functional.mse_loss, sgd(lr=0.1))
    >>> learner.init(seed=0).train_iter
    0
    """

    model: nn.Module
    data: DataLoaders
    loss: Callable[..., Tensor]
    opt: Optimizer
    metrics: Sequence[Metric] = ()  # kept as a tuple, as callbacks are
    callbacks: Sequence[Any] = ()
    n_inputs: int = 1
    targets: str | tuple[str, ...] = "labels"
    fused: bool = True
    salt: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(
                f"Learner: model must be an nn.Module, got {type(self.model).__name__}."
            )
        _check_not_distributed(self.model)
        if not isinstance(self.data, DataLoaders):
            raise TypeError(
                f"Learner: data must be DataLoaders(train, valid), got {type(self.data).__name__}."
            )
        check_optimizer("Learner: opt", self.opt)
        if self.opt.donates:
            raise ValueError(
                f"Learner: {self.opt!r} overwrites the state it is given, but a run must leave "
                f"yours as it was. "
                f"Use fuse(opt) without donate: it uses memory again once you have dropped it."
            )
        metrics: list[Metric] = []
        for metric in _listed("metrics", self.metrics):
            metrics += as_mergeables(metric)
        object.__setattr__(self, "metrics", _functions("metrics", metrics))
        names = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", names)
        object.__setattr__(self, "callbacks", tuple(_listed("callbacks", self.callbacks)))
        if isinstance(self.loss, type):
            raise TypeError(
                f"Learner: loss must be a function (pred, *targets) -> 0-d tensor, got the class "
                f"{self.loss.__name__}. Call it: {self.loss.__name__}()."
            )
        _functions("loss", [self.loss])

    @property
    def stepper(self) -> Optimizer:
        """The optimizer that takes the steps: `opt`, fused."""
        return _fused(self.opt) if self.fused else self.opt

    @property
    def donating_stepper(self) -> Optimizer:
        """The same, overwriting params and state, as far as the optimizer can do without the old
        ones.
        """
        # Fused even where fused=False: leaf by leaf, no step writes over what it is given.
        return _fused(self.opt, True)

    @property
    def sparing_stepper(self) -> Optimizer:
        """The same as `stepper`, but for the memory of gradients, which new params take."""
        return _fused(self.opt, "grads") if self.fused else self.opt

    def init(
        self, seed: int = 0, device: torch.device | str | None = None, donate: bool = False
    ) -> State:
        """A fresh state: copies of the model's tensors (on `device`, if given), a fresh optimizer
        state.

        `seed` decides the order of the data and all randomness in the run. The first weights are
        those of the model: `torch.manual_seed(0)` before it is made decides them.

        With `donate` the tensors are not copied but taken: the model is left without, and calling
        it, or asking for its state_dict, is an error until `learner.load(state)` has given it
        tensors again. That saves the memory of one copy of the params.
        """
        check_filled(self.model)
        params, buffers = taken_from(self.model) if donate else split(self.model)
        if device is not None:
            params = {name: value.to(device) for name, value in params.items()}
            buffers = {name: value.to(device) for name, value in buffers.items()}
        # After the move, since slots are made where the params are.
        opt_state = seeded(self.opt.init(params), seed)
        return State(params, buffers, opt_state, self.opt.hyper, seed)

    @torch.no_grad()
    def load(self, state: State, donate: bool = False) -> nn.Module:
        """The model, into which the params and buffers of the state have been copied.

        With `donate` it gets the tensors themselves, and the state is spent. A model whose tensors
        were taken (`init(donate=True)`) has its own again.

        If the optimizer keeps an average to be evaluated, that is copied in place of the params.
        So `torch.save(learner.load(end).state_dict(), path)` saves what was trained. Tied weights
        and buffers that are not persistent are copied too; a buffer takes the state's shape.

        Raises ValueError if the state is of another model, TypeError if it is in pieces.

        >>> from functional_sgd import sgd
        >>> from loop import fit
        >>> data = DataLoaders([(torch.ones(1, 1), torch.zeros(1, 1))])
        >>> learner = Learner(nn.Linear(1, 1), data, nn.functional.mse_loss, sgd(lr=0.1))
        >>> end = fit(learner, learner.init(), epochs=5)
        >>> bool(learner.load(end).weight == end.params["weight"])
        True
        """
        own: dict[str, Tensor] = {
            **dict(self.model.named_parameters()),
            **dict(self.model.named_buffers()),
        }
        check_not_spent("Learner.load", state)
        given = {**evaluated(state, self.opt), **state.buffers}
        _check_names(own, given)
        _check_whole(own, given)
        parameters = dict(self.model.named_parameters())
        for name, value in given.items():
            if value.shape != own[name].shape:
                if name in parameters:
                    raise ValueError(
                        f"Learner.load: the state is of another model: {name!r} has shape "
                        f"{tuple(value.shape)} there and {tuple(own[name].shape)} in the model. "
                        f"Pass a state of this learner."
                    )
                # Some buffers grow while a model is trained.
                own[name].resize_(value.shape)
        if donate:
            # After all that can be refused, since this cannot be undone. `given` is made again,
            # because the tensors in it are empty from here on.
            state = taken(state, "Learner.load(donate=True)")
            given = {**evaluated(state, self.opt), **state.buffers}
        fill(self.model, given, own, donate)
        return self.model

    # Hidden from type checkers, which would otherwise accept every misspelt name.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Called for a name that is not there: what is it called here?"""
            return elsewhere(self, name, _ELSEWHERE)

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={text}" for name, text in self._parts().items())
        return f"Learner({facts})"

    def _repr_html_(self) -> str:
        """A table of its parts."""
        return html_facts(self._parts(), "Learner")

    def _parts(self) -> dict[str, str]:
        """Its parts in a few words each; tensors and layers are not printed."""
        metrics, callbacks = map(metric_name, self.metrics), map(name_of, self.callbacks)
        return {
            "model": type(self.model).__name__,
            "train": loader_text(self.data.train),
            "valid": loader_text(self.data.valid),
            "loss": metric_name(self.loss),
            "opt": repr(self.opt),
            "metrics": f"[{', '.join(metrics)}]",
            "callbacks": f"[{', '.join(callbacks)}]",
        }


@functools.lru_cache(maxsize=64)
def _fused(opt: Optimizer, donate: Donate = False) -> Optimizer:
    """The fused optimizer; equal ones share one, with its kernels and its memory."""
    return donating(opt) if donate is True else fuse(opt, donate)


def hyper_names(learner: Learner) -> set[str]:
    """Every hyper and extra that the optimizer reads, with or without a default."""
    return {*learner.opt.names}


def _check_names(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a model and a state have tensors of the same names."""
    for name in (*own, *given):
        if name not in own or name not in given:
            where = "the model" if name in own else "the state"
            raise ValueError(
                f"Learner.load: the state is of another model: only {where} has {name!r}. Pass "
                f"a state of this learner."
            )


def _check_whole(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise TypeError for pieces that go into whole tensors, and the other way round."""
    for name, value in given.items():
        if distributed(value) and not distributed(own[name]):
            raise TypeError(
                f"Learner.load: expected whole tensors, as the model has, got {name!r} in pieces "
                f"(a DTensor). Load unshard(state), which is called on all ranks."
            )
        if distributed(own[name]) and not distributed(value):
            raise TypeError(
                f"Learner.load: expected tensors in pieces (DTensors), as the model has, got "
                f"{name!r} whole. Load a state that this learner's fit gave, not unshard(state)."
            )


def _check_not_distributed(model: nn.Module) -> None:
    """Raise ValueError for layers that work through hooks on parameters of their own."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # without it, there is no such layer
    sharded = () if fsdp is None else (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)
    for layer in model.modules():
        if isinstance(layer, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "Learner: the model is in DistributedDataParallel, which would not synchronise: it "
                "waits for gradients of the module's own parameters, and a run has other tensors "
                "in place. Pass model.module, and give the learner to loop.parallel."
            )
        if isinstance(layer, sharded):
            raise ValueError(
                f"Learner: {type(layer).__name__} keeps its parameters in shards (FSDP), and a run "
                f"has whole tensors in place. Pass the model without fully_shard."
            )


def _listed(what: str, values: object) -> Iterable[Any]:
    if not isinstance(values, Iterable):
        raise TypeError(
            f"Learner: {what} must be a list, got {values!r}. Put it in one: [{values!r}]."
        )
    return values


def _functions(what: str, values: Iterable[object]) -> tuple[object, ...]:
    for value in values:
        if not callable(value):
            raise TypeError(
                f"Learner: {what} must be functions (pred, *targets) -> 0-d tensor, got {value!r}."
            )
    return tuple(values)


_ELSEWHERE = {
    "fit": "a function: end = fit(learner, learner.init(), epochs)",
    "fit_one_cycle": "a function: end = fit_one_cycle(learner, learner.init(), epochs, lr)",
    "fit_flat_cos": "a function: end = fit_flat_cos(learner, learner.init(), epochs, lr)",
    "fine_tune": "a function: end = fine_tune(learner, learner.init(), epochs)",
    "lr_find": "a function: lr_find(learner, learner.init())",
    "validate": "a function: validate(learner, state)",
    "predict": "a function: predict(learner, state)",
    "get_preds": "predict(learner, state)",
    "summary": "a function: summary(learner, state)",
    "save": "a function of a state: save(state, path)",
    "params": "in a state: learner.init().params",
    "history": "in a state: end.history",
    "recorder": "state.history",
    "optimizer": "learner.opt",
    "opt_func": "learner.opt",
    "loss_func": "learner.loss",
    "dls": "learner.data",
    "cbs": "learner.callbacks",
}
"""What others have as methods and attributes of a learner, and where it is here."""
