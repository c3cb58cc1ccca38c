"""One call of a fused optimizer: kernels and torch take turns over tables of columns."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sgd.call import Leaves, Plan
from functional_sgd.fusion.backends.backend import Backend, Runner, treating
from functional_sgd.fusion.buffers import Pool
from functional_sgd.fusion.column import Column, Table
from functional_sgd.fusion.group import Group
from functional_sgd.fusion.kernel import Dtypes
from functional_sgd.fusion.passes import Pass, Program, Take
from functional_sgd.fusion.scalars import Scalars
from functional_sgd.fusion.spent import spendable
from functional_sgd.fusion.torch_rules import TorchRules
from functional_sgd.state import gradient_for, stored
from functional_sgd.step import as_gradient, check_tree_scalars


class Results(NamedTuple):
    """What a call has made, leaf by leaf."""

    results: dict[str, list[Tensor | None]]  # params, or updates; None without a gradient
    slots: dict[str, list[Tensor]]


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
        self.plan, self.program, self.leaves = plan, program, leaves
        self.resources = resources
        some_cut = leaves.shards is not None and leaves.shards.any_cut
        self.shards = leaves.shards if some_cut else None  # if numbers need all processes
        self.scalars = Scalars(leaves)
        self.started = False  # whether anything of the caller's has been overwritten
        self.tables = []
        for number, group in enumerate(groups):
            self.tables.append(Table(number, group, self._columns(group)))
        # Whether derivatives of torch's rules are kept; then the step may have to be repeated.
        has_rules = any(not isinstance(step, Pass) for step in program.steps)
        self.follows = torch.is_grad_enabled() and has_rules and not resources.donate
        self.holders: Mapping[int, int] = {}  # of each tensor, if gradients may be spent
        if resources.spend_grads:
            self.holders = self._count_holders()

    @torch.no_grad()
    def __call__(self) -> Results:
        """Go through the program. Numbers of the tree are set in the leaves.

        Raises Tracked if a rule of torch has made something that is tracked.
        """
        # All rules are checked before the first one overwrites anything.
        if self.tables and self.leaves.separate:
            for call in self.plan.calls:
                check_tree_scalars(self.plan, call, self.leaves)
        for step in self.program.steps:
            if isinstance(step, Pass):
                self._pass(step)
            else:
                # Its arguments are not tracked, but it may close over a tensor that is.
                with torch.set_grad_enabled(self.follows):
                    self._torch_rules.run(step)
        # Kernels have read the old numbers; new ones are set when all have run.
        if self.program.numbers and self.tables:
            for name, value in self.scalars.evaluate(self.program.numbers).items():
                self.leaves.set_number(name, value)
        return self._results()

    @functools.cached_property
    def _torch_rules(self) -> TorchRules:
        unbatched = self.resources.unbatched
        return TorchRules(self.plan, self.leaves, self.tables, self.scalars, self.shards, unbatched)

    def _columns(self, group: Group) -> dict[str, Column]:
        """The columns of a group before the first step."""
        leaves, donate = self.leaves, self.resources.donate
        params = group.pick(leaves.params)
        # Noted of the trees of the guard; of others it is not known.
        alike = group.alike if leaves.matches_guard else frozenset[str]()
        # Known addresses are those of all leaves together.
        starts = leaves.starts if group.everything else {}
        dtype, begin = group.dtypes["param"], starts.get("param")
        columns = {"param": Column(dtype, params, writable=donate, addresses=begin)}
        dtype, grads = group.dtypes["grad"], group.pick(leaves.grads)
        # Where a tensor begins is of use only if its elements lie as those of its param do.
        if "grad" in alike:
            columns["grad"] = Column(dtype, grads, addresses=starts.get("grad"))
        else:
            columns["grad"] = Column(dtype, grads, like=params)
        for name, values in leaves.slots.items():
            tensors = group.pick(values)
            dtype = group.dtypes[name] if name in group.dtypes else tensors[0].dtype
            # A donated slot lies as its param does; one of another shape is not for kernels.
            if donate or name in alike or name not in group.dtypes:
                begin = starts.get(name)
                columns[name] = Column(dtype, tensors, writable=donate, addresses=begin)
            else:
                columns[name] = Column(dtype, tensors, writable=donate, like=params)
        for name, given in leaves.given.items():
            tensors = group.pick(given)
            columns[name] = Column(tensors[0].dtype, tensors, like=params)
        return columns

    def _count_holders(self) -> Counter[int]:
        """In how many places each tensor is, by its id."""
        holders: Counter[int] = Counter()
        for table in self.tables:
            for column in table.columns.values():
                holders.update(map(id, column.tensors))
        return holders

    # Kernels.

    def _pass(self, work: Pass) -> None:
        """Run a pass over all groups, and finish what it takes."""
        groups, totals = [], []
        for table in self.tables:
            taken = self._kernel(work, table)
            if taken is not None:
                groups.append(table.group)
                totals.append(taken)
        if not totals:
            return
        if self.shards is not None:
            kinds = [take.reduction.combine for take in work.takes]
            self.shards.combine(totals, [group.indices for group in groups], kinds)
        for place, take in enumerate(work.takes):
            if take.reduction.over == "tree":
                number = self._finished(take, groups, [own[:, place] for own in totals])
                self.scalars.of_tree[take.name] = number
                continue
            for group, own in zip(groups, totals, strict=True):
                vector = self._finished_by_leaf(take, group, own[:, place])
                self.scalars.of_leaves[take.name, id(group)] = vector

    def _finished(self, take: Take, groups: Sequence[Group], totals: Sequence[Tensor]) -> Tensor:
        """The number of the tree, from the totals of the leaves of each group."""
        reduction, count = take.reduction, 0
        if reduction.finish == "mean":
            count = sum(sum(self._sizes(group)) for group in groups)
        wholes = [reduction.whole(own) for own in totals]
        total = wholes[0] if len(wholes) == 1 else reduction.together(wholes)
        return reduction.finished(total, count)

    def _finished_by_leaf(self, take: Take, group: Group, totals: Tensor) -> Tensor:
        """The number of each leaf of a group, as a vector."""
        if take.reduction.finish == "root":
            return totals.sqrt()
        if take.reduction.finish != "mean":
            return totals
        if self.shards is None:
            sizes = group.on_device("sizes", totals.device)
        else:
            # The sizes of whole leaves: those of the group are of pieces, and differ by process.
            sizes = torch.tensor(self._sizes(group), device=totals.device)
        # The mean of an empty leaf is 0 and not 0 / 0, as in `Reduction.finished`.
        return totals / sizes.clamp(min=1)

    def _sizes(self, group: Group) -> list[int]:
        """How many elements each leaf has, wherever they are."""
        return group.sizes if self.shards is None else list(map(self.shards.size, group.indices))

    def _kernel(self, work: Pass, table: Table) -> Tensor | None:
        """Run a pass over one group."""
        group, columns = table.group, table.columns
        backend = treating(self.resources.backends, group.device)
        # Whoever reads an address must hold its column until the kernel has run: these lists do.
        reads = [columns[name] for name in work.reads]
        written = self._dtypes_written(work, group)
        dtypes = Dtypes(
            tuple([column.dtype for column in reads]),
            tuple(written.values()),
            group.working,
            group.dtypes["param"],
        )
        runner = self._runner(backend, work, dtypes, group)
        writes = []
        for name, dtype in written.items():
            column = columns.get(name)
            if column is None or not column.writable or column.dtype != dtype:
                column = Column(dtype, self._room(work, table, name, dtype, backend), writable=True)
            writes.append(column)
        # Before the kernel and not after it: one that fails half way has overwritten something.
        self.started = self.started or self.resources.donate
        totals = runner(group, reads, writes, self.scalars)
        if self.resources.donate and "param" in written:
            # A kernel writes unseen by autograd: a backward pass that needs the old values fails.
            torch.autograd.graph.increment_version(columns["param"].tensors)
        columns.update(zip(written, writes, strict=True))
        return totals

    def _dtypes_written(self, work: Pass, group: Group) -> dict[str, torch.dtype]:
        """The dtype of each column that a pass writes."""
        found = {}
        results = self.program.results.values()
        for name in work.outputs:
            # A temporary keeps the working precision, since it stands for the computed value.
            is_kept = name in group.dtypes and name in results
            found[name] = group.dtypes[name] if is_kept else group.working
        return found

    def _room(
        self, work: Pass, table: Table, name: str, dtype: torch.dtype, backend: Backend
    ) -> list[Tensor]:
        """Tensors to write a column to, where those that it has must stay or are of another
        dtype.
        """
        like = table.columns[name if name in work.of_blocks else "param"].tensors
        # The group is part of the name: the pool keeps only two buffers for each name.
        pool, key = self.resources.pool, f"{table.number}.{name}"
        spent: Mapping[int, Tensor] = {}
        if name == "param" and self.resources.spend_grads and not self.follows:
            spent = self._spent(work, table, dtype)
        if not spent:
            return backend.allocate(pool, key, like, dtype)
        # The kernel overwrites gradients: from here the step cannot be repeated.
        self.started = True
        others = [one for place, one in enumerate(like) if place not in spent]
        fresh = backend.allocate(pool, key, others, dtype) if others else []
        unused = iter(fresh)
        room = []
        for place in range(len(like)):
            if place in spent:
                room.append(spent[place])
            else:
                room.append(next(unused))
        return room

    def _spent(self, work: Pass, table: Table, dtype: torch.dtype) -> dict[int, Tensor]:
        """The gradients, by their place, whose memory the new params take."""
        grads, params = table.columns["grad"], table.columns["param"]
        if grads.dtype != dtype or self.program.needed_after(work, "grad"):
            return {}
        return spendable(grads.tensors, params.tensors, self.holders)

    def _runner(self, backend: Backend, work: Pass, dtypes: Dtypes, group: Group) -> Runner:
        kinds = backend.kinds(work, self.scalars, group)
        key = (id(backend), dtypes, kinds)
        if key not in work.compiled:
            work.compiled[key] = backend.compile(work, dtypes, self.scalars, group)
        runner: Runner = work.compiled[key]
        return runner

    # Results.

    def _results(self) -> Results:
        after: dict[str, list[Any]] = {"param": list(self.leaves.params)}
        for name, slots in self.leaves.slots.items():
            after[name] = list(slots)
        if "update" in self.plan.results:
            after["update"] = [None] * len(self.leaves.params)
        for _, group, columns in self.tables:
            used: set[str] = set()
            for name, values in after.items():
                key = self.program.results.get(name, name)
                # Two results may be the same column: the second is a copy, so they share nothing.
                tensors = self._kept(name, columns[key], group, key in used)
                used.add(key)
                if group.everything:
                    # `rebuild` recognises a donated tree by the identity of its list.
                    # A pure step makes trees of its own: nobody sees the list of another.
                    after[name] = tensors if self.resources.donate else list(tensors)
                    continue
                for place, index in enumerate(group.indices):
                    values[index] = tensors[place]
        results = {name: after.pop(name) for name in self.plan.results}
        return Results(results, after)

    def _kept(self, name: str, column: Column, group: Group, again: bool) -> list[Tensor]:
        """A result in the shapes and dtype in which it is kept; in the old memory if donated."""
        if name == "update":
            params = group.pick(self.leaves.params)
            pairs = zip(column.tensors, params, strict=True)
            return [as_gradient(gradient_for(p, value), p) for value, p in pairs]
        if column.kept and not again:
            return column.tensors
        before = self.leaves.params if name == "param" else self.leaves.slots[name]
        like = group.pick(before)
        kept = [stored(value, old) for value, old in zip(column.tensors, like, strict=True)]
        if again:
            kept = [value.clone() for value in kept]
        if not self.resources.donate:
            return kept
        for new, old in zip(kept, like, strict=True):
            if new is not old:
                old.copy_(new)
        return list(like)
