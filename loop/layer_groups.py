"""Groups of layers: which parameters go together, and a learning rate for each group."""

import glob
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TypeAlias

from torch import Tensor

from functional_sgd.hyper import check_patterns, first_matches, matches

Groups: TypeAlias = Sequence[Sequence[str]]
"""The names of the parameters of each group, from the model's input to its output."""


def layer_groups(params: Mapping[str, Tensor], *patterns: str) -> tuple[tuple[str, ...], ...]:
    """The names of params in groups: one for each pattern; without patterns, one for each of the
    model's children.

    Patterns are those of `by_path`: a name is in the group of the first that it matches. Parameters
    that the model holds itself are one more group. Raises ValueError if a name matches no pattern,
    or a pattern no name.

    >>> from torch import nn
    >>> params = dict(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).named_parameters())
    >>> layer_groups(params)
    (('0.weight', '0.bias'), ('2.weight', '2.bias'))
    >>> layer_groups(params, "*.weight", "*")
    (('0.weight', '2.weight'), ('0.bias', '2.bias'))
    """
    group_of: dict[str, int | str] = {}
    if patterns:
        numbers = {pattern: index for index, pattern in enumerate(patterns)}
        chosen = first_matches("layer_groups", [*params], numbers, hidden=True)
        group_of.update(zip(params, chosen, strict=True))
    else:
        for name in params:
            group_of[name] = name.rpartition(".")[0].partition(".")[0]
    # With patterns, groups are in their order, not in that of the names that match them.
    groups: dict[int | str, list[str]] = {index: [] for index in range(len(patterns))}
    for name in params:
        groups.setdefault(group_of[name], []).append(name)
    # A pattern whose names all went to those before it has no group.
    return tuple(tuple(group) for group in groups.values() if group)


def spread(
    params: Mapping[str, Tensor], low: float, high: float, groups: Groups | None = None
) -> dict[str, float]:
    """A learning rate for every parameter: `low` in the first group, `high` in the last, and equal
    factors between.

    Without `groups`, those of `layer_groups(params)`; a single group has `high`. The result is a
    hyper: `fit(..., lr= spread(state.params, 1e-5, 1e-3))`. Raises ValueError if a rate is not
    above 0 or groups are not all of params.

    >>> groups = [["stem"], ["body"], ["head"]]
    >>> spread(dict.fromkeys(["stem", "body", "head"], 0), 0.01, 1.0, groups)
    {'stem': 0.01, 'body': 0.1, 'head': 1.0}
    """
    if not (low > 0 and high > 0):
        raise ValueError(f"spread: low and high must be above 0, got {low} and {high}.")
    groups = layer_groups(params) if groups is None else groups
    names = list(chain.from_iterable(groups))
    if sorted(names) != sorted(params):
        in_one_only = {*names} ^ {*params}
        repeated = {name for name in names if names.count(name) > 1}
        wrong = sorted(in_one_only or repeated)
        raise ValueError(
            f"spread: every parameter must be in one group, which is not so for {', '.join(wrong)}."
        )
    last = len(groups) - 1
    rate_of: dict[str, float] = {}
    for index, group in enumerate(groups):
        # `high` itself at the end: the power rounds, and a single group would divide by 0.
        rate = high if index == last else low * (high / low) ** (index / last)
        rate_of |= dict.fromkeys(group, rate)
    return {name: rate_of[name] for name in params}


def matching(who: str, params: Mapping[str, Tensor], patterns: Sequence[str]) -> frozenset[str]:
    """The names that match any of the patterns. Raises ValueError, in the name of `who`, if one
    matches nothing.

    >>> sorted(matching("Freeze", dict.fromkeys(["body.0", "body.1", "head.0"], 0), ["body.*"]))
    ['body.0', 'body.1']
    """
    # Not by_path, whose patterns each decide something: these may match the same names.
    check_patterns(who, [*params], patterns, matches)
    found = set()
    for name in params:
        if any(matches(name, pattern) for pattern in patterns):
            found.add(name)
    return frozenset(found)


def exactly(names: Sequence[str]) -> tuple[str, ...]:
    """Patterns that match these names and no others.

    >>> exactly(["layers[0].weight"])
    ('layers[[]0].weight',)
    """
    return tuple(glob.escape(name) for name in names)
