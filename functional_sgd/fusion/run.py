"""One call of a fused optimizer: kernels and torch take turns over tables of columns."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from functional_sgd.call import Leaves, Plan
from functional_sgd.fusion.arithmetic import Node
from functional_sgd.fusion.backends.backend import Backend, Runner, treating
from functional_sgd.fusion.batches import run_in_batches
from functional_sgd.fusion.buffers import Pool
from functional_sgd.fusion.check import evaluate
from functional_sgd.fusion.column import Column
from functional_sgd.fusion.group import Group
from functional_sgd.fusion.kernel import Dtypes
from functional_sgd.fusion.passes import Pass, Program, TorchRule
from functional_sgd.fusion.scalars import Scalars
from functional_sgd.fusion.spent import spendable
from functional_sgd.sharded import distributed
from functional_sgd.state import gradient_for, owned, stored, working
from functional_sgd.step import (
    as_gradient,
    check_tree_scalars,
    reduce_columns,
    run_on_leaf,
    run_on_tree,
)
from functional_sgd.wiring import Call

Table = dict[str, Column]
"""The columns of a group by name."""


@dataclass(frozen=True)
class Resources:
    """What the calls of an optimizer share: memory that is used again, and who makes kernels."""

    pool: Pool
    backends: Sequence[Backend]
    unbatched: set[int]  # rules, by position, that torch runs leaf by leaf
    donate: bool
    spend_grads: bool  # whether new params take their memory


class Run:
    """A call: a table of columns for each group, and the program that works on them.

    Every leaf with a gradient is in some group; what no kernel can treat runs leaf by leaf, before
    it comes to this.
    """

    def __init__(
        self,
        plan: Plan,
        program: Program,
        groups: Sequence[Group],
        leaves: Leaves,
        resources: Resources,
    ) -> None:
        self.plan, self.program, self.groups, self.leaves = plan, program, groups, leaves
        self.resources = resources
        some_cut = leaves.shards is not None and leaves.shards.any_cut
        self.shards = leaves.shards if some_cut else None  # if numbers need all processes
        self.scalars = Scalars(leaves)
        self.started = False  # whether anything of the caller's has been overwritten
        self.pairs = [(group, self._table(group)) for group in groups]
        self.holders: Mapping[int, int] = {}  # of each tensor, if gradients may be spent
        if resources.spend_grads:
            columns = [column.tensors for _, table in self.pairs for column in table.values()]
            self.holders = Counter(map(id, itertools.chain(*columns)))

    @torch.no_grad()
    def __call__(self) -> tuple[dict[str, list[Any]], dict[str, list[Tensor]]]:
        """The results, and the slots, leaf by leaf; numbers of the tree are set in the leaves."""
        # All rules are checked before the first one overwrites anything.
        if self.groups and self.leaves.separate:
            for call in self.plan.calls:
                check_tree_scalars(self.plan, call, self.leaves)
        for step in self.program.steps:
            if isinstance(step, Pass):
                self._pass(step)
            else:
                self._torch_rule(step)
        self._set_numbers()
        return self._results()

    def _table(self, group: Group) -> Table:
        leaves, donate = self.leaves, self.resources.donate
        params = group.pick(leaves.params)
        alike = group.alike if leaves.matches_guard else frozenset[str]()
        grads = group.pick(leaves.grads)
        # Known addresses are those of all leaves together.
        starts = leaves.starts if group.everything else {}
        # Where a tensor begins is of use only if its elements lie as those of its param do.
        in_order = "grad" in alike
        table = {
            "param": Column(
                group.dtypes["param"], params, writable=donate, addresses=starts.get("param")
            ),
            "grad": Column(
                group.dtypes["grad"],
                grads,
                like=None if in_order else params,
                addresses=starts.get("grad") if in_order else None,
            ),
        }
        for name, values in leaves.slots.items():
            tensors = group.pick(values)
            # A donated slot lies as its param does; one of another shape is not for kernels.
            same = donate or name in alike or name not in group.dtypes
            dtype = group.dtypes[name] if name in group.dtypes else tensors[0].dtype
            like = None if same else params
            addresses = starts.get(name) if same else None
            table[name] = Column(dtype, tensors, donate, like=like, addresses=addresses)
        for name, given in leaves.given.items():
            tensors = group.pick(given)
            table[name] = Column(tensors[0].dtype, tensors, like=params)
        return table

    # Kernels.

    def _pass(self, work: Pass) -> None:
        """Run a pass over all groups, and finish what it takes."""
        parts = []
        for number, (group, table) in enumerate(self.pairs):
            totals = self._kernel(work, number, group, table)
            if totals is not None:
                parts.append((group, totals))
        if self.shards is not None and parts:
            kinds = [take.reduction.combine for take in work.takes]
            indices = [group.indices for group, _ in parts]
            self.shards.combine([totals for _, totals in parts], indices, kinds)
        for place, take in enumerate(work.takes):
            reduction = take.reduction
            if reduction.over == "tree":
                count = sum(sum(self._sizes(group)) for group, _ in parts)
                wholes = [reduction.whole(totals[:, place]) for _, totals in parts]
                if wholes:
                    total = wholes[0] if len(wholes) == 1 else reduction.together(wholes)
                    self.scalars.of_tree[take.name] = reduction.finished(total, count)
                continue
            for group, totals in parts:
                vector = totals[:, place]
                if reduction.finish == "mean":
                    if self.shards is None:
                        sizes = group.on_device("sizes", vector.device)
                    else:
                        # The sizes of whole leaves: those of the group are of pieces, and differ by
                        # process.
                        sizes = torch.tensor(self._sizes(group), device=vector.device)
                    # The mean of an empty leaf is 0 and not 0 / 0, as in `Reduction.finished`.
                    vector = vector / sizes.clamp(min=1)
                elif reduction.finish == "root":
                    vector = vector.sqrt()
                self.scalars.of_leaves[take.name, id(group)] = vector

    def _sizes(self, group: Group) -> list[int]:
        """How many elements each leaf has, wherever they are."""
        return group.sizes if self.shards is None else list(map(self.shards.size, group.indices))

    def _kernel(self, work: Pass, number: int, group: Group, table: Table) -> Tensor | None:
        """Run a pass over one group."""
        backend = treating(self.resources.backends, group.device)
        # Whoever reads an address must hold its column until the kernel has run: these lists do.
        reads = [table[name] for name in work.reads]
        results = self.program.results.values()
        # A temporary keeps the working precision, since it stands for the computed value.
        kept = {
            name: group.dtypes[name] if name in group.dtypes and name in results else group.working
            for name in work.outputs
        }
        dtypes = Dtypes(
            tuple([c.dtype for c in reads]),
            tuple(kept.values()),
            group.working,
            group.dtypes["param"],
        )
        runner = self._runner(backend, work, dtypes, group)
        writes = []
        for name, dtype in kept.items():
            column = table.get(name)
            if column is None or not column.writable or column.dtype != dtype:
                like = table[name if name in work.of_blocks else "param"].tensors
                spent: Mapping[int, Tensor] = {}
                if name == "param" and self.resources.spend_grads:
                    spent = self._spent(work, table, dtype)
                rest = like
                if spent:
                    # The kernel overwrites gradients: from here the step cannot be repeated.
                    self.started = True
                    rest = [one for place, one in enumerate(like) if place not in spent]
                # The group is part of the name: the pool keeps only two buffers for each name.
                pool, key = self.resources.pool, f"{number}.{name}"
                tensors = backend.allocate(pool, key, rest, dtype) if rest else []
                if spent:
                    new = iter(tensors)
                    tensors = [spent[n] if n in spent else next(new) for n in range(len(like))]
                column = Column(dtype, tensors, writable=True)
            writes.append(column)
        # Before the kernel and not after it: one that fails half way has overwritten something.
        self.started = self.started or self.resources.donate
        totals = runner(group, reads, writes, self.scalars)
        if self.resources.donate and "param" in kept:
            # A kernel writes unseen by autograd: a backward pass that needs the old values fails.
            torch.autograd.graph.increment_version(table["param"].tensors)
        table.update(zip(kept, writes, strict=True))
        return totals

    def _spent(self, work: Pass, table: Table, dtype: torch.dtype) -> dict[int, Tensor]:
        """The gradients, by their place, whose memory the new params take."""
        if table["grad"].dtype != dtype or self.program.needed_after(work, "grad"):
            return {}
        return spendable(table["grad"].tensors, table["param"].tensors, self.holders)

    def _runner(self, backend: Backend, work: Pass, dtypes: Dtypes, group: Group) -> Runner:
        kinds = backend.kinds(work, self.scalars, group)
        key = (id(backend), dtypes, kinds)
        if key not in work.compiled:
            work.compiled[key] = backend.compile(work, dtypes, self.scalars, group)
        runner: Runner = work.compiled[key]
        return runner

    # Rules that torch runs.

    def _torch_rule(self, step: TorchRule) -> None:
        call = step.call
        seen = [self._seen(group, table, step) for group, table in self.pairs]
        # Without leaves, reductions have no value, and these numbers may depend on them.
        numbers = self._evaluated(step.numbers) if self.groups else {}
        made = (self._on_tree if call.treewise else self._on_leaves)(step, seen, numbers)
        for (group, table), written in zip(self.pairs, made, strict=True):
            for name, values in written.items():
                table[step.outputs[name]] = self._made(group, table, call, name, values)

    def _seen(self, group: Group, table: Table, step: TorchRule) -> dict[str, list[Tensor]]:
        """The columns that a rule reads, as rules see them."""
        seen = {}
        for name, key in step.inputs.items():
            column = table[key]
            if name in self.leaves.slots and name not in group.dtypes:  # of a shape of its own
                seen[name] = list(map(working, column.tensors))
            else:
                params = table["param"].tensors
                pairs = zip(params, column.tensors, strict=True)
                seen[name] = [gradient_for(param, value) for param, value in pairs]
            if name in step.logical:
                seen[name] = [value != 0 for value in seen[name]]
        return seen

    def _on_tree(
        self,
        step: TorchRule,
        seen: Sequence[Mapping[str, Sequence[Tensor]]],
        numbers: Mapping[str, Tensor],
    ) -> list[dict[str, list[Tensor]]]:
        call = step.call
        columns: dict[str, dict[int, Tensor]] = {outer: {} for _, outer in call.reads}
        for group, own in zip(self.groups, seen, strict=True):
            for name, values in own.items():
                columns[name].update(zip(group.indices, values, strict=True))
        first = next((index for group in self.groups for index in group.indices), None)
        if first is None:
            return [{} for _ in self.groups]
        scalars = {**self.leaves.scalars(first), **numbers}
        results = run_on_tree(self.plan, call, self.leaves, columns, scalars)
        for _, name in call.numbers:  # which are set in the leaves
            # The planner's name for the new number, under which later kernels read it.
            self.scalars.of_tree[step.sets[name]] = self.leaves.numbers[name]
        return [
            {name: group.pick(values) for name, values in results.items()} for group in self.groups
        ]

    def _on_leaves(
        self,
        step: TorchRule,
        seen: Sequence[Mapping[str, Sequence[Tensor]]],
        numbers: Mapping[str, Tensor],
    ) -> list[dict[str, list[Tensor]]]:
        call = step.call
        if self.leaves.shards is not None:
            made = self._on_pieces(call, seen, numbers)
        else:
            of_tree = {**numbers, **self._reduced_over_tree(call, seen)}
            made = [
                run_in_batches(call, self.leaves, group, own, of_tree, self.resources.unbatched)
                for group, own in zip(self.groups, seen, strict=True)
            ]
        for _, name in call.numbers:
            # Every leaf has set it to the same value.
            values = [value for written in made for value in written.pop(name)]
            if values:
                self.leaves.set_number(name, values[0])
                self.scalars.of_tree[step.sets[name]] = self.leaves.numbers[name]
        return made

    def _on_pieces(
        self,
        call: Call,
        seen: Sequence[Mapping[str, Sequence[Tensor]]],
        numbers: Mapping[str, Tensor],
    ) -> list[dict[str, list[Any]]]:
        """Leaf by leaf, since a leaf that is cut is seen as a whole, and no batch has DTensors."""
        columns: dict[int, dict[str, Tensor]] = {}
        for group, own in zip(self.groups, seen, strict=True):
            for place, index in enumerate(group.indices):
                columns[index] = {name: values[place] for name, values in own.items()}
        reduced = reduce_columns(self.plan, call, self.leaves, columns)
        kept: dict[int, dict[str, Tensor]] = {index: {} for index in columns}
        for index, own_columns in columns.items():
            scalars = {**self.leaves.scalars(index), **numbers, **reduced[index]}
            run_on_leaf(call, self.leaves, index, own_columns, scalars, kept[index])
            kept[index] = {**own_columns, **kept[index]}
        names = [name for _, name in (*call.writes, *call.numbers)]
        made = []
        for group in self.groups:
            written = {name: [kept[index][name] for index in group.indices] for name in names}
            made.append(written)
        return made

    def _reduced_over_tree(
        self, call: Call, seen: Sequence[Mapping[str, Sequence[Tensor]]]
    ) -> dict[str, Tensor]:
        values = {}
        for reduced in call.reductions:
            if reduced.reduction.over == "tree":
                parts: list[Tensor] = []
                count = 0
                for own in seen:
                    columns = [own[outer] for _, outer in reduced.columns]
                    for leaf in zip(*columns, strict=True):
                        named = zip((inner for inner, _ in reduced.columns), leaf, strict=True)
                        parts.append(reduced.reduction.of_leaf(dict(named)))
                        count += leaf[0].numel()
                if parts:
                    total = reduced.reduction.together(parts)
                    values[reduced.name] = reduced.reduction.finished(total, count)
        return values

    def _made(
        self, group: Group, table: Table, call: Call, name: str, values: Sequence[Tensor]
    ) -> Column:
        """What torch made of a rule's column, in memory that nothing else uses."""
        params = table["param"].tensors
        taken = [column.tensors for column in table.values()]
        tensors = []
        for place, value in enumerate(values):
            if name in group.dtypes or name not in self.leaves.slots:
                seen = working(params[place])  # a 0-d leaf has one axis for rules
                if self.shards is not None and distributed(value):  # of another shape
                    index = group.indices[place]
                    value = self.shards.piece(index, value.expand(self.shards.leaves[index].shape))
                value = value.to(group.working).expand(seen.shape).reshape(params[place].shape)
            # A rule may return its own input, which a later kernel may overwrite in place.
            tensors.append(owned(value, *(other[place] for other in taken)))
        return Column(group.working, tensors, kept=False, like=params)

    # Results.

    def _evaluated(self, nodes: Mapping[str, Node]) -> dict[str, Tensor]:
        values = {}
        for name, node in nodes.items():
            needed = node.graph.needed([node])
            named = {n.args[0]: self.scalars.tree(n.args[0]) for n in needed if n.op == "scalar"}
            values[name] = evaluate(needed, {}, named)[node.index]
        return values

    def _set_numbers(self) -> None:
        """What rules in kernels have made of the numbers of the tree; kernels have read the old."""
        if not self.groups:
            return
        changed = {
            name: node
            for name, node in self.program.numbers.items()
            if not (node.op == "scalar" and node.args[0] == name)
        }
        for name, value in self._evaluated(changed).items():
            self.leaves.set_number(name, value)

    def _results(self) -> tuple[dict[str, list[Any]], dict[str, list[Tensor]]]:
        before: dict[str, list[Tensor]] = {"param": self.leaves.params, **self.leaves.slots}
        after: dict[str, list[Any]] = {name: list(values) for name, values in before.items()}
        if "update" in self.plan.results:
            after["update"] = [None] * len(self.leaves.params)
        for group, table in self.pairs:
            used: set[str] = set()
            for name, values in after.items():
                key = self.program.results.get(name, name)
                # Two results may be the same column: the second is a copy, so they share nothing.
                tensors = self._kept(name, table[key], group, key in used)
                used.add(key)
                if group.everything:
                    # `rebuild` recognises a donated tree by the identity of its list.
                    # A pure step makes trees of its own: nobody sees the list of another.
                    after[name] = tensors if self.resources.donate else list(tensors)
                    continue
                for place, index in enumerate(group.indices):
                    values[index] = tensors[place]
        results = {name: after.pop(name) for name in self.plan.results}
        return results, after

    def _kept(self, name: str, column: Column, group: Group, again: bool) -> list[Tensor]:
        """A result in the shapes and dtype in which it is kept; in the old memory if donated."""
        if name == "update":
            params = group.pick(self.leaves.params)
            pairs = zip(column.tensors, params, strict=True)
            return [as_gradient(gradient_for(p, value), p) for value, p in pairs]
        if column.kept and not again:
            return column.tensors
        like = group.pick(self.leaves.params if name == "param" else self.leaves.slots[name])
        kept = [stored(value, old) for value, old in zip(column.tensors, like, strict=True)]
        if again:
            kept = [value.clone() for value in kept]
        if not self.resources.donate:
            return kept
        return [old if new is old else old.copy_(new) for new, old in zip(kept, like, strict=True)]
