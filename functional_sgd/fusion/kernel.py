"""What the kernel of a pass is made of, in whatever language it is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from functional_sgd.fusion.arithmetic import Node
from functional_sgd.fusion.passes import Pass

SUPPORTED_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
"""The dtypes of columns that kernels read and write."""


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of a kernel's columns: those it reads, those it writes, that of the arithmetic,
    and that in which the params are kept.
    """

    reads: tuple[torch.dtype, ...]
    writes: tuple[torch.dtype, ...]
    working: torch.dtype
    leaf: torch.dtype


@dataclass(frozen=True)
class Body:
    """The nodes of a pass, sorted by how often they are computed."""

    reads: tuple[str, ...]  # columns
    writes: Mapping[str, Node]
    hypers: tuple[str, ...]  # the numbers that the kernel is called with
    scalars: Sequence[Node]  # computed once a step
    crossing: Sequence[tuple[Node, bool]]  # scalars that elements read; whether in double precision
    elements: Sequence[Node]  # computed or read for each element
    takes: Sequence[Node]  # combined over the elements
    phases: Mapping[int, int]  # element (by its index) -> after so many rounds through its block


def body_of(work: Pass) -> Body:
    """The body of a pass. Constants are left out, since they are written where they are used."""
    elements: list[Node] = []
    scalars: list[Node] = []
    for node in work.nodes:
        if node.op == "constant":
            continue
        if node.element:
            elements.append(node)
        else:
            scalars.append(node)
    return Body(
        work.reads,
        work.outputs,
        work.scalars,
        scalars,
        _crossing(work, scalars, elements),
        elements,
        [take.node for take in work.takes],
        _phases(work, elements),
    )


def _crossing(
    work: Pass, scalars: Sequence[Node], elements: Sequence[Node]
) -> list[tuple[Node, bool]]:
    """The scalars that elements read: once in their precision, and once in double precision, as far
    as some of them need each.
    """
    used: dict[bool, set[int]] = {False: set(), True: set()}  # in double precision or not
    for node in work.outputs.values():
        # What is written to a column as it is, is stored in the precision of the elements.
        used[False].add(node.index)
    for node in elements:
        if node.index not in work.sources:  # else it is loaded from memory, and not computed
            used[node.wide].update(argument.index for argument in node.inputs)
    crossing = []
    for node in scalars:
        for wide in (False, True):
            if node.index in used[wide]:
                crossing.append((node, wide))
    return crossing


def _phases(work: Pass, elements: Sequence[Node]) -> dict[int, int]:
    """When each element can be had: what a block has in common is known after a round through it
    all.
    """
    found: dict[int, int] = {}
    for node in elements:
        inputs: list[Node] = []  # none of what is loaded from memory
        if node.index not in work.sources:
            inputs = [argument for argument in node.inputs if argument.element]
        found[node.index] = max((found[argument.index] for argument in inputs), default=0)
        if node.op == "block_scale" and inputs:
            found[node.index] += 1
    for node in elements:  # a product is cheaper than to keep it for a later round
        if node.op == "multiple":
            users = []
            for user in elements:
                if any(argument is node for argument in user.inputs):
                    users.append(found[user.index])
            found[node.index] = min(users, default=0)
    return found


def name_of(node: Node, element: bool = False, wide: bool = False) -> str:
    """The variable of a node.

    Among elements, a scalar's name ends with a _, and has been rounded to their precision; with __
    where they are of double precision.
    """
    if element and not node.element:
        return f"v{node.index}{'__' if wide else '_'}"
    return f"v{node.index}"
