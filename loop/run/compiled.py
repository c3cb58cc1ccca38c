"""Forward pass, loss and gradients of a training batch as one compiled graph, and the forward pass
of a validation batch as another, for `fit(..., compile=True)`.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import optree
import torch
from torch import Tensor

from functional_sgd.compile.step import without_kernels
from functional_sgd.compile.traced import (
    LIST,
    Traced,
    by_name,
    check_constants,
    constants_in,
    joined,
    numbers_of,
    trace,
)
from functional_sgd.hyper import with_hypers
from functional_sgd.optimizer import Optimizer
from functional_sgd.placing import look_again
from functional_sgd.tree import Tree
from loop.replaced import to_be_trained
from loop.run.attributes import attributes_of, changed_attributes
from loop.run.chance import seed_torch
from loop.run.graph_cache import (
    Graphs,
    Key,
    Learned,
    Modes,
    Shape,
    counted,
    flat,
    taken_apart,
)
from loop.run.inside import BEFORE_UPDATE, NOBODY, inside_of, take_over
from loop.run.stages import (
    Work,
    batch_key,
    device_of,
    learner_of,
    set_mode,
    validation_key,
)
from loop.state import State

if TYPE_CHECKING:
    from loop.run.machine import Run

FEW = 16  # leaves that the graph updates; for more, it would take long to compile and gain nothing


class Outputs(NamedTuple):
    """What the graph of a training batch hands out."""

    parts: list[object]  # of the prediction
    shape: Shape
    shown: Tensor  # the loss after after_loss
    loss: Tensor  # the loss that was differentiated
    grads: Mapping[str, Tensor | None]
    remembered: Mapping[str, Tree]  # by the handlers inside
    # The last ones, in this order: `predict` takes their leaves from the end.
    buffers: Mapping[str, Tensor]
    updated: tuple[Tree, Tree] | None  # params and optimizer state


@dataclass(frozen=True, eq=False)
class Results:
    """What a graph has computed, to be handed out stage by stage, and of which state."""

    state: State
    outputs: Outputs


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
        self.inside = NOBODY
        self.results: Results | None = None
        self.updates = False  # whether the graph goes on to the update
        self.learned = Learned((None, None, None), (), LIST)
        self.evaluated = self.learned  # what validation batches have
        self.validates = True  # whether a validation batch can be compiled
        self.plain: tuple[Optimizer, Optimizer] | None = None  # a fused one, and without kernels
        self.graphs = Graphs()

    def join(self, run: "Run") -> None:
        """Take over the handlers that belong into the graph."""
        self.brackets = run.brackets_of
        few = len(run.state.params) <= FEW and learner_of(run.state).opt.traceable
        self.inside = inside_of(run, few)
        self.updates = self.inside.goes_on
        take_over(run, self.inside)

    def over(self, scope: str) -> None:
        """A scope that is no batch has come to its end."""
        super().over(scope)
        # Not in every batch, since that takes long; between phases, callbacks may change the model.
        self.graphs.look_again()

    def predict(self, state: State) -> State:
        """Run the graph of a training batch."""
        if not state.training:
            return super().predict(state)
        learner, device = learner_of(state), device_of(state)
        self.graphs.look_at(learner)
        set_mode(state)
        state = to_be_trained(state, learner.opt)
        tensors, key = self._inputs(state, device)
        graph = self.graphs.find(tensors, key, lambda: self._traced(state, tensors, key))
        # After the graph is made, for that runs the model, which draws random numbers.
        seed_torch(batch_key(state), device)
        made, leaves = graph(tensors)
        outputs: Outputs = made
        pred = outputs.shape.filled(outputs.parts)
        state = state.replace(pred=pred, buffers=outputs.buffers)
        self.results = Results(state, outputs)
        if outputs.updated is not None:
            # What comes out is what the next batch goes in with, so its leaves are known already.
            spec = self.learned.spec
            new = leaves[len(leaves) - spec.num_leaves :]
            self.learned = Learned((outputs.buffers, *outputs.updated), new, spec)
        return state

    def _predict(
        self, state: State, params: Mapping[str, Tensor], spendable: Collection[str] = ()
    ) -> Tree:
        """The prediction for a validation batch, by its graph if there can be one."""
        if not self.validates:
            return super()._predict(state, params)
        self.graphs.look_at(learner_of(state))
        learned = self.evaluated = self.evaluated.now((state.buffers, params, None))
        around, spec = flat(state.xb)
        inputs = [leaf for leaf in around if isinstance(leaf, Tensor)]
        tensors, constants = [*learned.leaves, *inputs], constants_in(around)
        key = Key(constants, "validation", spec, learned.spec, self._modes(device_of(state)))

        def batch(*values: Tensor) -> tuple[list[object], Shape]:
            trees: Tree = learned.spec.unflatten(values[: len(learned.leaves)])
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
                tensors, key, lambda: self._checked(state, batch, tensors, key, len(around))
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
        return state.replace(loss=results.outputs.shown)

    def gradients(self, state: State) -> State:
        """Hand out the gradients."""
        outputs = self._unchanged(state, "pred", "yb", "params", "learner").outputs
        if state.loss is not outputs.shown:
            raise _late("loss")
        self.unused.look(outputs.grads, state.frozen)
        if outputs.remembered:
            state = state.replace(memory={**state.memory, **outputs.remembered})
        return state.replace(grads=outputs.grads, loss=outputs.loss)

    def update(self, state: State) -> State:
        """Hand out what the graph has made of params and optimizer state, or call the optimizer."""
        results, self.results = self.results, None
        updated = None if results is None else results.outputs.updated
        if results is None or updated is None or not self._as_before(results, state):
            return super().update(state)
        params, opt_state = updated
        left = None if self.spend_grads else state.grads
        return state.replace(params=params, opt_state=opt_state, grads=left)

    def _as_before(self, results: Results, state: State) -> bool:
        """Whether the update was made of what is there now."""
        before = results.state
        return (
            state.params is before.params
            and state.opt_state is before.opt_state
            and state.hyper is before.hyper
            and state.learner is before.learner
            and state.grads is results.outputs.grads
        )

    def _unchanged(self, state: State, *names: str) -> Results:
        results = self.results
        assert results is not None, "[predict] comes first"
        for name in names:
            if getattr(state, name) is not getattr(results.state, name):
                raise _late(name)
        return results

    def _inputs(self, state: State, device: torch.device) -> tuple[list[Tensor], Key]:
        """The tensors that the graph is run on, and everything else that it depends on."""
        learner, names = learner_of(state), self.inside.names
        opt, hyper, opt_state, memory = None, None, None, None
        # Of handlers inside only: with what others remember, every value would make another graph.
        if names:
            known: Tree = {name: value for name, value in state.memory.items() if name in names}
            memory = optree.tree_map(counted, known, none_is_leaf=True)
        if self.updates:
            opt = self._plain(learner.opt)
            hyper = numbers_of(with_hypers(learner.opt.hyper, state.hyper))
            opt_state = state.opt_state
        learned = self.learned = self.learned.now((state.buffers, state.params, opt_state))
        around, spec = flat((state.xb, state.yb, learner.loss, memory, hyper))
        inputs = [leaf for leaf in around if isinstance(leaf, Tensor)]
        key = Key(
            constants_in(around),
            "training",
            spec,
            learned.spec,
            self._modes(device),
            self.graphs.functions,
            state.frozen,
            opt,
            self.inside.listed,
        )
        return [*learned.leaves, *inputs], key

    def _modes(self, device: torch.device) -> Modes:
        """What a forward pass depends on besides tensors."""
        autocast = None
        if torch.is_autocast_enabled(device.type):
            autocast = torch.get_autocast_dtype(device.type)
        return Modes(tuple([layer.training for layer in self.graphs.layers]), autocast)

    def _plain(self, opt: Optimizer) -> Optimizer:
        """What is traced instead of an optimizer: kernels cannot be."""
        # Made once: it is in the key of every graph, where another one need not be equal.
        if self.plain is None or self.plain[0] is not opt:
            self.plain = (opt, without_kernels(opt))
        return self.plain[1]

    def _traced(self, state: State, tensors: list[Tensor], key: Key) -> Traced:
        """The graph for a batch like this one."""
        count = key.learned.num_leaves
        xb_spec, yb_spec, *_ = key.data.children()
        in_data = xb_spec.num_leaves + yb_spec.num_leaves

        def batch(*values: Tensor) -> Outputs:
            learned: Tree = key.learned.unflatten(values[:count])
            around: Tree = key.data.unflatten(joined(key.constants, key.data, iter(values[count:])))
            buffers, params, opt_state = learned
            xb, yb, loss, memory, hyper = around
            learner = replace(learner_of(state), loss=loss)
            changes: dict[str, Any] = dict(params=params, buffers=buffers, xb=xb, yb=yb)
            if self.updates:
                learner = replace(learner, opt=self._plain(learner.opt), fused=False)
                changes |= dict(opt_state=opt_state, hyper=by_name(hyper))
            known = {**state.memory, **(memory or {})}
            return self._eagerly(state.replace(**changes, learner=learner, memory=known))

        return self._checked(state, batch, tensors, key, in_data)

    def _checked(
        self,
        state: State,
        batch: Callable[..., Any],
        tensors: list[Tensor],
        key: Key,
        in_data: int,
    ) -> Traced:
        """A graph of a function of tensors, for a model that leaves nothing behind, and data (the
        first leaves around what is learned) that has no odd objects.
        """
        found = [one for one in key.constants if one.place < in_data]
        check_constants("fit(compile=True)", found)
        self._check_model(state)
        return trace(batch, tensors, key, _ADVICE)

    def _check_model(self, state: State) -> None:
        """Raise ValueError if the model leaves behind what a graph would not. Runs it twice."""
        model, trial = learner_of(state).model, Work()
        trial.trained = 2  # no warning: this is an error here
        look_again(model)
        moved: set[str] = set()
        for _ in range(2):  # the first call may fill caches
            before = attributes_of(model)
            trial.predict(state)
            assert trial.placed is not None
            trial_written = {*trial.placed.changed}
            written = trial_written & state.params.keys()
            # A graph does not see what is put into `.data`, of buffers and frozen params neither.
            moved |= trial.placed.moved
            trial.leave()
        written |= moved
        if not state.training:
            # The graph of a validation batch gives a prediction alone.
            written |= trial_written & state.buffers.keys()
        found = changed_attributes(before, attributes_of(model))
        if written or found:
            how = f"writes to {sorted(written)} in place" if written else f"changes {found}"
            raise ValueError(
                f"fit(compile=True): every forward pass of the {type(model).__name__} {how}, which "
                f"a compiled batch would not do. Keep what changes in buffers (register_buffer), "
                f"or fit without compile=True."
            )

    def _eagerly(self, state: State) -> Outputs:
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

    def _by(self, work: Work, state: State) -> Outputs:
        known = state.memory
        state = self.inside.call("after_pred", work.predict(state))
        # All of this is within the machine's [predict], so the brackets of [loss] are not open yet.
        with self.brackets("loss"):
            state = work.loss(state)
        state = self.inside.call("after_loss", state)
        shown = state.loss
        state = work.gradients(self.inside.call("before_backward", state))
        differentiated = state.loss
        for event in BEFORE_UPDATE:
            state = self.inside.call(event, state)
        if state.loss is not differentiated:  # on several ranks, it is known when gradients are
            shown = state.loss
        updated = None
        if self.updates:
            after = work.update(state)
            updated = (after.params, after.opt_state)
        parts, shape = taken_apart(state.pred)
        new = {name: own for name, own in state.memory.items() if own is not known.get(name)}
        assert shown is not None
        assert state.loss is not None
        assert state.grads is not None
        return Outputs(
            parts, shape, shown.detach(), state.loss, state.grads, new, state.buffers, updated
        )


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
