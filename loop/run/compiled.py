"""Forward pass, loss and gradients of a training batch as one compiled graph, and the forward pass
of a validation batch as another, for `fit(..., compile=True)`.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import optree
import torch
from torch import Tensor

from functional_sgd.compile.step import without_kernels
from functional_sgd.compile.traced import (
    LIST,
    Traced,
    by_name,
    constants_in,
    joined,
    numbers_of,
    trace,
)
from loop.run.attributes import attributes_of, changed_attributes
from loop.run.chance import seed_torch
from loop.run.graph_cache import (
    Graphs,
    Learned,
    counted,
    flat,
    taken_apart,
)
from loop.run.stages import Work, batch_key, device_of, learner_of, validation_key
from loop.state import State

if TYPE_CHECKING:
    from loop.run.machine import Run

INSIDE = ("after_pred", "after_loss", "before_backward")
"""The events that happen while the graph runs. Handlers that are traceable are part of it."""

BEFORE_UPDATE = ("after_backward", "before_step")
"""If every handler of these is traceable too, the graph goes on to the update; else it ends before
the first handler that is not.
"""

FEW = 16  # leaves that the graph updates; for more, it would take long to compile and gain nothing

Handlers = dict[str, list[tuple[str, Callable[[State], Any]]]]


@dataclass(frozen=True, eq=False)
class Results:
    """What a graph has computed, to be handed out stage by stage, and the state that it was
    computed from.
    """

    state: State
    shown: Tensor  # the loss after after_loss
    loss: Tensor  # the loss that was differentiated
    grads: dict[str, Tensor | None]
    remembered: Mapping[str, Any]  # by the handlers inside
    updated: tuple[Any, Any] | None  # params and opt_state


class CompiledWork(Work):
    """The stages, of which [predict], [loss] and [gradients] of a training batch, and often
    [update], are one graph. In validation, [predict] is.

    It runs at [predict]; the later stages hand its results out, so every event happens as ever.
    What a callback changes between them would come too late and is an error, unless the event is
    among its `traceable` ones: handlers of these are compiled with the rest, and must work on
    tensors without looking at their values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside: Handlers = {}
        self.results: Results | None = None
        self.updates = False  # whether the graph goes on to the update
        self.learned = Learned((None, None, None), (), LIST)
        self.evaluated = self.learned  # what validation batches have
        self.validates = True  # whether a validation batch can be compiled
        self.plain: tuple[Any, Any] = (None, None)  # an optimizer, and what is traced of it
        self.graphs = Graphs()

    def join(self, run: "Run") -> None:
        """Take over the handlers that belong into the graph. In validation, where the graph ends
        with the prediction, they are called.
        """
        self.brackets = run.brackets_of
        own = {
            event: [one for one in run.handlers[event] if _is_traceable(event, one[1])]
            for event in _EVENTS
        }
        # A bracket around one of these stages would open when the graph has long been there.
        update = [*BEFORE_UPDATE, "around_gradients", "around_update"]
        few = len(run.state.params) <= FEW and learner_of(run.state).opt.traceable
        self.updates = few and all(
            len(own.get(event, ())) == len(run.handlers_of(event)) for event in update
        )
        if not self.updates:  # nothing of what comes after a handler that is called
            every = run.handlers["after_backward"]
            first = [*takewhile(own["after_backward"].__contains__, every)]
            own = {event: own[event] for event in INSIDE} | {"after_backward": first}
        self.inside = own
        for event, taken in self.inside.items():
            run.handlers[event] = tuple(
                (name, partial(_in_validation, method) if (name, method) in taken else method)
                for name, method in run.handlers[event]
            )
        self.names = {name for taken in self.inside.values() for name, _ in taken}
        self.always = tuple(
            (event, name, method) for event, taken in self.inside.items() for name, method in taken
        )

    def over(self, scope: str) -> None:
        """A scope that is no batch has come to its end."""
        super().over(scope)
        self.graphs.look_again()

    def predict(self, state: State) -> State:
        """Run the graph of a training batch."""
        if not state.training:
            return super().predict(state)
        learner, device = learner_of(state), device_of(state)
        self.graphs.look_at(learner.model)
        if learner.model.training != state.training:
            learner.model.train(state.training)
        tensors, fixed = self._inputs(state, device)
        graph = self.graphs.find(tensors, fixed, lambda: self._traced(state, tensors, fixed))
        # After the graph is made, for that runs the model, which draws random numbers.
        seed_torch(batch_key(state), device)
        (parts, shape, shown, loss, grads, remembered, buffers, updated), leaves = graph(tensors)
        state = state.replace(pred=shape.filled(parts), buffers=buffers)
        self.results = Results(state, shown, loss, grads, remembered, updated)
        if updated is not None:
            # What comes out is what the next batch goes in with, so its leaves are known already.
            count = self.learned.spec.num_leaves
            self.learned = Learned(
                (buffers, *updated), leaves[len(leaves) - count :], self.learned.spec
            )
        return state

    def _predict(self, state: State, params: Mapping[str, Tensor]) -> Any:
        """The prediction for a validation batch, by its graph if there can be one."""
        if not self.validates:
            return super()._predict(state, params)
        self.graphs.look_at(learner_of(state).model)
        learned = self.evaluated = self.evaluated.now((state.buffers, params, None))
        around, spec = flat(state.xb)
        inputs = [leaf for leaf in around if isinstance(leaf, Tensor)]
        tensors, constants = [*learned.leaves, *inputs], constants_in(around)
        modes = self._modes(device_of(state))
        fixed = (constants, "validation", spec, learned.spec, *modes)

        def batch(*values: Tensor) -> Any:
            trees: Any = learned.spec.unflatten(values[: len(learned.leaves)])
            buffers, evaluated, _ = trees
            xb = spec.unflatten(joined(constants, spec, iter(values[len(learned.leaves) :])))
            work = Work()
            try:
                with self._traceable():
                    pred = work._predict(state.replace(buffers=buffers, xb=xb), evaluated)
            finally:
                work.leave()
            return taken_apart(pred)

        try:
            graph = self.graphs.find(
                tensors, fixed, lambda: self._checked(state, batch, tensors, fixed)
            )
        except Exception as error:
            # Validation can do without a graph. An error of the model's own comes again in the call
            # below.
            warnings.warn(
                f"fit(compile=True): validation runs without being compiled: {error}",
                stacklevel=2,
            )
            self.validates = False
            return super()._predict(state, params)
        # As for a training batch: making the graph has drawn random numbers.
        seed_torch(validation_key(state), device_of(state))
        (parts, shape), _ = graph(tensors)
        return shape.filled(parts)

    def loss(self, state: State) -> State:
        """Hand out the loss."""
        if not state.training:
            return super().loss(state)
        results = self._unchanged(state, "pred", "yb", "params", "learner")
        return state.replace(loss=results.shown)

    def gradients(self, state: State) -> State:
        """Hand out the gradients."""
        results = self._unchanged(state, "pred", "yb", "params", "learner")
        if state.loss is not results.shown:
            raise _late("loss")
        self.unused.look(results.grads, state.frozen)
        changes: dict[str, Any] = dict(grads=results.grads, loss=results.loss)
        if results.remembered:
            changes["memory"] = {**state.memory, **results.remembered}
        return state.replace(**changes)

    def update(self, state: State) -> State:
        """Hand out what the graph has made of params and optimizer state, or call the optimizer."""
        results, self.results = self.results, None
        if results is None or results.updated is None or not self._as_before(results, state):
            return super().update(state)
        params, opt_state = results.updated
        left = None if self.spend_grads else state.grads
        return state.replace(params=params, opt_state=opt_state, grads=left)

    def _as_before(self, results: Results, state: State) -> bool:
        """Whether the update was made of what is there now."""
        same = all(
            getattr(state, name) is getattr(results.state, name)
            for name in ("params", "opt_state", "hyper")
        )
        return same and state.grads is results.grads and state.learner is results.state.learner

    def _unchanged(self, state: State, *names: str) -> Results:
        results = self.results
        assert results is not None, "[predict] comes first"
        for name in names:
            if getattr(state, name) is not getattr(results.state, name):
                raise _late(name)
        return results

    def _inputs(self, state: State, device: torch.device) -> tuple[list[Tensor], tuple[Any, ...]]:
        """The tensors that the graph is run on, and everything else that it depends on."""
        learner, memory = learner_of(state), None
        # Of handlers inside only: with what others remember, every value would make another graph.
        if self.names:
            known: Any = {name: value for name, value in state.memory.items() if name in self.names}
            memory = optree.tree_map(counted, known, none_is_leaf=True)
        opt, hyper = None, None
        if self.updates:
            opt, hyper = self._plain(learner.opt), numbers_of({**learner.opt.hyper, **state.hyper})
        opt_state = state.opt_state if self.updates else None
        learned = self.learned = self.learned.now((state.buffers, state.params, opt_state))
        around, spec = flat((state.xb, state.yb, learner.loss, memory, hyper))
        tensors = [*learned.leaves, *[leaf for leaf in around if isinstance(leaf, Tensor)]]
        modes = self._modes(device)
        fixed = (constants_in(around), spec, learned.spec, state.frozen, *modes, opt, self.always)
        return tensors, fixed

    def _modes(self, device: torch.device) -> tuple[Any, ...]:
        """What else a forward pass depends on: the modes of the layers, and autocast."""
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        return tuple([layer.training for layer in self.graphs.layers]), autocast

    def _plain(self, opt: Any) -> Any:
        if self.plain[0] is not opt:
            self.plain = (opt, without_kernels(opt))
        return self.plain[1]

    def _traced(self, state: State, tensors: list[Tensor], fixed: tuple[Any, ...]) -> Traced:
        """The graph for a batch like this one."""
        constants, spec, learned = fixed[0], fixed[1], fixed[2]

        def batch(*values: Tensor) -> Any:
            rest = iter(values)
            buffers, params, opt_state = learned.unflatten(
                [next(rest) for _ in range(learned.num_leaves)]
            )
            xb, yb, loss, memory, hyper = spec.unflatten(joined(constants, spec, rest))
            learner = replace(learner_of(state), loss=loss)
            changes: dict[str, Any] = dict(params=params, buffers=buffers, xb=xb, yb=yb)
            if self.updates:
                # Kernels cannot be traced.
                learner = replace(learner, opt=self._plain(learner.opt), fused=False)
                changes |= dict(opt_state=opt_state, hyper=by_name(hyper))
            known = {**state.memory, **(memory or {})}
            return self._eagerly(state.replace(**changes, learner=learner, memory=known))

        return self._checked(state, batch, tensors, fixed)

    def _checked(
        self,
        state: State,
        batch: Callable[..., Any],
        tensors: list[Tensor],
        fixed: tuple[Any, ...],
    ) -> Traced:
        """A graph of a function of tensors, for a model that leaves nothing behind."""
        self._check_model(state)
        return trace(batch, tensors, fixed, _ADVICE)

    def _check_model(self, state: State) -> None:
        """Raise ValueError if the model leaves behind what a graph would not. Runs it twice."""
        model, trial = learner_of(state).model, Work()
        trial.trained = 2  # no warning: this is an error here
        for _ in range(2):  # the first call may fill caches
            before = attributes_of(model)
            trial.predict(state)
            written = trial.placed.changed & state.params.keys() if trial.placed else set()
            trial.leave()
        found = changed_attributes(before, attributes_of(model))
        if written or found:
            how = f"writes to {sorted(written)} in place" if written else f"changes {found}"
            raise ValueError(
                f"fit(compile=True): every forward pass of the {type(model).__name__} {how}, which "
                f"a compiled batch would not do. Keep what changes in buffers (register_buffer), "
                f"or fit without compile=True."
            )

    def _eagerly(self, state: State) -> tuple[Any, ...]:
        """The batch, by the ordinary stages and the handlers inside."""
        work = Work()
        try:
            with self._traceable():
                return self._by(work, state)
        finally:
            work.leave()

    @contextmanager
    def _traceable(self) -> Iterator[None]:
        """Trace an LSTM as what it is made of, since oneDNN's fails in Inductor (torch 2.15)."""
        enabled = torch._C._get_mkldnn_enabled()
        if self.graphs.has_lstm:
            torch._C._set_mkldnn_enabled(False)
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(enabled)

    def _by(self, work: Work, state: State) -> tuple[Any, ...]:
        known = state.memory
        state = self._handled("after_pred", work.predict(state))
        # All of this is within the machine's [predict], so the brackets of [loss] are not open yet.
        with self.brackets("loss"):
            state = work.loss(state)
        state = self._handled("after_loss", state)
        shown = state.loss
        state = work.gradients(self._handled("before_backward", state))
        differentiated = state.loss
        for event in BEFORE_UPDATE:
            state = self._handled(event, state)
        if state.loss is not differentiated:  # on several ranks, it is known when gradients are
            shown = state.loss
        after = work.update(state) if self.updates else None
        updated = None if after is None else (after.params, after.opt_state)
        parts, shape = taken_apart(state.pred)
        new = {name: own for name, own in state.memory.items() if own is not known.get(name)}
        assert shown is not None
        # The buffers and what was updated come last: `predict` takes their leaves from the end.
        return parts, shape, shown.detach(), state.loss, state.grads, new, state.buffers, updated

    def _handled(self, event: str, state: State) -> State:
        for name, method in self.inside.get(event, ()):
            state = state.replace(event=event)
            result = method(state)
            if result is not None:
                self._check_remembered(name, event, state.memory, result.memory)
                state = result
        return state

    def _check_remembered(
        self, name: str, event: str, before: Mapping[str, Any], after: Mapping[str, Any]
    ) -> None:
        """Raise ValueError if a handler leaves something that cannot come out of a graph."""
        if before is after:
            return
        new: Any = [own for key, own in after.items() if own is not before.get(key)]
        odd = [leaf for leaf in optree.tree_leaves(new) if not isinstance(leaf, _KEPT)]
        if odd or before.keys() - after.keys():
            did = f"remember {odd[0]!r}" if odd else "forget anything"
            raise ValueError(
                f"callback {name!r} is traceable, so it cannot {did} in {event}, only remember "
                f"tensors and numbers, in tuples, lists and dicts. Do it in another event."
            )


_KEPT = (Tensor, int, float, str)
"""What handlers inside may remember: a graph hands it out."""

_ADVICE = (
    "fit(compile=True): this batch could not be compiled. A model, a loss or a traceable callback "
    "that branches on the values of tensors, or makes shapes of them as x[x > 0] does, cannot: "
    "write torch.where, or fit without compile=True."
)


def _late(name: str) -> ValueError:
    return ValueError(
        f"fit(compile=True): a callback has changed state.{name} between [predict] and "
        f"[gradients], which have been "
        f"computed in one go. Change it in before_batch; or name the event in `traceable` of the "
        f"callback's class, if "
        f"its handler works on tensors without looking at their values; or fit without "
        f"compile=True."
    )


def _is_traceable(event: str, method: Any) -> bool:
    return event in getattr(getattr(method, "__self__", None), "traceable", ())


def _in_validation(method: Callable[[State], Any], state: State) -> Any:
    return None if state.training else method(state)


_EVENTS = (*INSIDE, *BEFORE_UPDATE)
