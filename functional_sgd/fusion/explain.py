"""Say what a fused optimizer will really run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import optree
import torch

from functional_sgd.call import take_apart
from functional_sgd.fusion.group import Group, signatures
from functional_sgd.fusion.passes import Pass, Step
from functional_sgd.rule import REQUIRED
from functional_sgd.table import aligned
from functional_sgd.tree import Tree, paths

if TYPE_CHECKING:
    from functional_sgd.fusion.fused import Fused


def explained(fused: "Fused", params: Tree) -> str:
    """The steps of its program; with params, also where their leaves run and what is moved."""
    rows = [_row(step) for step in fused.program.steps]
    text = aligned(rows) if rows else "nothing to run"
    if params is None:
        return text
    groups, others, names = _placed(fused, params)
    lines = [text, ""]
    if others:
        shown = ", ".join(names[index] for index in others[:3])
        more = "" if len(others) <= 3 else f" and {len(others) - 3} more"
        lines.append(
            f"All {len(names)} leaves run leaf by leaf: kernels cannot treat {shown}{more} "
            f"(dtype, layout, class or slots of another shape)."
        )
        return "\n".join(lines)
    for group in groups:
        backend = next(one for one in fused.backends if one.treats(group.device))
        dtype = str(group.dtypes["param"]).removeprefix("torch.")
        size = sum(group.sizes) * group.dtypes["param"].itemsize
        moved = sum(_bytes(step, group) for step in fused.program.steps)
        lines.append(
            f"{len(group.indices)} leaves of {dtype} on {group.device}: {backend.name}, "
            f"{_count(fused.program.steps)} over memory, "
            f"{moved / max(size, 1):.1f} bytes moved for each byte of params"
        )
    return "\n".join(lines)


def _placed(fused: "Fused", params: Tree) -> tuple[list[Group], list[int], list[str]]:
    """(groups, leaves that run leaf by leaf, names) as they would be with gradients everywhere."""
    state = fused.init(params)
    plan = fused.opt.plan
    grads = optree.tree_map(torch.zeros_like, params)
    # The values of hypers do not decide where a leaf runs; these satisfy every range.
    hypers = [name for name, value in plan.defaults.items() if value is REQUIRED]
    open_ones = dict.fromkeys(hypers, torch.ones(()))
    leaves = take_apart(plan, params, grads, state, open_ones, dict.fromkeys(plan.given, grads))
    needs = fused.needs()
    groups, others = Group.split(signatures(leaves, needs), needs.columns, leaves)
    return groups, others, paths(params)


def _row(step: Step) -> tuple[str, str, str]:
    if not isinstance(step, Pass):
        return "torch", f"{step.call.rule!r}: {step.reason}", ""
    writes = ", ".join(step.outputs) or "nothing"
    return "kernel", step.title, f"reads {', '.join(step.reads)}; writes {writes}"


def _count(steps: Sequence[Step]) -> str:
    count = sum(isinstance(step, Pass) for step in steps)
    return "1 pass" if count == 1 else f"{count} passes"


def _bytes(step: Step, group: Group) -> int:
    """What a step reads and writes of a group; of a rule that torch runs, the least."""
    names = (
        (*step.reads, *step.outputs)
        if isinstance(step, Pass)
        else (*step.inputs.values(), *step.outputs.values())
    )
    each = sum(group.dtypes.get(name, group.working).itemsize for name in names)
    return each * sum(group.sizes)
