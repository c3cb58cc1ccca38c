"""Try a rule on small tensors, when a chain is built: what it writes, and if it keeps its word."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from functional_sgd.randomness import TrialKey
from functional_sgd.reduction import Reduction
from functional_sgd.rule import Rule, renamed
from functional_sgd.signature import DTYPE, FROM_CALLER, KEY, REQUIRED, STEP, Initializer

Columns: TypeAlias = dict[str, Any]
"""What a rule reads: a tensor under each name, or for a treewise rule a tree of one leaf."""

_SHAPE = (2, 3)

_NUMBERS = ((0.3, 1.7), (1.2, 0.7), (0.9, 2.3), (0.5, 1.4))
_SOME = (1, 2, 3)
"""Some of their places: neither sorting nor turning nor shifting them all agrees with these."""


def rename(rule: Rule, **names: str) -> Rule:
    """The same rule under other names: `rename(average_grad, grad_avg="slow_avg", mom="slow_mom")`.

    Each keyword is a column, slot, hyper or reduction of the rule; its value is the name it has in
    the chain.
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
    signature = rule.signature
    read = (*rule.columns, *rule.scalars, *signature.numbers, *signature.reductions)
    written = writes_of(rule, frozenset(rule.columns))
    known = {rule.outer(name): name for name in (*read, *written)}
    for old in names:
        if old not in known or old == STEP:
            raise ValueError(
                f"rename: rule {rule.name} has no name {old!r}; it has {', '.join(sorted(known))}."
            )
    renames = dict(rule.renames)
    for old, new in names.items():
        renames[known[old]] = new
    kept = {inner: outer for inner, outer in renames.items() if inner != outer}
    # Checked separately, since a rule may read and write the same name, as it does with its slots.
    for group in (read, written):
        outer = [kept.get(name, name) for name in group]
        if len(set(outer)) < len(outer):
            twice = next(name for name in outer if outer.count(name) > 1)
            raise ValueError(
                f"rename: two things in rule {rule.name} would be called {twice!r}. "
                f"Choose another name."
            )
    return renamed(rule, kept)


# A rule is tried once, not once for every chain that contains it.
@functools.lru_cache(maxsize=4096)
def writes_of(rule: Rule, available: frozenset[str]) -> tuple[str, ...]:
    """What the rule writes (its own names) when these of its columns are available.

    Found by a run on tensors of ones. Raises TypeError, with the cure, if the run fails, works in
    place, or returns anything but a dict of tensors of the right shape; if an elementwise rule
    looks at more than one element; and if a number of the whole tree is made of one leaf.
    """
    if rule.declared.writes is not None:
        return rule.declared.writes
    # On the CPU whatever the default device is: on the meta device no result could be checked.
    columns = _columns(rule, available, torch.ones(_SHAPE, device="cpu"))
    result = _run(rule, columns)
    _check_result(rule, columns, result)
    _check_hypers_stay(rule, columns)
    if rule.scope != "treewise":
        _check_expressions(rule, columns)
        _check_precision(rule, available)
    if rule.scope == "elementwise":
        _check_elementwise(rule, available)
    if rule.signature.numbers and rule.scope != "treewise":
        _check_numbers(rule, available)
    return tuple(result)


def trial_scalars(rule: Rule) -> dict[str, Any]:
    """A value for every keyword of a rule, but its reductions."""
    scalars: dict[str, Any] = {}
    for name, default in rule.scalars.items():
        scalars[name] = 0.5 if default is REQUIRED else default
    if STEP in scalars:
        scalars[STEP] = torch.ones((), dtype=torch.float64, device="cpu")
    for name in rule.signature.numbers:
        start: Any = rule.starts[name]
        scalars[name] = torch.tensor(float(start), dtype=torch.float64, device="cpu")
    if rule.signature.random:
        scalars[KEY] = TrialKey()
    if rule.signature.rounds:
        # Only for a narrow dtype does a rule that rounds do anything.
        scalars[DTYPE] = torch.bfloat16
    return scalars


def _columns(rule: Rule, available: frozenset[str], values: Tensor) -> Columns:
    """A column for everything that it reads: these values, but slots begin as they always do."""
    columns: Columns = {}
    for name in rule.columns:
        if name not in available:
            continue
        start = rule.starts.get(name)
        own = _first_value(rule, name, start, values) if callable(start) else values.clone()
        columns[name] = {"leaf": own} if rule.scope == "treewise" else own
    return columns


def _moved_columns(rule: Rule, available: frozenset[str], values: Tensor) -> Columns:
    """`_columns`, with slots as if they had taken a step: first values are mostly zeros, which
    would hide what is done with them.
    """
    columns = _columns(rule, available, values)
    for slot, start in rule.starts.items():
        if callable(start) and slot in columns:
            same = columns[slot].shape == values.shape
            columns[slot] = columns[slot] + (values if same else values.mean())
    return columns


def _first_value(rule: Rule, slot: str, start: Initializer, values: Tensor) -> Tensor:
    try:
        # An initializer may return its argument, and every column must be a tensor of its own.
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


def _reduced(rule: Rule, columns: Columns) -> dict[str, Tensor]:
    """The numbers that a rule's reductions make of these columns."""
    return {name: one.of(columns) for name, one in rule.signature.reductions.items()}


def _run(rule: Rule, columns: Columns) -> Mapping[str, Any]:
    scalars = trial_scalars(rule)
    try:
        with torch.no_grad():
            scalars |= _reduced(rule, columns)
            before = _Copies({**columns, **scalars})
            result = rule.function(**columns, **scalars)
    except Exception as error:
        raise TypeError(
            f"rule {rule.name}: its trial run on a 2 x 3 tensor of ones raised "
            f"{type(error).__name__}: {error}. "
            f"Mend the rule, or say what it writes: @{rule.scope}(writes=('update',))."
        ) from error
    before.check(rule)
    return result


def _check_hypers_stay(rule: Rule, columns: Columns) -> None:
    """Raise TypeError if it changes hypers in place where they are tensors: lr *= 2 does."""
    scalars = trial_scalars(rule)
    for name, value in scalars.items():
        if isinstance(value, (int, float)):
            scalars[name] = torch.tensor(float(value), dtype=torch.float64, device="cpu")
    with torch.no_grad():
        scalars |= _reduced(rule, columns)
        before = _Copies(scalars)
        try:
            rule.function(**columns, **scalars)
        except Exception:  # it takes plain numbers only, which nothing can change
            return
    before.check(rule)


class _Copies:
    """What tensors were before a rule has run."""

    def __init__(self, arguments: Mapping[str, object]) -> None:
        self.tensors: dict[str, Tensor] = {}
        for name, value in arguments.items():
            tensor = value["leaf"] if isinstance(value, dict) else value
            if isinstance(tensor, Tensor):
                self.tensors[name] = tensor
        self.versions = {name: tensor._version for name, tensor in self.tensors.items()}
        self.copies = {name: tensor.clone() for name, tensor in self.tensors.items()}

    def check(self, rule: Rule) -> None:
        """Raise TypeError if one of them has been written to, also unseen, through .data."""
        for name, tensor in self.tensors.items():
            copy = self.copies[name]
            # NaN never equals its copy, so it counts as unchanged.
            same = tensor.shape == copy.shape and ((tensor == copy) | (tensor != tensor)).all()
            if tensor._version != self.versions[name] or not same:
                raise TypeError(
                    f"rule {rule.name}: works in place: it changes {name!r}, which belongs to the "
                    f"caller. Write {name} = {name} * 2 for {name}.mul_(2) or {name} *= 2, and "
                    f"return the result."
                )


def _check_result(rule: Rule, columns: Columns, result: object) -> None:
    if not isinstance(result, Mapping):
        raise TypeError(
            f"rule {rule.name}: expected a dict of what it writes, got {type(result).__name__}. "
            f"End it with, for example, return dict(update=...)."
        )
    numbers = rule.signature.numbers
    for name, value in result.items():
        if name in (STEP, KEY, DTYPE):
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
        if rule.scope == "elementwise" and name not in numbers and value.shape != _SHAPE:
            cure = "Use @leafwise if it looks at the whole leaf."
            if value.dim() == 0 and name not in (*FROM_CALLER, *rule.starts):
                cure += (
                    f" A number of the whole tree is declared, with its first value, and stands "
                    f"after the '*': @elementwise({name}=0.0), def {rule.name}(..., *, {name})."
                )
            raise TypeError(
                f"rule {rule.name}: an elementwise rule keeps the shape of its leaf, but {name!r} "
                f"came out as {tuple(value.shape)} for a leaf of {_SHAPE}. {cure}"
            )
    _check_slots(rule, columns, result)


def _check_slots(rule: Rule, columns: Columns, result: Mapping[str, Any]) -> None:
    for slot in rule.starts:
        if slot not in result:
            raise TypeError(
                f"rule {rule.name}: owns slot {slot!r} but does not write it. "
                f"Return it in the dict."
            )
        if rule.scope == "leafwise" and slot in columns:
            first, later = columns[slot].shape, result[slot].shape
            if first != later:
                raise TypeError(
                    f"rule {rule.name}: slot {slot!r} begins with the shape {tuple(first)}, but "
                    f"came out as {tuple(later)}. A slot keeps its shape."
                )


def _check_elementwise(rule: Rule, available: frozenset[str]) -> None:
    """Raise TypeError if an element's result changes when its neighbours do.

    The rule is run on a matrix, and on some of its elements as a vector, with the same numbers for
    its reductions: a mean, a sort or a roll gives something else.
    """
    values = torch.tensor(_NUMBERS, dtype=torch.float64, device="cpu")
    whole = _moved_columns(rule, available, values)
    part = _moved_columns(rule, available, values.reshape(-1)[[*_SOME]])
    scalars = trial_scalars(rule)
    for name in rule.starts.keys() & whole.keys():
        if whole[name].shape != values.shape:
            raise TypeError(
                f"rule {rule.name}: slot {name!r} of an elementwise rule has the shape of its "
                f"leaf, but begins as {tuple(whole[name].shape)} for a leaf of "
                f"{tuple(values.shape)}. Use @leafwise for slots of another shape."
            )
    with torch.no_grad():
        for name, reduction in rule.signature.reductions.items():
            if not _same_elements(_expression(reduction, whole), _expression(reduction, part)):
                raise TypeError(_not_pointwise(rule, name))
            scalars[name] = reduction.of(whole)
        result, of_part = rule.function(**whole, **scalars), rule.function(**part, **scalars)
        # A rule that draws from torch's generator differs even from itself, which is another
        # mistake.
        again = rule.function(**whole, **scalars)
    for name, value in result.items():
        if name not in rule.signature.numbers and not _same_elements(value, of_part[name]):
            if not _same(value, again[name]):
                raise TypeError(
                    f"rule {rule.name}: {name!r} comes out different in every call. Draw random "
                    f"numbers with the keyword key: def {rule.name}(..., *, key), and "
                    f"uniform(key, {next(iter(rule.columns), 'grad')}) or normal."
                )
            raise TypeError(
                f"rule {rule.name}: is called elementwise, but {name!r} of one element depends on "
                f"others. Use @leafwise, or declare the number that it takes of them: "
                f"norm({next(iter(rule.columns), 'grad')!r})."
            )


def _check_expressions(rule: Rule, columns: Columns) -> None:
    """Raise TypeError if the expression of a reduction does not keep the shape of its columns."""
    for name, reduction in rule.signature.reductions.items():
        if _expression(reduction, columns).shape != columns[reduction.columns[0]].shape:
            raise TypeError(_not_pointwise(rule, name))


def _expression(reduction: Reduction, columns: Columns) -> Tensor:
    with torch.no_grad():
        return reduction.expression(*(columns[name].double() for name in reduction.columns))


def _not_pointwise(rule: Rule, name: str) -> str:
    return (
        f"rule {rule.name}: the expression of {name!r} must be elementwise: what is done with all "
        f"elements together is the reduction's part. Write total(lambda grad: grad.square())."
    )


def _check_numbers(rule: Rule, available: frozenset[str]) -> None:
    """Raise TypeError if a number of the whole tree changes when the columns of a leaf do."""
    scalars, results = trial_scalars(rule), []
    for shape, factor in ((_SHAPE, 1.0), ((4, 3), 1.5)):
        columns = _moved_columns(rule, available, torch.full(shape, factor, device="cpu"))
        with torch.no_grad():
            for name, reduction in rule.signature.reductions.items():
                # Numbers of the tree stay the same in both runs, since other numbers may be made of
                # them.
                if reduction.over == "leaf" or name not in scalars:
                    scalars[name] = reduction.of(columns)
            results.append(rule.function(**columns, **scalars))
    first, second = results
    for name in rule.signature.numbers:
        if not _same(torch.as_tensor(first[name]), torch.as_tensor(second[name])):
            raise TypeError(
                f"rule {rule.name}: {name!r} is one number of the whole tree, so it must be "
                f"made of numbers, not of columns. Declare them: total(..., over='tree')."
            )


def _check_precision(rule: Rule, available: frozenset[str]) -> None:
    """Raise TypeError if it rounds a number to float32 where its leaf is float64."""
    values = torch.tensor(_NUMBERS, dtype=torch.float64, device="cpu")
    columns = _moved_columns(rule, available, values)
    scalars = trial_scalars(rule)
    for name, value in scalars.items():
        # A value such as 0.5 is exact in float32 and would hide the rounding; 0.3 is not.
        if isinstance(value, float) and _is_exact(value):
            scalars[name] = 0.3
    with torch.no_grad(), _Rounded() as seen:
        scalars |= _reduced(rule, columns)
        try:
            rule.function(**columns, **scalars)
        except Exception:  # it cannot be tried on numbers that it does not expect
            return
    if seen.functions:
        raise TypeError(
            f"rule {rule.name}: torch.{seen.functions[0]} makes float32 of numbers alone, which "
            f"loses digits where the leaf is float64. Give it a tensor: torch.where(step > 1, "
            f"torch.full_like(step, 0.1), 0.3), or torch.tensor(0.1, dtype=grad.dtype)."
        )


class _Rounded(TorchFunctionMode):
    """Notices functions that make float32 of Python's numbers, unless nothing is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[str] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("where", "tensor", "full", "scalar_tensor") and "dtype" not in (kwargs or {}):
            numbers = args[1:] if name == "where" else args
            alone = not any(isinstance(number, Tensor) for number in numbers)
            lost = not all(_is_exact(one) for one in numbers if isinstance(one, float))
            if alone and lost and result.dtype == torch.float32:
                self.functions.append(name)
        return result


def _is_exact(number: float) -> bool:
    """Whether float32 has this number."""
    rounded = float(torch.tensor(number, dtype=torch.float32, device="cpu"))
    return rounded == number or number != number


def _same_elements(whole: Tensor, part: Tensor) -> bool:
    size = len(_NUMBERS) * len(_NUMBERS[0])
    if whole.numel() != size or part.numel() != len(_SOME):
        return False
    return _same(whole.reshape(-1)[[*_SOME]], part.reshape(-1))


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=1e-9, atol=1e-12, equal_nan=True)
