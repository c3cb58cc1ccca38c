"""fuse: the same optimizer, with every run of elementwise rules as one compiled pass over memory."""

import os
import threading
import warnings
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from functional_sgd.call import Leaves, take_apart
from functional_sgd.chaining import Chain, Optimizer
from functional_sgd.fusion.buffers import Pool
from functional_sgd.fusion.compiler import NoCompiler, load
from functional_sgd.fusion.device import NoTriton
from functional_sgd.fusion.group import Group, Signature, signatures
from functional_sgd.fusion.run import Means, Run
from functional_sgd.fusion.segments import Segment, cut
from functional_sgd.guard import Guard
from functional_sgd.rule import COUNTER
from functional_sgd.state import State, working_dtype
from functional_sgd.step import run_leaves
from functional_sgd.tracing import recorded
from functional_sgd.tree import Tree, paths

Wrapped = TypeVar("Wrapped", bound=Optimizer)
"""A wrapper: an optimizer with a method `map_inner`."""


@overload
def fuse(opt: Chain, donate: bool = False, debug: bool | None = None) -> "Fused": ...
@overload
def fuse(opt: Wrapped, donate: bool = False, debug: bool | None = None) -> Wrapped: ...
def fuse(opt: Any, donate: bool = False, debug: bool | None = None) -> Any:
    """The optimizer with the same signature and results, as one pass over memory for all leaves.

    Every run of elementwise rules becomes one kernel: the rules are run on symbols, what they do is
    written as C and compiled with the system's compiler (once: kernels are kept on disk), and
    called over a table of pointers to the leaves where they lie. Other rules (leafwise, treewise,
    or with an operation that is not pointwise arithmetic) run with torch between the kernels;
    `explain()` says which and why. Hypers are data: another value, a schedule, or a tree of values
    compiles nothing again. Calls under torch.func, torch.compile or with gradients to be tracked,
    and complex leaves, run leaf by leaf.

    On a GPU the same kernel is written for Triton, and launched once for all leaves of a dtype. The
    host never waits for the device, so steps can be captured in a CUDA graph, after one step that
    is not. Give the hypers that will change as 0-d tensors on the GPU, since numbers are part of
    the graph; and copy the step count that comes out into the one that went in, so that a replay
    counts on.

    Pure by default: results are new tensors, in memory that is used again once the caller has
    dropped it; all leaves of params, or of a slot, lie in one buffer (so torch.save of a single
    leaf writes the whole buffer). With `donate` the buffers of params and state are overwritten and
    handed back: the trees passed in are spent. With `debug` (default: whether the environment has
    FUNCTIONAL_SGD_DEBUG) using a spent tree raises ValueError.

    A wrapper (partition, accumulate, ...) comes back around its fused optimizers; what is fused is
    fused anew. Raises TypeError if `opt` is neither a chain nor a wrapper. Without a compiler it
    warns once, and kernels are replaced by torch's foreach operators.

    >>> from functional_sgd import adamw
    >>> opt = fuse(adamw(lr=0.1))
    >>> params = {"w": torch.ones(3)}
    >>> params, state = opt(params, {"w": torch.ones(3)}, opt.init(params))
    >>> params
    {'w': tensor([0.8990, 0.8990, 0.8990])}
    """
    if hasattr(opt, "map_inner"):
        return opt.map_inner(partial(fuse, donate=donate, debug=debug))
    if isinstance(opt, Fused):
        opt = opt.opt
    if not isinstance(opt, Chain):
        raise TypeError(f"fuse: expected a chain such as adamw(), got {opt!r}.")
    debug = bool(os.environ.get("FUNCTIONAL_SGD_DEBUG")) if debug is None else debug
    return Fused(opt, donate, debug)


class Fused:
    """An optimizer whose elementwise rules run as compiled kernels; `fuse` makes one.

    Besides memory and compiled code it keeps nothing: results depend on the arguments alone.
    """

    def __init__(self, opt: Chain, donate: bool, debug: bool) -> None:
        self.opt, self.donate, self.debug = opt, donate, debug and donate
        self.segments: tuple[Segment, ...] = cut(opt.plan)
        self.compiled = _has_compiler()
        self.triton = True  # until it turns out that there is none
        self._groups: dict[tuple[Signature, ...], list[Group]] = {}
        self._guard: Guard | None = None  # of the last trees, and how they are grouped
        self._guarded: list[Group] = []
        self._lock = threading.Lock()
        nodes = [
            node
            for segment in self.segments
            if segment.graph is not None
            for node in segment.graph.nodes
        ]
        self._scalars = {node.args[0] for node in nodes if node.op == "scalar"}
        self._pool = Pool()

    @property
    def hyper(self) -> dict[str, Any]:
        """The hypers and their defaults."""
        return self.opt.hyper

    @property
    def required(self) -> tuple[str, ...]:
        """The hypers and extras that have no default."""
        return self.opt.required

    def __reduce__(self) -> tuple[Any, ...]:
        return Fused, (
            self.opt,
            self.donate,
            self.debug,
        )  # for copies, which compile for themselves

    def init(self, params: Tree) -> State:
        """A fresh state, as the chain makes it."""
        return self.opt.init(params)

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Any] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step: (new params, new state)."""
        plan = self.opt.plan
        if recorded():
            return self.opt(params, grads, state, hyper, **extras)
        guard, guarded = self._guard, self._guarded
        leaves = take_apart(plan, params, grads, state, hyper, extras, guard)
        if self.debug:
            _refuse_spent(params, leaves)
        if _tracked(leaves) or not all(
            _is_number(leaves.shared.get(name, 0)) for name in self._scalars
        ):
            return run_leaves(plan, leaves)
        with self._lock:
            if leaves.familiar:
                groups = guarded
            else:
                groups = self._groups_of(leaves)
                self._watch(leaves, groups)
            run = Run(
                plan,
                self.segments,
                groups,
                leaves,
                self.donate,
                Means(self._pool, self.compiled, self.triton),
            )
            try:
                new_params, new_slots = run()
            except NoCompiler as error:
                if run.started:
                    raise
                _warn(error)
                if isinstance(error, NoTriton):
                    self.triton = False
                else:
                    self.compiled = False
                return run_leaves(plan, leaves)
            if self.debug:
                new_params, new_slots = _spend(leaves, new_params, new_slots)
        return leaves.rebuild(new_params, new_slots)

    def source(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
        """The code of every kernel, for leaves and gradients of this dtype: C, or Triton's Python
        for "cuda".

        A GPU's kernel is shown as it is when the hypers are numbers.
        """
        working = working_dtype(torch.empty(0, dtype=dtype))
        parts = []
        for segment in self.segments:
            if segment.graph is not None:
                kept = {key: dtype if key == "param" else working for key in segment.outputs}
                dtypes = defaultdict(lambda: working, {"param": dtype, "grad": dtype})
                kernel = (
                    segment.kernel(dtypes, kept, working)
                    if device == "cpu"
                    else segment.device_kernel(dtypes, kept, working, tensors=(COUNTER,))
                )
                parts.append(kernel.source)
        return "\n".join(parts)

    def explain(self) -> None:
        """Print the segments of the chain: what is a kernel, and what is not and why.

        >>> from functional_sgd import centralize, chain, clip_norm, sgd
        >>> fuse(chain(centralize, clip_norm, sgd(lr=0.1))).explain()
        torch   centralize: it is leafwise
        kernel  clip_norm, sgd_step
        """
        for segment in self.segments:
            print(
                f"kernel  {segment.title}"
                if segment.graph is not None
                else f"torch   {segment.reason}"
            )

    def __repr__(self) -> str:
        return f"fuse({self.opt!r}{', donate=True' if self.donate else ''})"

    def _watch(self, leaves: Leaves, groups: list[Group]) -> None:
        """Recognise such trees when they come again."""
        grads = [grad for grad in leaves.grads if grad is not None]
        if len(grads) == len(leaves.params):
            for group in groups:
                group.dense_grads = all(map(Tensor.is_contiguous, group.pick(grads)))
            self._guard, self._guarded = (
                Guard(leaves.spec, [leaves.params, *leaves.slots.values(), grads]),
                groups,
            )

    def _groups_of(self, leaves: Leaves) -> list[Group]:
        """The leaves in groups of one kind."""
        key = signatures(leaves)
        if key not in self._groups:
            if len(self._groups) >= 16:
                self._groups.clear()
            self._groups[key] = Group.split(key, leaves)
        return self._groups[key]


def _tracked(leaves: Leaves) -> bool:
    """Whether somebody wants to differentiate through the step."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    values = [*leaves.shared.values(), *(v for vs in leaves.separate.values() for v in vs)]
    if not leaves.familiar:
        values += [
            *leaves.params,
            *leaves.grads,
            *(leaf for column in leaves.slots.values() for leaf in column),
        ]
    return any(value.requires_grad for value in values if isinstance(value, Tensor))


def _refuse_spent(params: Tree, leaves: Leaves) -> None:
    for index, path in enumerate(paths(params)):
        for leaf in (leaves.params[index], *(column[index] for column in leaves.slots.values())):
            if getattr(leaf, "_spent_by", None):
                raise ValueError(
                    f"fuse: leaf {path!r} was donated to an earlier step, which has overwritten "
                    f"it. "
                    f"Go on with the params and state that the step returned, or fuse(opt, "
                    f"donate=False)."
                )


def _spend(
    leaves: Leaves, params: list[Tensor], slots: Mapping[str, list[Tensor]]
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """New tensors for the results; those passed in are emptied and marked."""
    new = (
        [leaf.detach() for leaf in params],
        {name: [leaf.detach() for leaf in column] for name, column in slots.items()},
    )
    for old in (*leaves.params, *(leaf for column in leaves.slots.values() for leaf in column)):
        old.data = torch.empty(0, dtype=old.dtype, device=old.device)
        old._spent_by = "fuse"  # type: ignore[attr-defined]
    return new


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0)


_warned: set[type[NoCompiler]] = set()


def _has_compiler() -> bool:
    try:
        load("int run(void) { return 0; }\n")
    except NoCompiler as error:
        _warn(error)
        return False
    return True


def _warn(error: NoCompiler) -> None:
    """Say once what is lost."""
    if type(error) not in _warned:
        _warned.add(type(error))
        warnings.warn(
            f"fuse: {error}. Optimizers run with foreach operators, several times slower. "
            f"{error.cure}",
            stacklevel=5,
        )
