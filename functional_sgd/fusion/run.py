"""One call of a fused optimizer: kernels and torch take turns over a table of columns."""

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sgd.call import Leaves, Plan
from functional_sgd.fusion import device
from functional_sgd.fusion.buffers import Pool, apart, results
from functional_sgd.fusion.foreach import run_foreach
from functional_sgd.fusion.group import Group, dense
from functional_sgd.fusion.launch import Pointers
from functional_sgd.fusion.norms import norms_by_torch, norms_on_cpu
from functional_sgd.fusion.prelude import Prelude
from functional_sgd.fusion.scalars import Numbers, on_device, rows, separate
from functional_sgd.fusion.segments import Segment, key_of
from functional_sgd.state import owned, stored, working, working_dtype
from functional_sgd.step import columns_of, put_on_leaves, run_on_leaf, run_on_tree
from functional_sgd.tree import unflatten
from functional_sgd.wiring import Call


class Column:
    """A column of a group: its tensors, and where they lie."""

    __slots__ = ("_addresses", "_dense", "dtype", "ours", "rough", "tensors")

    def __init__(
        self,
        dtype: torch.dtype,
        tensors: list[Tensor],
        ours: bool = False,
        rough: bool = False,
        dense: bool = False,
    ) -> None:
        self.dtype, self.tensors = dtype, tensors
        self.ours = ours  # it may be overwritten
        self.rough = (
            rough  # a rule's own result: not yet in the shape and dtype in which it is kept
        )
        self._dense = dense  # known to be contiguous
        self._addresses: Pointers | None = None

    @property
    def pointers(self) -> Pointers:
        """The addresses of the tensors; of contiguous copies where they are not contiguous."""
        if self._addresses is None:
            if not self._dense:
                self.tensors = dense(self.tensors)
            self._addresses = list(map(Tensor.data_ptr, self.tensors))
        return self._addresses


class Means(NamedTuple):
    """What a call has to work with."""

    pool: Pool
    compiler: bool  # for leaves on the CPU
    triton: bool  # for leaves on GPUs


class Run:
    """A call: the table of each group, and the columns of the leaves that no kernel can treat."""

    def __init__(
        self,
        plan: Plan,
        segments: Sequence[Segment],
        groups: list[Group],
        leaves: Leaves,
        donate: bool,
        means: Means,
    ) -> None:
        self.plan, self.segments, self.groups, self.leaves = plan, segments, groups, leaves
        self.donate, self.means = donate, means
        self.started = False  # whether anything has been written
        self.tables = [self._table(group) for group in groups]
        self.others: dict[int, dict[str, Tensor]] = {}
        if sum(len(group.indices) for group in groups) < len(leaves.params):
            treated = {index for group in groups for index in group.indices}
            self.others = {
                index: columns_of(leaves, index) for index in leaves.active if index not in treated
            }
        self.kept: dict[int, dict[str, Tensor]] = {index: {} for index in self.others}
        self.numbers: dict[
            str, dict[int, Tensor]
        ] = {}  # what the last prelude reduced each leaf to

    @torch.no_grad()
    def __call__(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """New params and slots, leaf by leaf."""
        for segment in self.segments:
            self._segment(segment)
        return self._results()

    def _segment(self, segment: Segment) -> None:
        if segment.prelude is not None and not self._reduce(segment.prelude, segment):
            for part in segment.instead:
                self._segment(part)
            return
        if segment.graph is not None:
            for number, group in enumerate(self.groups):
                self._kernel(segment, number, group)
        elif segment.calls[0].treewise:
            self._on_tree(segment.calls[0], segment)
        else:
            self._on_leaves(segment.calls[0], segment)
        if not (segment.graph is None and segment.calls[0].treewise):
            for index, columns in self.others.items():
                for call in segment.calls:
                    run_on_leaf(
                        call,
                        self.leaves.params[index],
                        columns,
                        self.leaves.scalars(index),
                        self.kept[index],
                    )

    def _reduce(self, prelude: Prelude, segment: Segment) -> bool:
        """Reduce leaves to the numbers that the kernel wants; False if that cannot be done this
        time.
        """
        call, leaves = prelude.call, self.leaves
        if self.others or (
            call.treewise and any(name in leaves.separate for _, name in call.scalars)
        ):
            return False
        indices = [index for group in self.groups for index in group.indices]
        if not indices:
            return True
        columns: list[dict[str, Tensor]] = [{} for _ in indices]
        for _, outer in call.reads:
            seen = (
                t
                for tab, g in zip(self.tables, self.groups, strict=True)
                for t in self._seen(tab, segment.keys[outer], g)
            )
            for column, tensor in zip(columns, seen, strict=True):
                column[outer] = tensor
        numbers = prelude.numbers(
            columns,
            segment.keys,
            [leaves.scalars(index) for index in (indices[:1] if call.treewise else indices)],
            lambda values: unflatten(leaves.spec, _scattered(values, indices, len(leaves.params))),
            lambda tree: [
                values[index] for values in [leaves.spec.flatten_up_to(tree)] for index in indices
            ],
            functools.cache(lambda outer: self._norms_of_leaves(segment.keys[outer])),
        )
        if numbers is not None:
            self.numbers = {
                name: dict(zip(indices, values, strict=True)) for name, values in numbers.items()
            }
        return numbers is not None

    def _table(self, group: Group) -> dict[str, Column]:
        dense_grads = self.leaves.familiar and group.dense_grads
        table = {
            "grad": Column(group.dtypes["grad"], group.pick(self.leaves.grads), dense=dense_grads)
        }
        for name, values in (("param", self.leaves.params), *self.leaves.slots.items()):
            table[name] = Column(
                group.dtypes[name], group.pick(values), ours=self.donate, dense=True
            )
        return table

    def _kernel(self, segment: Segment, number: int, group: Group) -> None:
        """Run a segment's kernel over a group."""
        if not segment.outputs:
            return
        table, precision, by_triton = (
            self.tables[number],
            _precision(group),
            device.treats(group.device),
        )
        if not (self.means.triton if by_triton else self.means.compiler):
            self._foreach(segment, table, group)
            return
        kept = {
            key: group.dtypes[key] if key in segment.final else precision for key in segment.outputs
        }
        kinds = ({key: column.dtype for key, column in table.items()}, kept, precision)
        scalars = (segment.hypers, self.leaves, self._numbers(segment, table, group), group)
        if by_triton:
            hypers = on_device(*scalars)
            launch = partial(segment.on_device(group.device, hypers, *kinds), group.chunks, hypers)
        else:
            launch = partial(segment.launcher(*kinds), group.shape, rows(*scalars))
        read = [table[key].pointers for key in segment.columns]
        for key, dtype in kept.items():
            column = table.get(key)
            if column is None or not column.ours or column.dtype != dtype:
                like = table["param"].tensors
                table[key] = Column(
                    dtype,
                    apart(like, dtype)
                    if by_triton
                    else results(self.means.pool, f"{number}.{key}", like, group.large, dtype),
                    ours=True,
                    dense=True,
                )
        written = [table[key].pointers for key in kept]
        self.started = True
        launch([*read, *written])

    def _numbers(self, segment: Segment, table: dict[str, Column], group: Group) -> Numbers:
        """What the leaves of a group have been reduced to, for a kernel that wants to know."""
        norms = {name: self._norms(table, key, group) for name, key in segment.norms.items()}
        return {**self.numbers, **norms} if norms else self.numbers

    def _norms(self, table: dict[str, Column], key: str, group: Group) -> Tensor:
        """The norms of a column, float64."""
        column = table[key]
        if self.means.compiler and not device.treats(group.device):
            return norms_on_cpu(group.shape, column.dtype, column.pointers)
        return norms_by_torch(column.tensors, _precision(group))

    def _norms_of_leaves(self, key: str) -> list[Tensor]:
        """The norms of a column for the leaves of all groups, as rules see them."""
        return [
            norm
            for table, group in zip(self.tables, self.groups, strict=True)
            for norm in self._norms(table, key, group).to(_precision(group)).unbind()
        ]

    def _foreach(self, segment: Segment, table: dict[str, Column], group: Group) -> None:
        """Do without a kernel."""
        assert segment.graph is not None
        values = separate(segment.hypers, self.leaves, self._numbers(segment, table, group), group)
        columns = {key: self._seen(table, key, group) for key in segment.columns or ("grad",)}
        self._put(table, group, run_foreach(segment.graph, segment.outputs, columns, values))

    def _on_leaves(self, call: Call, segment: Segment) -> None:
        """Run one rule with torch, leaf by leaf."""
        for table, group in zip(self.tables, self.groups, strict=True):
            made: dict[str, list[Tensor]] = {
                key_of(self.plan, call, name): [] for _, name in call.writes
            }
            reads = {name: self._seen(table, segment.keys[name], group) for _, name in call.reads}
            for place, index in enumerate(group.indices):
                columns = {name: values[place] for name, values in reads.items()}
                for name, value in call.run(columns, self.leaves.scalars(index)).items():
                    made[key_of(self.plan, call, name)].append(value)
            self._put(table, group, made)

    def _on_tree(self, call: Call, segment: Segment) -> None:
        """Run one rule with torch on whole trees."""
        columns: dict[str, dict[int, Tensor]] = {}
        for _, outer in call.reads:
            columns[outer] = {index: own[outer] for index, own in self.others.items()}
            for table, group in zip(self.tables, self.groups, strict=True):
                columns[outer].update(
                    zip(group.indices, self._seen(table, segment.keys[outer], group), strict=True)
                )
        active = next(
            iter([*self.others, *(index for group in self.groups for index in group.indices)]), None
        )
        if active is None:
            return
        results = run_on_tree(self.plan, call, self.leaves, columns, self.leaves.scalars(active))
        for table, group in zip(self.tables, self.groups, strict=True):
            made = {
                key_of(self.plan, call, name): group.pick(values)
                for name, values in results.items()
            }
            self._put(table, group, made)
        put_on_leaves(call, results, self.others, self.kept)

    def _seen(self, table: dict[str, Column], key: str, group: Group) -> list[Tensor]:
        """A column as rules see it."""
        precision = _precision(group)
        return [working(tensor).to(precision) for tensor in table[key].tensors]

    def _put(self, table: dict[str, Column], group: Group, made: dict[str, list[Tensor]]) -> None:
        """Results of torch become columns, in the precision that kernels expect of temporaries.

        A result that shares memory with another column is copied: a kernel may overwrite either.
        """
        precision = _precision(group)
        taken = [column.tensors for column in table.values()]
        for key, values in made.items():
            whole = [
                owned(value.to(precision), *(tensors[place] for tensors in taken)).expand(
                    working(param).shape
                )
                for place, (value, param) in enumerate(
                    zip(values, group.pick(self.leaves.params), strict=True)
                )
            ]
            taken.append(whole)
            table[key] = Column(precision, whole, rough=True)

    def _results(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        before = {"param": self.leaves.params, **self.leaves.slots}
        after = {name: list(values) for name, values in before.items()}
        for table, group in zip(self.tables, self.groups, strict=True):
            for name, values in after.items():
                column = table[name]
                tensors = (
                    self._kept(column.tensors, group.pick(before[name]))
                    if column.rough
                    else column.tensors
                )
                if group.everything:
                    after[name] = (
                        tensors if self.donate else list(tensors)
                    )  # a pure step makes trees of its own
                else:
                    for place, index in enumerate(group.indices):
                        values[index] = tensors[place]
        for index, columns in self.others.items():
            taken = [self.leaves.params[index], self.leaves.grads[index]]
            for name, value in {"param": columns["param"], **self.kept[index]}.items():
                kept = stored(value, before[name][index])
                after[name][index] = kept if name == "param" else owned(kept, *taken)
                taken.append(after[name][index])
            if self.donate:
                for name in ("param", *self.kept[index]):
                    after[name][index] = before[name][index].copy_(after[name][index])
        params = after.pop("param")
        return params, after

    def _kept(self, values: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """Results in the shape and dtype in which they are kept; in the old buffers if those were
        donated.
        """
        kept = [stored(value, old) for value, old in zip(values, like, strict=True)]
        if not self.donate:
            return kept
        return [old if new is old else old.copy_(new) for new, old in zip(kept, like, strict=True)]


def _scattered(values: Sequence[Any], indices: Sequence[int], count: int) -> list[Any]:
    """A list over all leaves with these values at these places, None elsewhere."""
    places = dict(zip(indices, values, strict=True))
    return [places.get(index) for index in range(count)]


def _precision(group: Group) -> torch.dtype:
    return working_dtype(torch.empty(0, dtype=group.dtypes["param"]))
