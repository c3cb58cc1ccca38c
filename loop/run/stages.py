"""What the machine does between events: fetch, predict, measure, differentiate, update; each from
state to state.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functional_sgd.autodiff import detached, gradients
from functional_sgd.optimizer import Optimizer
from functional_sgd.placing import Placed, look_again, written_by
from functional_sgd.sharded import full
from functional_sgd.tree import Tree
from loop.data.samples import map_tensors
from loop.learner import Learner
from loop.remembered import tensors_in
from loop.replaced import evaluated, to_be_trained
from loop.run.attributes import attributes_of, warn_of_attributes
from loop.run.chance import key, seed_torch
from loop.run.forward import ByName, Unharmed, called
from loop.run.reached import check_reached
from loop.run.signals import Cancel
from loop.run.targetless import Targetless
from loop.run.unused import Unused
from loop.state import State

if TYPE_CHECKING:
    from loop.run.machine import Run

_Handler: TypeAlias = Callable[[State], State | None]

_BATCH, _VALID_BATCH = 2, 3  # what a random number is for; passes.py has the others


BEFORE_VALIDATION = "before_validation"
"""Where a state keeps its buffers while the forward passes of a validation write to theirs."""


class _Average(NamedTuple):
    """The params that an optimizer evaluates, and what it has made them of."""

    params: Mapping[str, Tensor]
    opt_state: Tree
    found: Mapping[str, Tensor]


class Work:
    """The stages. From [predict] on the model has the tensors of the batch in place, until the
    gradients are taken or the batch is over; the params of a training batch are tracked as long.
    """

    def __init__(self) -> None:
        self.handlers: Mapping[str, Sequence[tuple[str, _Handler]]] = {}
        self.brackets: Callable[[str], AbstractContextManager[object]] = _no_brackets
        self.placed: Placed | None = None
        self.during: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        self.average: _Average | None = None
        self.model, self.loss_function = Unharmed("model"), Unharmed("loss")
        self.trained = 0  # batches of this run
        self.unused = Unused()
        self.targetless = Targetless()
        self.stepper: Optimizer | None = None  # who has taken the steps
        self.spend_grads = False  # whether new params take the memory of gradients

    def join(self, run: "Run") -> None:
        """Prepare for a run."""
        self.handlers, self.brackets = run.handlers, run.brackets_of
        model = learner_of(run.state).model
        # A layer may have been changed since the last run, and with it what the model writes to.
        look_again(model)
        for name, value in model.named_parameters():
            if value._post_accumulate_grad_hooks:
                raise ValueError(
                    f"Learner: {name!r} of the model has a hook for accumulated gradients "
                    f"(register_post_accumulate_grad_hook), which would never be called: gradients "
                    f"are in state.grads. Remove it, and write a callback with after_backward."
                )

    def leave(self) -> None:
        """Give the model its own tensors back, if it has those of a batch."""
        placed, self.placed = self.placed, None
        if placed is not None:
            placed.put_back()

    def close(self) -> None:
        """The run is over, however it ended."""
        self.leave()
        if self.stepper is not None:
            # A learner's optimizer is kept for its next run, and with it what it keeps.
            self.stepper.release()

    def over(self, scope: str) -> None:
        """A scope that is no batch has come to its end."""
        if scope == "train":
            self.unused.warn()
        elif scope == "validate":
            self.targetless.warn()

    def predict(self, state: State) -> State:
        """The model's output for xb, and the buffers after it."""
        learner, device = learner_of(state), device_of(state)
        set_mode(state)
        self.leave()
        if not state.training:
            seed_torch(validation_key(state), device)
            with torch.no_grad():
                pred = self._predict(state, self._evaluated(state))
            return self._carried(state).replace(pred=pred)
        state = to_be_trained(state, learner.opt)
        seed_torch(batch_key(state), device)
        self.before = state.params
        self.during, own = self._leaves(state)
        self.trained += 1
        # In the second batch, caches are filled, and what still changes is no cache.
        watched = attributes_of(learner.model) if self.trained == 2 else None
        # The caller of fit may have switched gradients off.
        with torch.enable_grad():
            pred = self._predict(state, self.during, own)
            assert self.placed is not None
            buffers = self.placed.after(state.buffers)
        if watched is not None:
            warn_of_attributes(learner.model, watched)
        return state.replace(params=self.during, pred=pred, buffers=buffers)

    def _carried(self, state: State) -> State:
        """A validation batch goes on with the buffers that the one before it has left: a hidden
        state. The training does not: the old ones are put back at the end of the validation.
        """
        placed = self.placed
        if placed is None or placed.changed.isdisjoint(state.buffers):
            return state
        if BEFORE_VALIDATION not in state.memory:
            state = state.remember(BEFORE_VALIDATION, state.buffers)
        return state.replace(buffers=placed.after(state.buffers))

    def _leaves(self, state: State) -> tuple[dict[str, Tensor], set[str]]:
        """The params of a training batch, tracked but for frozen ones; and the names of those that
        the model may write to.

        New leaves for every batch: a graph that somebody keeps is then of this batch alone, and the
        tensors of the state stay untracked. What the model writes to gets memory of its own, and
        all do as long as that is not known. Leaves and not copies made of them: autocast adds the
        gradients of a leaf that is used twice in half precision, and those of a copy in float32.
        """
        written = written_by(learner_of(state).model)
        leaves, own = {}, set()
        for name, value in state.params.items():
            if name in state.frozen:
                leaves[name] = value
                continue
            leaf = value.detach()
            if state.donated:
                own.add(name)
            elif written is None or name in written:
                leaf = leaf.clone()
                own.add(name)
            leaves[name] = leaf.requires_grad_()
        return leaves, own

    def _evaluated(self, state: State) -> Mapping[str, Tensor]:
        """The params to evaluate: an average, if the optimizer keeps one for that."""
        opt = learner_of(state).opt
        if not opt.averages:
            return state.params
        # Made once for a validation, in which every batch has the same params and state.
        known = self.average
        if (
            known is None
            or known.params is not state.params
            or known.opt_state is not state.opt_state
        ):
            found = evaluated(state, opt)
            known = self.average = _Average(state.params, state.opt_state, found)
        return known.found

    def _predict(
        self, state: State, params: Mapping[str, Tensor], spendable: Collection[str] = ()
    ) -> Tree:
        """The model's output with these params, of which the spendable may be written to."""
        model, tensors = learner_of(state).model, {**params, **state.buffers}
        # A donated run has one copy of its params, so there is nothing to compare with.
        originals = {} if state.donated or not spendable else state.params
        self.placed = placed = Placed(model, tensors, spendable, originals)
        return self.model.call(partial(called, placed), state.xb or (), state.training)

    def loss(self, state: State) -> State:
        """The loss of the prediction; none where a validation batch has no targets that the loss
        needs.
        """
        function = learner_of(state).loss
        bare = not state.yb and not state.training and learner_of(state).targets
        if bare and not self.targetless.measured(function):
            return state
        with torch.set_grad_enabled(state.training):
            # A loss that is known not to write needs no look at the versions of its targets.
            if self.loss_function.writes.get(state.training) is False:
                loss = function(state.pred, *(state.yb or ()))
            else:
                loss = self.loss_function.call(
                    lambda yb: function(state.pred, *yb), state.yb or (), state.training
                )
            loss = full(loss)  # of a DTensor, not this process's part
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"Learner: loss must return a 0-d tensor, got one of type {type(loss).__name__}. "
                f"Take the mean of it."
            )
        if loss.dim() != 0:
            raise ValueError(
                f"Learner: loss must return a 0-d tensor, got one of shape {tuple(loss.shape)}. "
                f"Take the mean of it."
            )
        return state.replace(loss=loss)

    def gradients(self, state: State) -> State:
        """The derivative of the loss by every parameter, None for frozen ones; the graph is let go.

        What the model has written to its params in place is part of them from here on.
        """
        placed = self.placed
        assert placed is not None, "[predict] comes first"
        tracked = [value for name, value in self.during.items() if name not in state.frozen]
        grads: list[Tensor | None] = []
        loss = state.loss
        if loss is not None:
            if self.trained == 1:  # a graph of the first batch looks like all others
                check_reached(loss, placed, self.during)
            grads = gradients(loss, tracked, [placed])
        # One None among many is a parameter that this batch did not use; all of them is a mistake.
        if loss is None or all(grad is None for grad in grads):
            raise ValueError(
                "Learner: the loss does not depend on any parameter, so there is no gradient. "
                "Does the model, or a callback, detach it? Does it run another module, or have all "
                "parameters requires_grad=False?"
            )
        if self.spend_grads:
            # A gradient may be a view, which holds the tensor that it is a view of.
            grads = detached(grads)
        each = iter(grads)  # of those that are tracked
        by_name: dict[str, Tensor | None] = {}
        for name in self.during:
            by_name[name] = None if name in state.frozen else next(each)
        self.unused.look(by_name, state.frozen)
        # The loss may have called the model once more.
        late = placed.look() & state.buffers.keys()
        if late:
            state = state.replace(buffers={**state.buffers, **placed.after(late)})
        params = state.params
        # Otherwise a callback has put other params in place since [predict], and these stay.
        if params is self.during:
            params = self.before
            if not placed.changed.isdisjoint(params):
                params = {**params, **placed.after(params.keys() & placed.changed)}
        self.leave()
        # Let go, or the params from before the step would stay in memory beside the new ones.
        self.during, self.before = {}, {}
        ended = state.replace(
            params=params, grads=by_name, pred=detached(state.pred), loss=loss.detach()
        )
        if learner_of(state).opt.perturbs:
            return ended.replace(grads=self._perturbed(ended))
        return ended

    def _perturbed(self, state: State) -> dict[str, Tensor | None]:
        """The gradients at the params that the optimizer wants them at, given those of the batch.

        The batch is done once more, with the same chance and the same handlers of pred and loss.
        What it makes of buffers and of the state is left out: the batch counts once.
        """
        learner = learner_of(state)
        with torch.no_grad():
            there = learner.opt.perturb(state.params, state.grads, state.opt_state, state.hyper)
        again = Work()
        # These know whether model and loss write to the batch, which costs a copy to find out.
        again.model, again.loss_function = self.model, self.loss_function
        again.trained = self.trained
        try:
            # Between the same brackets too: autocast, layers that are to stay in evaluation mode.
            with self.brackets("predict"):
                at = again.predict(state.replace(params=there, grads=None, loss=None, pred=None))
            for event in ("after_pred", "after_loss", "before_backward"):
                if event == "after_loss":
                    with self.brackets("loss"):
                        at = again.loss(at)
                for _, handler in self.handlers.get(event, ()):
                    result = handler(at.replace(event=event))
                    at = at if result is None else result
            tracked = {n: v for n, v in again.during.items() if n not in at.frozen}
            assert at.loss is not None
            assert again.placed is not None
            found = gradients(at.loss, list(tracked.values()), [again.placed])
        except Cancel as signal:
            # The state to go on from is that of the batch, not one at perturbed params.
            raise type(signal)(state) from None
        finally:
            again.leave()
        each = dict(zip(tracked, found, strict=True))
        return {name: each.get(name) for name in state.params}

    def update(self, state: State) -> State:
        """One step of the optimizer, which gets the loss if it asks for it."""
        learner = learner_of(state)
        if state.donated:
            opt = learner.donating_stepper
        elif self.spend_grads:
            opt = learner.sparing_stepper
        else:
            opt = learner.stepper
        self.stepper = opt
        extras: dict[str, object] = {}
        if "value" in opt.names:
            extras["value"] = state.loss
        if "value_fn" in opt.names:
            extras["value_fn"] = partial(self._value_at, state)
        hyper = {name: value for name, value in state.hyper.items() if name not in extras}
        # Whoever has a view has a say: a gradient that lies where one of these does is not spent.
        views = [one.detach() for one in tensors_in(state.memory)] if self.spend_grads else []
        with torch.no_grad():
            params, opt_state = opt(state.params, state.grads, state.opt_state, hyper, **extras)
        del views
        left = None if self.spend_grads else state.grads
        return state.replace(params=params, opt_state=opt_state, grads=left)

    def _value_at(self, state: State, params: Mapping[str, Tensor]) -> Tensor:
        """The loss of this batch at other params, with the same chance; it is differentiable."""
        again = Work()
        again.model, again.loss_function = self.model, self.loss_function
        seed_torch(batch_key(state), device_of(state))
        try:
            with self.brackets("predict"):
                pred = again._predict(state, params)
            with self.brackets("loss"):
                loss = again.loss(state.replace(pred=pred, loss=None)).loss
        finally:
            again.leave()
        assert loss is not None
        return loss


def _no_brackets(name: str) -> AbstractContextManager[object]:
    return nullcontext()


def set_mode(state: State) -> None:
    """Put the model into the mode of the state, if it is in the other."""
    # Only then, as in a model that a callback has put in place: train() would undo what callbacks
    # have set layer by layer.
    model = learner_of(state).model
    if model.training != state.training:
        model.train(state.training)


def batch_key(state: State) -> int:
    """The seed of what is random in the forward pass of a training batch, such as dropout."""
    salt = learner_of(state).salt
    if salt == 0:  # nothing in the key, so rank 0 draws what a learner without ranks draws
        return key(state.seed, state.train_iter, _BATCH)
    return key(state.seed, state.train_iter, _BATCH, salt)


def validation_key(state: State) -> int:
    """The seed of what is random in the forward pass of a validation batch."""
    return key(state.seed, state.epochs_seen, state.iter, _VALID_BATCH)


def learner_of(state: State) -> Learner:
    """The learner of the run that the state is in."""
    assert state.learner is not None, "a running state has a learner"
    return state.learner


def device_of(state: State) -> torch.device:
    """Where the parameters are."""
    return next((value.device for value in state.params.values()), torch.device("cpu"))


def split_batch(
    learner: Learner, batch: Tree, device: torch.device
) -> tuple[tuple[Tree, ...], tuple[Tree, ...]]:
    """A batch as (inputs, targets), on the device; of a dict, targets by name."""
    if isinstance(batch, Mapping):
        missing = [name for name in learner.targets if name not in batch]
        if len(missing) == len(learner.targets):
            missing = []  # a batch without targets, to predict
        if missing:
            raise ValueError(
                f"Learner: the batch has no {missing}, only {list(batch)}. Say which entries are "
                f"targets: Learner(..., targets=...)."
            )
        moved = {name: to_device(part, device) for name, part in batch.items()}
        yb = tuple(moved.pop(name) for name in learner.targets if name in moved)
        return (ByName(moved),), yb
    given = batch if isinstance(batch, (tuple, list)) else (batch,)
    parts = tuple([to_device(part, device) for part in given])
    count = min(learner.n_inputs, len(parts))
    return parts[:count], parts[count:]


def to_device(part: Tree, device: torch.device) -> Tree:
    """All tensors of a tree, on the device."""
    if isinstance(part, Tensor):
        # From pinned memory the copy then runs beside the work; from any other torch waits anyway.
        return part if part.device == device else part.to(device, non_blocking=True)
    return map_tensors(lambda leaf: leaf.to(device), part)
