"""What a kernel is made of, in whatever language it is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from functional_sgd.fusion.arithmetic import Graph, Node

SUPPORTED_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
"""The dtypes of columns that kernels read and write."""


@dataclass(frozen=True)
class Kernel:
    """The source of a segment, and the order of what it is called with."""

    source: str
    inputs: tuple[str, ...]  # columns read
    outputs: tuple[str, ...]  # columns written; their pointers follow those of the inputs
    hypers: tuple[str, ...]
    n_scalars: int


@dataclass(frozen=True)
class Parts:
    """The nodes that some outputs are made of, each in an order in which they can be computed."""

    inputs: tuple[str, ...]  # columns
    hypers: tuple[str, ...]
    scalars: Sequence[Node]  # computed once a step, hypers among them
    crossing: Sequence[Node]  # the scalars that elements are made of
    elements: Sequence[Node]  # columns among them


def parts_of(graph: Graph, outputs: Mapping[str, Node]) -> Parts:
    """What is needed for these outputs; constants are left out, since they are written where they
    are used.
    """
    nodes = [node for node in graph.needed(outputs.values()) if node.op != "constant"]
    used = {
        arg.index for node in nodes if node.element for arg in node.args if isinstance(arg, Node)
    }
    used |= {node.index for node in outputs.values()}
    scalars = [node for node in nodes if not node.element]
    return Parts(
        inputs=tuple(node.args[0] for node in nodes if node.op == "column"),
        hypers=tuple(node.args[0] for node in nodes if node.op == "scalar"),
        scalars=scalars,
        crossing=[node for node in scalars if node.index in used],
        elements=[node for node in nodes if node.element],
    )


def name_of(node: Node, element: bool = False) -> str:
    """The variable of a node; among elements, a scalar's name ends with a _, and has been rounded."""
    return f"v{node.index}_" if element and not node.element else f"v{node.index}"
