"""recipes: what every optimizer of the catalogue is, and what it costs, as data."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from functional_sgd import catalogue
from functional_sgd.fusion.explain import cost
from functional_sgd.fusion.fused import Fused, fuse
from functional_sgd.hyper import Hyper
from functional_sgd.optimizer import Optimizer
from functional_sgd.tree import flatten

_SIDE = 512  # of the matrix of float32 that costs are counted for


@dataclass(frozen=True)
class Recipe:
    """An optimizer of the catalogue: what it is, and what it costs.

    `memory` is bytes of state for each parameter, `passes` how many kernels go over a float32
    matrix in a fused step, `moved` the bytes that these read and write for each parameter, and
    `by_torch` the rules that run between them as torch operators; passes and moved are None for an
    optimizer that is no chain.

    >>> recipes()["lamb"].passes  # one to find the norms, one to go by them
    2
    """

    name: str
    make: Callable[..., Optimizer]
    family: str
    title: str
    source: str
    hyper: Mapping[str, Hyper]
    memory: float
    passes: int | None
    moved: float | None
    by_torch: tuple[str, ...]


def recipes() -> dict[str, Recipe]:
    """Every optimizer of the catalogue by name, with its paper, its hypers and what it costs.

    Costs are computed: from a state for a matrix, and from the kernels of the fused chain.

    >>> adamw = recipes()["adamw"]
    >>> adamw.memory, adamw.passes, adamw.moved  # two slots; param, grad, slots read, three written
    (8.0, 1, 28.0)
    """
    return {name: _recipe(name) for name in sorted(catalogue.NAMES)}


def _recipe(name: str) -> Recipe:
    make = getattr(catalogue, name)
    text = inspect.getdoc(make) or ""
    title = re.split(r"(?<=[.])\s", text)[0].replace("\n", " ")
    source = " ".join(text.partition("Source: ")[2].split("\n\n")[0].split())
    opt: Optimizer = make()
    param = torch.zeros(_SIDE, _SIDE)
    leaves, _ = flatten(opt.init(param))
    # Counters and other single numbers do not grow with the params.
    kept = sum(leaf.numel() * leaf.itemsize for leaf in leaves if leaf.numel() > 1)
    passes: int | None = None
    moved: float | None = None
    by_torch: tuple[str, ...] = ()
    fused = fuse(opt)
    if isinstance(fused, Fused):
        counted = cost(fused, param)
        passes, by_torch = counted.passes, counted.by_torch
        moved = counted.moved / param.numel()
    return Recipe(
        name=name,
        make=make,
        family=make.__module__.rpartition(".")[2],
        title=title,
        source=source,
        hyper=opt.hyper,
        memory=kept / param.numel(),
        passes=passes,
        moved=moved,
        by_torch=by_torch,
    )
