"""fuse: the same optimizer, with its elementwise rules as compiled passes over memory."""

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from functional_sgd.call import Leaves, take_apart
from functional_sgd.chained import Front
from functional_sgd.chaining import Chain
from functional_sgd.fingerprint import fingerprint, reads_outside
from functional_sgd.fusion.backends.available import AvailableBackends
from functional_sgd.fusion.backends.backend import Backend, Unavailable, treating
from functional_sgd.fusion.backends.c.launch import CBackend
from functional_sgd.fusion.backends.foreach import ForeachBackend
from functional_sgd.fusion.backends.triton.launch import TritonBackend
from functional_sgd.fusion.buffers import Pool
from functional_sgd.fusion.differentiated import Tracked, is_differentiated
from functional_sgd.fusion.explain import explained, sources
from functional_sgd.fusion.group import Group, Needs, Signature, signatures
from functional_sgd.fusion.passes import Pass, Program
from functional_sgd.fusion.pieces import lay_out
from functional_sgd.fusion.planning import make_program
from functional_sgd.fusion.run import Resources, Run
from functional_sgd.fusion.spent import (
    AliasedReads,
    Donate,
    Results,
    check_apart,
    check_donate,
    merged,
    only,
    put_back,
    refuse_spent,
    spend,
)
from functional_sgd.guard import Guard
from functional_sgd.hyper import Hyper
from functional_sgd.optimizer import Optimizer, check_optimizer
from functional_sgd.precision import computed_in
from functional_sgd.sharded import any_distributed
from functional_sgd.state import State
from functional_sgd.step import run_leaves
from functional_sgd.tracing import recorded
from functional_sgd.tree import Tree

Wrapped = TypeVar("Wrapped", bound=Optimizer)

BACKENDS: tuple[Backend, ...] = (CBackend(), TritonBackend(), ForeachBackend())
"""Who runs kernels: for each device, the first that treats it and works."""

_KNOWN_TREES = 16  # kinds of trees whose groups an optimizer remembers


@overload
def fuse(
    opt: Chain,
    donate: Donate = False,
    debug: bool | None = None,
    backends: Sequence[Backend] = BACKENDS,
) -> "Fused": ...
@overload
def fuse(
    opt: Wrapped,
    donate: Donate = False,
    debug: bool | None = None,
    backends: Sequence[Backend] = BACKENDS,
) -> Wrapped: ...
def fuse(
    opt: Optimizer,
    donate: Donate = False,
    debug: bool | None = None,
    backends: Sequence[Backend] = BACKENDS,
) -> Optimizer:
    """The optimizer with the same signature and results, in few passes over memory for all leaves.

    Elementwise rules become kernels: they are run on symbols, what they do is written as C and
    compiled with the system's compiler (once: kernels are kept on disk), and called over a table of
    pointers to the leaves where they lie, in whatever order their elements are in memory. A number
    made of columns (a norm) is taken in a pass that has them at hand, and ends it. Rules that are
    leafwise or treewise, or do something that is not pointwise arithmetic, run with torch between
    the passes; `explain(params)` says what will run. Hypers are data: another value, a schedule, or
    a tree of values compiles nothing again. Calls under torch.func, torch.compile or with gradients
    to be tracked run leaf by leaf, and so do trees with a leaf that kernels cannot treat (complex,
    sparse, tensor subclasses).

    On a GPU the same pass is written for Triton, and launched once for all leaves of a dtype. The
    host never waits for the device, so steps can be captured in a CUDA graph, after one step that
    is not. Give the hypers that will change as 0-d tensors on the GPU, since numbers are part of
    the graph; and copy the step counts that come out into those that went in, so that a replay
    counts.

    Pure by default: results are new tensors, in memory that is used again once the caller has
    dropped it; all large leaves of params, or of a slot, lie in one buffer (so torch.save of a
    single leaf writes the whole buffer). With `donate` the memory of params and state is
    overwritten and handed back: the trees passed in are spent, no two leaves may share memory, and
    the step is not differentiated (a gradient may lie in the memory of its own param or slot). With
    `donate="grads"` new params take the memory of large gradients, and those alone are spent. With
    `debug` (default: whether the environment has FUNCTIONAL_SGD_DEBUG) using what is spent raises
    ValueError.

    A wrapper (partition, accumulate, ...) comes back around its fused optimizers, which spend no
    gradients; what is fused is fused anew. Raises TypeError if `opt` is not an optimizer. Without a
    compiler it warns once, and kernels are replaced by torch's foreach operators.

    >>> from functional_sgd import adamw
    >>> opt = fuse(adamw(lr=0.1))
    >>> params = {"w": torch.ones(3)}
    >>> params, state = opt(params, {"w": torch.ones(3)}, opt.init(params))
    >>> params
    {'w': tensor([0.8990, 0.8990, 0.8990])}
    """
    check_optimizer("fuse", opt)
    check_donate("fuse", donate)
    if isinstance(opt, Fused):
        opt = opt.opt
    if isinstance(opt, (Chain, Front)):
        debug = bool(os.environ.get("FUNCTIONAL_SGD_DEBUG")) if debug is None else debug
        return Fused(opt, donate, debug, tuple(backends))
    # Gradients that a wrapper passes on are still its own: it may read them after the inner step.
    inner = donate is True
    return opt.with_inner(tuple(fuse(one, inner, debug, backends) for one in opt.inner))


def donating(opt: Optimizer) -> Optimizer:
    """The fused optimizer that overwrites params and state, for owners of both.

    Some wrappers need the old values, so what is inside them does not overwrite.
    """
    try:
        return fuse(opt, donate=True)
    except ValueError:
        return fuse(opt)


class Fused(Optimizer):
    """An optimizer whose elementwise rules run as compiled kernels; `fuse` makes one.

    Besides memory and compiled code it keeps nothing: results depend on the arguments alone.
    """

    def __init__(
        self, opt: Chain | Front, donate: Donate, debug: bool, backends: tuple[Backend, ...]
    ) -> None:
        self.opt, self.gives = opt, donate
        self.donate = donate is True
        self.debug = debug and donate is not False
        self.backends = AvailableBackends(backends)
        # Rules should read their arguments alone. What else they read is a constant of a kernel.
        self._reading = [c.rule.function for c in opt.plan.calls if reads_outside(c.rule.function)]
        self._plan_kernels()
        self._apart: tuple[Guard | None, Mapping[str, Any]] = None, {}  # where donated ones begin
        self._aliased_reads = AliasedReads()
        self._lock = threading.Lock()
        self._pool = Pool()
        self._unbatched: set[int] = set()

    def _plan_kernels(self) -> None:
        self._read = [*map(fingerprint, self._reading)]
        self.programs: dict[frozenset[str], Program] = {}
        self.program = self._program(frozenset())  # of params in full precision
        self._scalars: set[str] = set()
        for step in self.program.steps:
            if isinstance(step, Pass):
                self._scalars.update(step.scalars)
        self._groups: dict[tuple[Signature, ...], tuple[list[Group], list[int]]] = {}
        self._guard: Guard | None = None  # of the last trees that were grouped
        self._guarded: list[Group] = []

    @property
    def hyper(self) -> dict[str, Hyper]:
        """The hypers and their defaults."""
        return self.opt.hyper

    @property
    def required(self) -> tuple[str, ...]:
        """The hypers, extras and columns that have no default."""
        return self.opt.required

    @property
    def donates(self) -> bool:
        """Whether params and state are overwritten."""
        return self.donate

    @property
    def averages(self) -> bool:
        """Whether the chain keeps what is to be evaluated."""
        return self.opt.averages

    def evaluated(self, params: Tree, state: State) -> Tree:
        """What the chain wants to be evaluated."""
        return self.opt.evaluated(params, state)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        # For copies, which compile for themselves.
        return Fused, (self.opt, self.gives, self.debug, tuple(self.backends.every))

    def init(self, params: Tree) -> State:
        """A fresh state, as the chain makes it; detached, if it is to be overwritten."""
        if not self.donate:
            return self.opt.init(params)
        with torch.no_grad():
            return self.opt.init(params)

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Hyper] | None = None,
        **extras: Any,
    ) -> Any:
        """One step: (new params, new state)."""
        # Kernels work on memory: stand-ins have none, and a recording would miss the step.
        if recorded():
            return self.opt(params, grads, state, hyper, **extras)
        plan = self.opt.plan
        if self._reading and [*map(fingerprint, self._reading)] != self._read:
            with self._lock:
                self._plan_kernels()
        # A guard does not know columns that the caller gives.
        guard = None if plan.given else self._guard
        leaves = take_apart(plan, params, grads, state, hyper, extras, guard)
        if self.debug:
            refuse_spent(params, leaves)
        if is_differentiated(leaves, guard, self.donate):
            return run_leaves(plan, leaves)
        try:
            if leaves.distributed:
                result = self._on_pieces(leaves, guard)
            else:
                result = self._step(leaves, guard)
        except Tracked:
            return self.opt(params, grads, state, hyper, **extras)
        return spend(leaves, result, self.donate) if self.debug else result

    def _on_pieces(self, leaves: Leaves, guard: Guard | None) -> Results:
        leaves = leaves.on_pieces()
        copies = lay_out(leaves)
        columns: list[list[Any]] = [leaves.params, *leaves.slots.values(), leaves.grads]
        # take_apart compared the DTensors themselves, but the guard was made from local pieces.
        leaves.matches_guard = guard is not None and guard.fits(columns)
        result = self._step(leaves, guard)
        if self.donate and leaves.shards is not None:
            # Kernels overwrote the copies; the caller holds the originals.
            for copy, original in copies:
                original.copy_(copy)
            leaves.shards.write_back()
        return result

    def _step(self, leaves: Leaves, guard: Guard | None) -> Results:
        if self.donate:
            # Equal addresses rule out overlap only if shapes and strides are equal too, which the
            # guard says. Both are one attribute, because threads use it without the lock.
            alike, starts = self._apart
            known = starts if leaves.matches_guard and alike is guard else None
            written = check_apart(leaves.trees["param"], leaves, known)
            leaves.starts = {**leaves.starts, **written}
            self._apart = (guard if leaves.matches_guard else None, written)
        for name in self._scalars & leaves.shared.keys():
            value = leaves.shared[name]
            if type(value) is not float and not _is_number(value):
                # An extra that is left out, or is no number.
                result = self._leaf_by_leaf(leaves)
                return put_back(leaves, result) if self.donate else result
        # Groups, the buffer pool and kernel tables are reused, so calls take turns.
        with self._lock:
            # Another thread may have grouped other trees by now.
            leaves.matches_guard = leaves.matches_guard and guard is self._guard
            if self.donate:
                recognised = guard if leaves.matches_guard else None
                self._aliased_reads.copy(leaves, written, recognised)
            if leaves.matches_guard:
                return self._run(leaves, self._guarded)
            groups, others = self._grouped(leaves)
            if not others:
                return self._run(leaves, groups)
            return self._run_mixed(leaves, groups, others)

    def _run(self, leaves: Leaves, groups: list[Group]) -> Results:
        program = self.program_for(groups)
        while True:
            spends, backends = self.gives == "grads", self.backends.working()
            resources = Resources(self._pool, backends, self._unbatched, self.donate, spends)
            run = Run(self.opt.plan, program, groups, leaves, resources)
            # As they were: a run that is given up half way may have counted already.
            numbers = dict(leaves.numbers)
            try:
                results, slots = run()
                break
            except Unavailable as error:
                # The caller's memory is partly overwritten: another backend cannot start over.
                if run.started:
                    raise
                # `common` caches these numbers for each device.
                leaves.numbers, leaves.common = numbers, {}
                self.backends.give_up(error)
        return leaves.rebuild(results, slots)

    def _run_mixed(self, leaves: Leaves, groups: list[Group], others: Sequence[int]) -> Results:
        """The step of a tree in which kernels cannot treat some leaves, which run leaf by leaf.

        All leaves do if a number is made of several of them, or a rule sees the whole tree.
        """
        if groups and self.splits:
            theirs = replace(leaves, grads=only(leaves.grads, set(others)))
            ours = replace(leaves, grads=only(leaves.grads, {*leaves.active} - {*others}))
            # This part runs first: if a rule fails in it, kernels have not overwritten anything.
            rest = self._leaf_by_leaf(theirs)
            result = merged(leaves, self._run(ours, groups), rest, others)
        else:
            result = self._leaf_by_leaf(leaves)
        return put_back(leaves, result) if self.donate else result

    def _leaf_by_leaf(self, leaves: Leaves) -> Results:
        """The step by torch; not tracked if it is donated, as kernels are not."""
        with torch.no_grad() if self.donate else nullcontext():
            return run_leaves(self.opt.plan, leaves)

    def release(self) -> None:
        """Let go of the memory that a pure step keeps for the next one."""
        with self._lock:
            self._pool = Pool()

    def source(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
        """The code of every kernel, for leaves and gradients of this dtype.

        C, or Triton's Python for "cuda"; a GPU's kernel is shown as it is when hypers are numbers.
        """
        backend = treating(self.backends.every, torch.device(device))
        rounded = frozenset[str]() if dtype == computed_in(dtype) else frozenset({"param"})
        return sources(self._program(rounded), self.opt.plan.blocks, backend, dtype)

    def explain(self, params: Tree = None) -> None:
        """Print the passes of the chain, and the rules that torch runs between them, and why; a
        notebook shows them as a table in HTML.

        With `params`, also which leaves run in kernels, and how many bytes of columns each step
        moves for each byte of params.

        >>> from functional_sgd import centralize, chain, clip_norm, sgd
        >>> fuse(chain(centralize, clip_norm, sgd(lr=0.1))).explain()
        torch   centralize: it is leafwise
        kernel  takes grad_norm             reads grad
        kernel  clip_norm, sgd_step         reads param, grad; writes param
        """
        explained(self, params).show()

    def __repr__(self) -> str:
        return f"fuse({self.opt!r}{f', donate={self.gives!r}' if self.gives else ''})"

    def working(self) -> list[Backend]:
        """The backends that are there, but for those that have failed a short time ago."""
        return self.backends.working()

    def program_for(self, groups: Sequence[Group]) -> Program:
        """What runs on these groups."""
        # All groups share one program: a reduction over the tree needs them in the same pass.
        narrow: set[str] = set()
        for group in groups:
            narrow.update(group.narrow)
        if not narrow:
            return self.program
        kept = {"param", *self.opt.plan.slots}
        return self._program(frozenset(kept.intersection(narrow)))

    def _program(self, rounded: frozenset[str]) -> Program:
        if rounded not in self.programs:
            self.programs[rounded] = make_program(self.opt.plan, rounded)
        return self.programs[rounded]

    @property
    def splits(self) -> bool:
        """Whether some leaves can run in kernels and others leaf by leaf."""
        return not any(call.rule.needs_tree for call in self.opt.plan.calls)

    def needs(self) -> Needs:
        """What the kernels need of a leaf."""
        passes = [step for step in self.program.steps if isinstance(step, Pass)]
        # Slots that no kernel touches may have any shape and dtype.
        touched: set[str] = set()
        for work in passes:
            touched.update(work.reads, work.outputs)
        own = (*self.opt.plan.slots, *self.opt.plan.given)
        columns = tuple(name for name in own if name in touched)
        blocks = {n: scales for n, scales in self.opt.plan.blocks.items() if n in columns}
        return Needs(columns, any(work.ordered for work in passes), self.donate, blocks)

    def _grouped(self, leaves: Leaves) -> tuple[list[Group], Sequence[int]]:
        """(the leaves in groups of one kind, those that kernels cannot treat)."""
        needs = self.needs()
        # By looks, not by identity: new params of every step are new tensors, but the kinds are the
        # same.
        key = signatures(leaves, needs)
        if key not in self._groups:
            if len(self._groups) >= _KNOWN_TREES:
                self._groups.clear()
            self._groups[key] = Group.split(key, needs.columns, leaves)
        groups, others = self._groups[key]
        grads = [grad for grad in leaves.grads if grad is not None]
        # Only such calls can be recognised: a guard needs a tensor at every leaf, and recognised
        # calls skip the search for other leaves.
        if len(grads) == len(leaves.params) and not others:
            for group in groups:
                group.find_alike({"grad": grads, **leaves.slots}, leaves.params)
            columns = [leaves.params, *leaves.slots.values(), grads]
            # Slots with shapes of their own are still DTensors, whose placement a guard ignores.
            if any(map(any_distributed, columns)):
                return groups, others
            self._guard, self._guarded = Guard(leaves.spec, columns), groups
        return groups, others


def _is_number(value: object) -> bool:
    return value.dim() == 0 if isinstance(value, Tensor) else isinstance(value, (int, float))
