"""The rules of a fused chain that torch runs, between passes over the same columns."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_sgd.call import Leaves, Plan
from functional_sgd.fusion.batches import run_in_batches
from functional_sgd.fusion.column import Column, Table
from functional_sgd.fusion.differentiated import Tracked
from functional_sgd.fusion.passes import TorchRule
from functional_sgd.fusion.scalars import Scalars
from functional_sgd.sharded import Shards, distributed
from functional_sgd.state import gradient_for, owned, working
from functional_sgd.step import reduce_columns, run_on_leaf, run_on_tree
from functional_sgd.wiring import Call


class TorchRules:
    """Runs rules on the tables of a call."""

    def __init__(
        self,
        plan: Plan,
        leaves: Leaves,
        tables: Sequence[Table],
        scalars: Scalars,
        shards: Shards | None,
        unbatched: set[int],
    ) -> None:
        self.plan, self.leaves, self.tables, self.scalars = plan, leaves, tables, scalars
        self.shards = shards  # if some leaves are cut
        self.unbatched = unbatched  # rules, by position, that run leaf by leaf

    def run(self, step: TorchRule) -> None:
        """Run a rule on all groups, and put what it writes into the tables."""
        call = step.call
        seen = [self._seen(table, step) for table in self.tables]
        # Without leaves, reductions have no value, and these numbers may depend on them.
        numbers = self.scalars.evaluate(step.numbers) if self.tables else {}
        if call.treewise:
            made = self._on_tree(step, seen, numbers)
        else:
            made = self._on_leaves(step, seen, numbers)
        if torch.is_grad_enabled():
            self._check_untracked(call, made)
        for table, written in zip(self.tables, made, strict=True):
            for name, values in written.items():
                table.columns[step.outputs[name]] = self._made(table, name, values)

    def _check_untracked(self, call: Call, made: Sequence[Mapping[str, Sequence[Tensor]]]) -> None:
        """Raise Tracked if something that a rule has made has a derivative."""
        values = [self.leaves.numbers[name] for _, name in call.numbers]
        for written in made:
            values += itertools.chain.from_iterable(written.values())
        if any(value.requires_grad for value in values):
            raise Tracked

    def _seen(self, table: Table, step: TorchRule) -> dict[str, list[Tensor]]:
        """The columns that a rule reads, as rules see them."""
        seen = {}
        for name, key in step.inputs.items():
            column = table.columns[key]
            # A slot with a shape of its own is not laid out like the param.
            if name in self.leaves.slots and name not in table.group.dtypes:
                seen[name] = list(map(working, column.tensors))
            else:
                params = table.columns["param"].tensors
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
        for table, own in zip(self.tables, seen, strict=True):
            for name, values in own.items():
                columns[name].update(zip(table.group.indices, values, strict=True))
        if not self.tables:
            return []
        # The number of any leaf: what a rule on the tree reads is one for all.
        scalars = {**self.leaves.scalars(self.tables[0].group.indices[0]), **numbers}
        results = run_on_tree(self.plan, call, self.leaves, columns, scalars)
        for _, name in call.numbers:  # which are set in the leaves
            # The planner's name for the new number, under which later kernels read it.
            self.scalars.of_tree[step.sets[name]] = self.leaves.numbers[name]
        made = []
        for table in self.tables:
            made.append({name: table.group.pick(values) for name, values in results.items()})
        return made

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
            made = []
            for table, own in zip(self.tables, seen, strict=True):
                made.append(
                    run_in_batches(call, self.leaves, table.group, own, of_tree, self.unbatched)
                )
        for _, name in call.numbers:
            # Every leaf has set it to the same value.
            values: list[Tensor] = []
            for written in made:
                values += written.pop(name)
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
        for table, own in zip(self.tables, seen, strict=True):
            for place, index in enumerate(table.group.indices):
                columns[index] = {name: values[place] for name, values in own.items()}
        reduced = reduce_columns(self.plan, call, self.leaves, columns)
        kept: dict[int, dict[str, Tensor]] = {index: {} for index in columns}
        for index, own_columns in columns.items():
            scalars = {**self.leaves.scalars(index), **numbers, **reduced[index]}
            run_on_leaf(call, self.leaves, index, own_columns, scalars, kept[index])
            kept[index] = {**own_columns, **kept[index]}
        names = [name for _, name in (*call.writes, *call.numbers)]
        made = []
        for table in self.tables:
            written = {}
            for name in names:
                written[name] = [kept[index][name] for index in table.group.indices]
            made.append(written)
        return made

    def _reduced_over_tree(
        self, call: Call, seen: Sequence[Mapping[str, Sequence[Tensor]]]
    ) -> dict[str, Tensor]:
        """The numbers of the tree that a rule declares, of columns as it sees them."""
        values = {}
        for reduced in call.reductions:
            reduction = reduced.reduction
            if reduction.over != "tree":
                continue
            inner_names = [inner for inner, _ in reduced.columns]
            parts: list[Tensor] = []
            count = 0
            for own in seen:
                columns = [own[outer] for _, outer in reduced.columns]
                for leaf in zip(*columns, strict=True):
                    parts.append(reduction.of_leaf(dict(zip(inner_names, leaf, strict=True))))
                    count += leaf[0].numel()
            if parts:
                values[reduced.name] = reduction.finished(reduction.together(parts), count)
        return values

    def _made(self, table: Table, name: str, values: Sequence[Tensor]) -> Column:
        """What torch made of a rule's column, in memory that nothing else uses."""
        group = table.group
        params = table.columns["param"].tensors
        taken = [column.tensors for column in table.columns.values()]
        lies_as_param = name in group.dtypes or name not in self.leaves.slots
        tensors = []
        for place, value in enumerate(values):
            if lies_as_param:
                value = self._like_param(value, params[place], group.indices[place])
                value = value.to(group.working).reshape(params[place].shape)
            # A rule may return its own input, which a later kernel may overwrite in place.
            others = [column[place] for column in taken]
            tensors.append(owned(value, *others))
        return Column(group.working, tensors, kept=False, like=params)

    def _like_param(self, value: Tensor, param: Tensor, index: int) -> Tensor:
        """What a rule has made of a leaf, which may be one number for all of it, or cut otherwise
        than the leaf.
        """
        if self.shards is not None and distributed(value):
            value = self.shards.piece(index, value.expand(self.shards.leaves[index].shape))
        return value.expand(working(param).shape)  # a 0-d leaf has one axis for rules
