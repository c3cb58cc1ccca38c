"""Say what a fused optimizer will really run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, NamedTuple

import optree
import torch

from functional_sgd.blocks import count_of
from functional_sgd.call import take_apart
from functional_sgd.fusion.backends.backend import Backend, treating
from functional_sgd.fusion.group import Group, signatures
from functional_sgd.fusion.kernel import Dtypes
from functional_sgd.fusion.passes import Pass, Program, Step, TorchRule
from functional_sgd.fusion.pieces import lay_out
from functional_sgd.notebook import html_table, show
from functional_sgd.precision import computed_in
from functional_sgd.rule import REQUIRED
from functional_sgd.sharded import Shards
from functional_sgd.table import aligned
from functional_sgd.tree import Tree, paths

if TYPE_CHECKING:
    from functional_sgd.fusion.fused import Fused


class Row(NamedTuple):
    """A step of a program in words."""

    executor: str  # a kernel, or torch
    rules: str  # for torch, also the reason
    columns: str  # what it reads and writes


@dataclass(frozen=True)
class Explanation:
    """The steps of a program, a row for each, and lines about the leaves that they run on."""

    steps: Sequence[Row]
    lines: Sequence[str] = ()

    def __str__(self) -> str:
        blocks = []
        if self.steps:
            blocks.append(aligned(self.steps))
        if self.lines:
            blocks.append("\n".join(self.lines))
        return "\n\n".join(blocks)

    def show(self) -> None:
        """Print it; in a notebook, show the steps as a table, and the lines below."""
        table = html_table(self.steps, Row._fields) if self.steps else ""
        below = ""
        for line in self.lines:
            if line:
                below += f"<p>{escape(line)}</p>"
        show(str(self), table + below)


def sources(
    program: Program, blocks: Mapping[str, str], backend: Backend, dtype: torch.dtype
) -> str:
    """The code of every kernel of a program, for leaves and gradients of this dtype.

    `blocks` are the slots of 8-bit codes, and those of their scales.
    """
    working, parts = computed_in(dtype), []
    stored = {"param": dtype, "grad": dtype}
    for codes, scales in blocks.items():
        stored |= {codes: torch.uint8, scales: torch.float32}
    for work in program.steps:
        if isinstance(work, Pass):
            reads = tuple([stored.get(name, working) for name in work.reads])
            writes = tuple([stored.get(name, working) for name in work.outputs])
            parts.append(backend.source(work, Dtypes(reads, writes, working, dtype)))
    return "\n".join(parts)


def explained(fused: "Fused", params: Tree) -> Explanation:
    """The steps of its program; with params, also where their leaves run and what is moved."""
    if params is None:
        return _explanation(fused.program.steps, [])
    placed = _placed(fused, params)
    others, shards = placed.others, placed.shards
    left_out = f"leaf by leaf: kernels cannot treat {_shown(placed.names, others)}"
    if others and not (placed.groups and fused.splits):
        return Explanation((), [f"All {_leaves(len(placed.names))} run {left_out}"])
    steps = fused.program_for(placed.groups).steps
    lines = [_moves(fused, steps, group) for group in placed.groups]
    if others:
        lines.append(f"{_leaves(len(others))} without kernels, {left_out}")
    if shards is not None and shards.any_cut:
        lines.append(_asked(steps, shards))
    return _explanation(steps, lines)


def _asked(steps: Sequence[Step], shards: Shards) -> str:
    """What a step needs of other processes."""
    names: list[str] = []
    whole = []
    count = 0
    for step in steps:
        reductions = step.takes if isinstance(step, Pass) else step.call.reductions
        names += [one.name for one in reductions]
        # Numbers that are combined in the same way share a collective.
        count += len({one.reduction.combine for one in reductions}) * shards.n_collectives
        if isinstance(step, TorchRule) and step.call.rule.scope not in ("elementwise", "blockwise"):
            whole.append(repr(step.call.rule))
    collectives = "1 collective" if count == 1 else f"{count or 'no'} collectives"
    text = f"{_leaves(sum(shards.cut))} cut over processes: {collectives} a step"
    if names:
        text += f" ({', '.join(names)})"
    if whole:
        text += f"; whole leaves are seen by {', '.join(whole)}"
    return text


@dataclass(frozen=True)
class Cost:
    """What a step of a tree costs: kernels over memory, bytes, and the rules that torch runs."""

    passes: int
    moved: int
    by_torch: tuple[str, ...]


def cost(fused: "Fused", params: Tree) -> Cost:
    """What a step of these params costs, if all of them run in kernels."""
    groups = _placed(fused, params).groups
    steps = fused.program_for(groups).steps
    moved = 0
    for group in groups:
        moved += sum(_bytes(step, group) for step in steps)
    by_torch = tuple(repr(step.call.rule) for step in steps if isinstance(step, TorchRule))
    return Cost(len(steps) - len(by_torch), moved, by_torch)


def _explanation(steps: Sequence[Step], lines: Sequence[str]) -> Explanation:
    if not steps:
        nothing = ["nothing to run", "", *lines] if lines else ["nothing to run"]
        return Explanation([], nothing)
    made: dict[str, str] = {}  # where torch puts a column -> the name that rules have for it
    for step in steps:
        if isinstance(step, TorchRule):
            for name, key in step.outputs.items():
                made[key] = name
    rows = [_row(step, made) for step in steps]
    return Explanation(rows, lines)


def _moves(fused: "Fused", steps: Sequence[Step], group: Group) -> str:
    """Who treats a group, and what that moves."""
    backend = treating(fused.working(), group.device)
    dtype = str(group.dtypes["param"]).removeprefix("torch.")
    size = sum(group.sizes) * group.dtypes["param"].itemsize
    moved = sum(_bytes(step, group) for step in steps)
    return (
        f"{_leaves(len(group.indices))} of {dtype} on {group.device}: {backend.name}, "
        f"{_count(steps)} over memory, "
        f"{moved / max(size, 1):.1f} bytes moved for each byte of params"
    )


def _shown(names: Sequence[str], others: Sequence[int]) -> str:
    """Leaves that no kernel treats."""
    first = ", ".join(names[index] for index in others[:3])
    more = "" if len(others) <= 3 else f" and {len(others) - 3} more"
    return f"{first}{more} (dtype, layout, class or slots of another shape)"


def _leaves(count: int) -> str:
    return "1 leaf" if count == 1 else f"{count} leaves"


class _Placed(NamedTuple):
    """Where the leaves of a tree run."""

    groups: list[Group]
    others: list[int]  # the leaves that run leaf by leaf
    names: list[str]  # of all leaves
    shards: Shards | None  # if some leaves are DTensors


def _placed(fused: "Fused", params: Tree) -> _Placed:
    """Where leaves run, if all of them have a gradient."""
    state = fused.init(params)
    plan = fused.opt.plan
    grads = optree.tree_map(torch.zeros_like, params)
    # The values of hypers do not decide where a leaf runs; these satisfy every range.
    open_ones = {}
    for name, value in plan.defaults.items():
        if value is REQUIRED:
            open_ones[name] = torch.ones(())
    given = dict.fromkeys(plan.given, grads)
    leaves = take_apart(plan, params, grads, state, open_ones, given).on_pieces()
    lay_out(leaves)
    needs = fused.needs()
    groups, others = Group.split(signatures(leaves, needs), needs.columns, leaves)
    return _Placed(groups, others, paths(params), leaves.shards)


def _row(step: Step, made: Mapping[str, str]) -> Row:
    """A line, in which columns that torch has made have the names that rules know."""
    if not isinstance(step, Pass):
        return Row("torch", f"{step.call.rule!r}: {step.reason}", "")
    read = [made.get(name, name) for name in step.reads]
    columns = f"reads {', '.join(read)}"
    if step.outputs:
        columns += f"; writes {', '.join(step.outputs)}"
    return Row("kernel", step.title, columns)


def _count(steps: Sequence[Step]) -> str:
    count = sum(isinstance(step, Pass) for step in steps)
    return "1 pass" if count == 1 else f"{count} passes"


def _bytes(step: Step, group: Group) -> int:
    """What a step reads and writes of a group; of a rule that torch runs, the least."""
    names: tuple[str, ...]
    of_blocks: frozenset[str] = frozenset()
    if isinstance(step, Pass):
        names, of_blocks = (*step.reads, *step.outputs), step.of_blocks
    else:
        names = (*step.inputs.values(), *step.outputs.values())
    size = sum(group.sizes)
    blocks = sum(map(count_of, group.sizes))  # no block is of two leaves
    moved = 0
    for name in names:
        count = blocks if name in of_blocks else size
        moved += group.dtypes.get(name, group.working).itemsize * count
    return moved
