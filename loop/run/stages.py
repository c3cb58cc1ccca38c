"""What the machine does between events: fetch, predict, measure, differentiate, update; each from
state to state.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import optree
import torch
from torch import Tensor, nn

from functional_sgd import apply
from functional_sgd.autodiff import detached, gradients
from loop.learner import Learner
from loop.run.chance import key, seed_loader, seed_torch
from loop.state import State

_DATA, _VALID_DATA, FOR_BATCH, _VALID_BATCH = range(4)  # what a random number is for


class Work:
    """The stages. Between [predict] and [gradients] it holds the params of the batch, tracked and
    as they were.
    """

    def __init__(self) -> None:
        self.during: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}

    def join(self, run: Any) -> None:
        """Prepare for a run."""

    def predict(self, state: State) -> State:
        """The model's output for xb, and the buffers after it."""
        learner, device = learner_of(state), device_of(state)
        if learner.model.training != state.training:
            learner.model.train(state.training)
        if not state.training:
            seed_torch(key(state.seed, state.epochs_seen, state.iter, _VALID_BATCH), device)
            with torch.no_grad():
                pred, _ = apply(learner.model, state.params, state.buffers, *(state.xb or ()))
            return state.replace(pred=pred)
        seed_torch(key(state.seed, state.train_iter, FOR_BATCH), device)
        self.before, frozen = state.params, state.frozen
        self.during = {
            name: value if name in frozen else value.detach().requires_grad_()
            for name, value in state.params.items()
        }
        with torch.enable_grad():
            pred, buffers = apply(learner.model, self.during, state.buffers, *(state.xb or ()))
        return state.replace(params=self.during, pred=pred, buffers=buffers)

    def loss(self, state: State) -> State:
        """The loss of the prediction; none where a validation batch has no targets."""
        if not state.yb and not state.training:
            return state
        with torch.set_grad_enabled(state.training):
            loss = learner_of(state).loss(state.pred, *(state.yb or ()))
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            found = (
                f"shape {tuple(loss.shape)}"
                if isinstance(loss, Tensor)
                else f"type {type(loss).__name__}"
            )
            raise ValueError(
                f"Learner: loss must return a 0-d tensor, got one of {found}. Take the mean of it."
            )
        return state.replace(loss=loss)

    def gradients(self, state: State) -> State:
        """The derivative of the loss by every parameter, None for frozen ones; the graph is let go."""
        if state.loss is None or not state.loss.requires_grad:
            raise ValueError(
                "Learner: the loss does not depend on any parameter, so there is no gradient. "
                "Does the model, or a callback, detach it? Have all parameters requires_grad=False?"
            )
        tracked = [value for name, value in self.during.items() if name not in state.frozen]
        grads = iter(gradients(state.loss, tracked))
        by_name = {name: None if name in state.frozen else next(grads) for name in self.during}
        params = self.before if state.params is self.during else state.params
        self.during, self.before = {}, {}
        return state.replace(
            params=params, grads=by_name, pred=detached(state.pred), loss=state.loss.detach()
        )

    def update(self, state: State) -> State:
        """One step of the optimizer."""
        with torch.no_grad():
            params, opt_state = learner_of(state).opt(
                state.params, state.grads, state.opt_state, state.hyper
            )
        return state.replace(params=params, opt_state=opt_state)


def epochs(state: State, start: int) -> Iterator[Callable[[State], State]]:
    """Enter every epoch of the run, from this one on."""
    for epoch in range(start, state.n_epoch):
        yield _Enter(epoch=epoch)


def batches(state: State, start: int) -> Iterator[Callable[[State], State]]:
    """Enter every batch of the phase, from this one on. The order of the data is a function of
    (seed, epoch) alone.
    """
    learner, device = learner_of(state), device_of(state)
    loader = learner.data.train if state.training else learner.data.valid
    name = "data.train" if state.training else "data.valid"
    purpose = _DATA if state.training else _VALID_DATA
    order, index = key(state.seed, state.epochs_seen, purpose), 0
    if loader is not None and hasattr(loader, "set_position"):  # it can begin in the middle
        loader.set_position(key(state.seed, purpose), state.epochs_seen, start)
        index = start
    seed_loader(loader, order)
    seed_torch(order, device)
    iterator = iter(() if loader is None else loader)
    del state  # or it would live as long as the phase does
    while True:
        seed_torch(key(order, index), device)
        try:
            batch = next(iterator)
        except StopIteration:
            break
        if index >= start:
            xb, yb = split_batch(learner, batch, device)
            yield _Enter(iter=index, xb=xb, yb=yb, done=())
        index += 1
    if index < max(start, 1):
        raise ValueError(
            f"Learner: {name} yielded {index} batches where the run had seen {start} already: it "
            f"is other data."
            if start
            else f"Learner: {name} is empty: it yielded no batch. Check the data set, or drop_last."
        )


def enter_train(state: State) -> State:
    """The training phase begins."""
    pct = state.epoch / max(state.n_epoch, 1)
    learner_of(state).model.train(True)
    return state.replace(
        training=True, iter=0, n_iter=_length(learner_of(state).data.train), pct_train=pct
    )


def enter_validate(state: State) -> State:
    """The validation phase begins."""
    learner_of(state).model.train(False)
    return state.replace(training=False, iter=0, n_iter=_length(learner_of(state).data.valid))


def leave_batch(state: State) -> State:
    """A training batch, cancelled or not, counts."""
    if not state.training:
        return state
    done = (state.iter + 1) / state.n_iter if state.n_iter else 0.0
    pct = (state.epoch + done) / max(state.n_epoch, 1)
    return state.replace(train_iter=state.train_iter + 1, pct_train=pct)


def leave_epoch(state: State) -> State:
    """An epoch, cancelled or not, counts."""
    return state.replace(epochs_seen=state.epochs_seen + 1, done=())


def left_batch(state: State) -> State:
    """Nothing of a batch stays."""
    return state.without_batch()


def left_train(state: State) -> State:
    """The training phase is over."""
    return state.replace(training=False)


def has_validation_data(state: State) -> bool:
    """Whether there is anything to validate on."""
    return learner_of(state).data.valid is not None


def has_gradients(state: State) -> bool:
    """Whether [update] has anything to go by: not after CancelBackward."""
    return state.grads is not None


class _Enter:
    """The change of fields on entering a scope."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    def __call__(self, state: State) -> State:
        return state.replace(**self.changes)


def learner_of(state: State) -> Learner:
    """The learner of the run that the state is in."""
    assert state.learner is not None, "a running state has a learner"
    return state.learner


def device_of(state: State) -> torch.device:
    """Where the parameters are."""
    return next((value.device for value in state.params.values()), torch.device("cpu"))


def split_batch(
    learner: Learner, batch: Any, device: torch.device
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A batch as (inputs, targets), on the device."""
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    parts = tuple(_to(part, device) for part in parts)
    count = min(learner.n_inputs, len(parts))
    return parts[:count], parts[count:]


@contextmanager
def mode_kept(state: State) -> Iterator[None]:
    """Give every layer of the model its training flag back."""
    model: nn.Module = learner_of(state).model
    flags = [(layer, layer.training) for layer in model.modules()]
    try:
        yield
    finally:
        for layer, training in flags:
            layer.training = training


def shapes(state: State) -> str:
    """The shapes in a batch, for an error message."""
    named = {"xb": state.xb, "yb": state.yb, "pred": state.pred}
    known = {
        name: optree.tree_map(_shape, value) for name, value in named.items() if value is not None
    }
    return ", ".join(f"{name}: {value}" for name, value in known.items())


def _shape(value: Any) -> str:
    return (
        f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if isinstance(value, Tensor)
        else repr(value)
    )


def _to(part: Any, device: torch.device) -> Any:
    if isinstance(part, Tensor):
        return part if part.device == device else part.to(device, non_blocking=True)
    return optree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, part)


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None
