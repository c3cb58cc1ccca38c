"""Try a rule on small tensors, when a chain is built: what it writes, and if it keeps its word."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from functional_sgd.randomness import TrialKey
from functional_sgd.rule import KEY, REQUIRED, STEP, Initializer, Rule, renamed

_SHAPE = (2, 2)


def rename(rule: Rule, **names: str) -> Rule:
    """The same rule under other names: `rename(average_grad, grad_avg="slow_avg", mom="slow_mom")`.

    Each keyword is a column, slot or hyper of the rule; its value is the name it has in the chain.
    So a chain can keep two averages, or apply a rule of gradients to the update. Raises ValueError
    for a name that the rule does not have.

    >>> from functional_sgd import average_grad
    >>> rename(average_grad, grad_avg="slow_avg", mom="slow_mom").slots
    ('slow_avg',)
    """
    if not isinstance(rule, Rule):
        raise TypeError(
            f"rename: expected a rule, got {rule!r}. Rename the rules before chaining them."
        )
    read = (*rule.columns, *rule.scalars, *rule.signature.numbers)
    written = writes_of(rule, frozenset(rule.columns))
    known = {rule.outer(name): name for name in (*read, *written)}
    for old in names:
        if old not in known or old == STEP:
            raise ValueError(
                f"rename: rule {rule.name} has no name {old!r}; it has {', '.join(sorted(known))}."
            )
    renames = {**rule.renames, **{known[old]: new for old, new in names.items()}}
    kept = {inner: outer for inner, outer in renames.items() if inner != outer}
    for group in (read, written):
        outer = [kept.get(name, name) for name in group]
        if len(set(outer)) < len(outer):
            twice = next(name for name in outer if outer.count(name) > 1)
            raise ValueError(
                f"rename: two things in rule {rule.name} would be called {twice!r}. "
                f"Choose another name."
            )
    return renamed(rule, kept)


@functools.lru_cache(maxsize=4096)
def writes_of(rule: Rule, available: frozenset[str]) -> tuple[str, ...]:
    """What the rule writes (its own names) when these of its columns are available.

    Found by a run on tensors of ones. Raises TypeError, with the cure, if the run fails, works in
    place, or returns anything but a dict of tensors of the right shape; and if an elementwise rule
    looks at more than one element.
    """
    if rule.declared.writes is not None:
        return rule.declared.writes
    result = _run(rule, available, torch.ones(_SHAPE, device="cpu"))
    _check_result(rule, result)
    if rule.scope == "elementwise":
        _check_elementwise(rule, available)
    return tuple(result)


def trial_scalars(rule: Rule) -> dict[str, Any]:
    """A value for every keyword of a rule, but its reductions."""
    scalars = {
        name: 0.5 if default is REQUIRED else default for name, default in rule.scalars.items()
    }
    if STEP in scalars:
        scalars[STEP] = torch.ones((), dtype=torch.float64, device="cpu")
    for name in rule.signature.numbers:
        start: Any = rule.starts[name]
        scalars[name] = torch.tensor(float(start), dtype=torch.float64, device="cpu")
    if rule.signature.random:
        scalars[KEY] = TrialKey()
    return scalars


def _columns(rule: Rule, available: frozenset[str], values: Tensor) -> dict[str, Any]:
    """A column for everything that it reads: these values, but slots begin as they always do."""
    columns: dict[str, Any] = {}
    for name in rule.columns:
        if name not in available:
            continue
        start = rule.starts.get(name)
        own = _first_value(rule, name, start, values) if callable(start) else values.clone()
        columns[name] = {"leaf": own} if rule.scope == "treewise" else own
    return columns


def _first_value(rule: Rule, slot: str, start: Initializer, values: Tensor) -> Tensor:
    try:
        value = start(values.clone())
    except Exception as error:
        raise TypeError(
            f"rule {rule.name}: the first value of slot {slot!r}, for a trial leaf of the shape "
            f"{tuple(values.shape)}, raised {type(error).__name__}: {error}. "
            f"Mend the function, or say what the rule writes: @{rule.scope}(writes=({slot!r},))."
        ) from error
    if not isinstance(value, Tensor):
        raise TypeError(
            f"rule {rule.name}: a slot's first value must be a tensor, got {type(value).__name__}."
        )
    return value


def _run(rule: Rule, available: frozenset[str], values: Tensor) -> Mapping[str, Any]:
    columns = _columns(rule, available, values)
    tensors = [one["leaf"] if rule.scope == "treewise" else one for one in columns.values()]
    scalars = trial_scalars(rule)
    versions = [tensor._version for tensor in tensors]
    try:
        with torch.no_grad():
            if rule.scope != "treewise":
                for name, reduction in rule.signature.reductions.items():
                    scalars[name] = reduction.of(columns)
            result = rule.function(**columns, **scalars)
    except Exception as error:
        raise TypeError(
            f"rule {rule.name}: its trial run on a 2 x 2 tensor of ones raised "
            f"{type(error).__name__}: {error}. "
            f"Mend the rule, or say what it writes: @{rule.scope}(writes=('update',))."
        ) from error
    if versions != [tensor._version for tensor in tensors]:
        changed = next(
            name
            for name, tensor, version in zip(columns, tensors, versions, strict=True)
            if tensor._version != version
        )
        raise TypeError(
            f"rule {rule.name}: works in place: it changes {changed!r}, which belongs to the "
            f"caller. Write {changed} = {changed} * 2 for {changed}.mul_(2), and return the result."
        )
    return result


def _check_result(rule: Rule, result: Any) -> None:
    if not isinstance(result, Mapping):
        raise TypeError(
            f"rule {rule.name}: expected a dict of what it writes, got {type(result).__name__}. "
            f"End it with, for example, return dict(update=...)."
        )
    numbers = rule.signature.numbers
    for name, value in result.items():
        if name in (STEP, KEY):
            raise TypeError(
                f"rule {rule.name}: may not write {name!r}, which the state counts itself."
            )
        if rule.scope != "treewise" and name not in numbers and not isinstance(value, Tensor):
            raise TypeError(
                f"rule {rule.name}: {name!r} must be a tensor, got {type(value).__name__}."
            )
        if name in numbers and isinstance(value, Tensor) and value.dim() != 0:
            raise TypeError(
                f"rule {rule.name}: {name!r} is one number of the whole tree, but came out with "
                f"the shape {tuple(value.shape)}. Make it of numbers: "
                f"total(lambda grad: ..., over='tree')."
            )
        keeps_shape = rule.scope == "elementwise" and name not in numbers
        if keeps_shape and value.shape != _SHAPE:
            raise TypeError(
                f"rule {rule.name}: an elementwise rule keeps the shape of its leaf, but {name!r} "
                f"came out as {tuple(value.shape)} for a leaf of {_SHAPE}. Use @leafwise if it "
                f"looks at the whole leaf."
            )
    for slot in rule.starts:
        if slot not in result:
            raise TypeError(
                f"rule {rule.name}: owns slot {slot!r} but does not write it. "
                f"Return it in the dict."
            )


def _check_elementwise(rule: Rule, available: frozenset[str]) -> None:
    """Raise TypeError if an element's result changes when its neighbours do.

    The rule is run on four numbers, and on two of them in another order, with the same numbers for
    its reductions: a mean, a sort or a roll gives something else.
    """
    values = torch.tensor([0.3, 1.7, 0.9, 1.1], dtype=torch.float64, device="cpu")
    some = [2, 1]
    whole, part = (_columns(rule, available, one) for one in (values, values[some]))
    scalars = trial_scalars(rule)
    for name in rule.columns:
        start = rule.starts.get(name)
        if callable(start) and name in whole:
            if whole[name].shape != values.shape:
                raise TypeError(
                    f"rule {rule.name}: slot {name!r} of an elementwise rule has the shape of its "
                    f"leaf, but begins as {tuple(whole[name].shape)} for a leaf of "
                    f"{tuple(values.shape)}. Use @leafwise for slots of another shape."
                )
            # Slots mostly begin as zeros, which would hide what is done with them.
            whole[name], part[name] = whole[name] + values, part[name] + values[some]
    with torch.no_grad():
        for name, reduction in rule.signature.reductions.items():
            scalars[name] = reduction.of(whole)
        results = [rule.function(**columns, **scalars) for columns in (whole, part)]
    for name, value in results[0].items():
        if name in rule.signature.numbers:
            if not _same(torch.as_tensor(value), torch.as_tensor(results[1][name])):
                raise TypeError(
                    f"rule {rule.name}: {name!r} is one number of the whole tree, so it must be "
                    f"made of numbers, not of columns. Declare them: total(..., over='tree')."
                )
        elif not _same(value[some], results[1][name]):
            raise TypeError(
                f"rule {rule.name}: is called elementwise, but {name!r} of one element depends on "
                f"others. Use @leafwise, or declare the number that it takes of them: "
                f"norm({next(iter(rule.columns), 'grad')!r})."
            )


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-9, atol=1e-12, equal_nan=True)
