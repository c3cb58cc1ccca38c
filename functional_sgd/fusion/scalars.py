"""The numbers that kernels are called with, by name."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor

from functional_sgd.call import Leaves
from functional_sgd.fusion.arithmetic import Node
from functional_sgd.fusion.check import evaluate
from functional_sgd.fusion.group import Group
from functional_sgd.randomness import key_of, words_at
from functional_sgd.rule import KEY, STEP
from functional_sgd.wiring import SEED

Numbers: TypeAlias = Sequence[float] | NDArray[Any]
"""One number, or as many as there are leaves."""

_FEW = 64  # up to which a list is quicker than an array


class Value(NamedTuple):
    """A number for all leaves of a group, or one for each of them."""

    each: bool
    value: Any  # a number or a 0-d tensor; if each, a vector (a tensor, or a list of such)


class Scalars:
    """Hypers, steps, numbers of the tree, keys, and what earlier passes have reduced columns to."""

    def __init__(self, leaves: Leaves) -> None:
        self.leaves = leaves
        self.numbers = dict(leaves.numbers)  # as they were; what rules make of them is in of_tree
        self.of_tree: dict[str, Any] = {}  # reductions over the tree, numbers that rules set
        self.of_leaves: dict[tuple[str, int], Tensor] = {}  # (reduction, group) -> a vector
        self._common: dict[int, tuple[Tensor, Tensor]] = {}  # of the keys of a group
        self._words: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def find(self, name: str, group: Group) -> Value:
        """What a kernel that treats a group is called with."""
        leaves = self.leaves
        if name in self.of_tree:
            return Value(False, self.of_tree[name])
        if self.of_leaves and (name, id(group)) in self.of_leaves:
            return Value(True, self.of_leaves[name, id(group)])
        if name in leaves.shared:
            return Value(False, leaves.shared[name])
        if name == STEP:
            return Value(True, self._picked(leaves.step, group))
        if name in self.numbers:
            return Value(False, self.numbers[name])
        if name in leaves.separate:
            values = group.pick(leaves.separate[name])
            # A tree prefix gives many leaves one object; comparing tensors would wait for a GPU.
            same = all(value is values[0] for value in values)
            return Value(False, values[0]) if same else Value(True, values)
        return Value(True, self._key_words(name, group))

    def tree(self, name: str) -> Any:
        """A number that is the same for all leaves, for computing numbers of the tree."""
        if name in self.of_tree:
            return self.of_tree[name]
        if name in self.leaves.shared:
            return self.leaves.shared[name]
        return self.numbers[name]

    def evaluate(self, nodes: Mapping[str, Node]) -> dict[str, Tensor]:
        """Numbers of the tree that are made of others."""
        values = {}
        for name, node in nodes.items():
            needed = node.graph.needed([node])
            named = {}
            for one in needed:
                if one.op == "scalar":
                    named[one.args[0]] = self.tree(one.args[0])
            values[name] = evaluate(needed, {}, named)[node.index]
        return values

    def columns(self, names: Sequence[str], group: Group) -> list[Numbers]:
        """The numbers for a kernel on a CPU: of each name, one for all leaves of a group, or one
        for each of them.
        """
        return [_numbers(self.find(name, group)) for name in names]

    def _picked(self, vector: Tensor, group: Group) -> Tensor:
        return vector if group.everything else vector[group.on_device("indices", vector.device)]

    def _key_words(self, name: str, group: Group) -> Tensor:
        """A word of the key of each leaf: `key_2_0` is the first of the rule at position 2."""
        position, word = map(int, name.removeprefix(f"{KEY}_").split("_"))
        known = (position, id(group))
        if known not in self._words:
            seed: Any = self.numbers[SEED]
            indices: Any = group.on_device("indices", seed.device)
            step: Any = self._picked(self.leaves.step, group).to(seed.device)
            if seed.device.type == "cpu":  # numpy takes a fifth of the time for so little
                seed, step, indices = seed.numpy(), step.numpy(), indices.numpy()
            if id(group) not in self._common:
                # The position does not matter: it is not part of the words that rules share.
                self._common[id(group)] = key_of(seed, step, indices, 0).common
            words = words_at(self._common[id(group)], position)
            self._words[known] = words[0], words[1]
        return torch.as_tensor(self._words[known][word])


def _numbers(one: Value) -> Numbers:
    """A value as one number, or as a vector if the leaves differ."""
    if not one.each:
        return (float(one.value),)
    if not isinstance(one.value, Tensor):
        return [float(value) for value in one.value]
    # Equal numbers become one: a kernel then prepares its scalars once, not for each leaf.
    if len(one.value) <= _FEW:
        few: list[float] = one.value.tolist()
        return few[:1] if few and few.count(few[0]) == len(few) else few
    vector = one.value.detach().cpu().numpy()
    if (vector == vector[0]).all():
        return (float(vector[0]),)
    return vector
