"""Which parameters have their hypers in common."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from functional_sgd.hyper import Hyper, broadcast
from functional_sgd.tree import flatten, paths


def hyper_groups(
    who: str, params: Mapping[str, Tensor], hyper: Mapping[str, Hyper], names: Sequence[str]
) -> tuple[list[tuple[float, ...]], dict[str, int]]:
    """(the values of these hypers in every group, the group of every parameter).

    Parameters with equal values are one group; groups are in the order of params, so that the first
    layer's is group 0. Each hyper is a number or a tree prefix of params; ValueError, on behalf of
    `who`, if one is neither.

    >>> import torch
    >>> weights = {name: torch.zeros(2) for name in ("body.weight", "body.bias", "head.weight")}
    >>> lr = {"body.weight": 0.1, "body.bias": 0.1, "head.weight": 0.5}
    >>> hyper_groups("me", weights, {"lr": lr, "mom": 0.9}, ["lr", "mom"])
    ([(0.1, 0.9), (0.5, 0.9)], {'body.weight': 0, 'body.bias': 0, 'head.weight': 1})
    """
    spec = flatten(params)[1]
    columns = [broadcast(who, name, hyper[name], params, spec) for name in names]
    values_of: dict[str, tuple[float, ...]] = {}
    for path, *values in zip(paths(params), *columns, strict=True):
        values_of[path] = tuple(map(float, values))
    # Leaves are sorted by name, but groups follow the order of the model.
    groups: dict[tuple[float, ...], int] = {}
    group_of = {}
    for name in params:
        group_of[name] = groups.setdefault(values_of[name], len(groups))
    return list(groups), group_of
