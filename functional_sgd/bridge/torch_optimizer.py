"""Any class of torch.optim as an optimizer of ours, which runs it on copies."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sgd.bridge.kinds import Entry, Group, Hypers, written
from functional_sgd.call import check_like
from functional_sgd.errors import NAMES_ELSEWHERE
from functional_sgd.hyper import Hyper, collect, per_leaf
from functional_sgd.optimizer import Optimizer
from functional_sgd.state import State, check_params, check_state, new_calls, owned
from functional_sgd.tracing import recorded
from functional_sgd.tree import Tree, flatten, flatten_like, keys_of, unflatten
from functional_sgd.wiring import CALLS
from functional_sgd.wrappers.wrapper import wide

WHO = "torch_optimizer"
BEGUN, KEPT = "begun", "kept"

_OURS = {name: NAMES_ELSEWHERE[name] for name in ("momentum", "betas", "weight_decay")}
"""Hypers of torch.optim that have a name here; others keep theirs."""


class Work(NamedTuple):
    """What torch gets of one leaf."""

    param: Tensor  # a copy, which the step overwrites
    grad: Tensor
    kept: Mapping[str, Tensor]  # by torch's names; empty before the first step of the leaf
    hyper: Hypers  # those that differ by leaf


@dataclass(frozen=True, repr=False)
class TorchOptim(Optimizer):
    """An optimizer that lets one of torch.optim do the step; `torch_optimizer` makes one.

    Its state is {"calls": how many, "begun": for each leaf whether it has been stepped, "kept":
    for each leaf what torch keeps of it, by torch's names}. What is kept of a leaf counts only once
    it has begun.
    """

    kind: type[torch.optim.Optimizer]
    options: Mapping[str, Any] = field(hash=False)
    defaults: Mapping[str, Any] = field(init=False, compare=False)  # of a param group
    entries: Mapping[str, Entry] = field(init=False, compare=False)  # hyper -> where torch has it

    def __post_init__(self) -> None:
        if not (isinstance(self.kind, type) and issubclass(self.kind, torch.optim.Optimizer)):
            raise TypeError(
                f"{WHO}: expected a class such as torch.optim.NAdam, got {self.kind!r}. Its "
                f"arguments come after it."
            )
        closure = inspect.signature(self.kind.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(
                f"{WHO}: {self.kind.__name__} computes the loss several times in a step, which "
                f"needs a closure. "
                f"Only optimizers that step along a given gradient can be run."
            )
        # A matrix, since torch.optim.Muon takes nothing else.
        made = _made(self.kind, [torch.zeros(1, 1)], self.options)
        object.__setattr__(self, "defaults", made.defaults)
        object.__setattr__(self, "entries", _numbers_among(made.defaults))

    @property
    def hyper(self) -> dict[str, Hyper]:
        """The hypers and their defaults: the numbers among the arguments of the class."""
        return {name: _number(entry.of(self.defaults)) for name, entry in self.entries.items()}

    @property
    def traceable(self) -> bool:
        """It changes tensors in place, so no compiler can follow it."""
        return False

    def init(self, params: Tree) -> State:
        """A fresh state. What torch will keep is found out by a step on copies, along zeros.

        Raises TypeError if that is more than tensors for each parameter.
        """
        self._check_outside()
        leaves, spec = flatten(params)
        check_params(leaves)
        works = []
        for leaf in leaves:
            copy = _copy(leaf)
            works.append(Work(copy, torch.zeros_like(copy), {}, {}))
        found = self._stepped(works, {})
        calls = new_calls(leaves)
        begun = [torch.zeros_like(calls, dtype=torch.bool) for _ in leaves]
        kept = []
        for own in found:
            zeros = {name: torch.zeros_like(value) for name, value in own.items()}
            kept.append(zeros)
        return {CALLS: calls, BEGUN: unflatten(spec, begun), KEPT: unflatten(spec, kept)}

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Hyper] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step: (new params, new state). The arguments are not touched."""
        check_state(WHO, state, (CALLS, BEGUN, KEPT))
        self._check_outside()
        leaves, spec = flatten(params)
        given = flatten_like(spec, grads, params, WHO, "grads")
        check_like(
            WHO, "the gradient", params, leaves, given, "Were the gradients taken of other params?"
        )
        begun = flatten_like(spec, state[BEGUN], params, WHO, f"state[{BEGUN!r}]")
        kept = flatten_like(spec, state[KEPT], params, WHO, f"state[{KEPT!r}]")
        values = collect(WHO, self.hyper, hyper, extras)
        shared, separate = per_leaf(WHO, values, {**(hyper or {}), **extras}, params, spec)

        active = [index for index, grad in enumerate(given) if grad is not None]
        # One transfer from the device for all leaves.
        known = torch.stack([begun[index] for index in active]).tolist() if active else []
        works = []
        for index, has_begun in zip(active, known, strict=True):
            copy = _copy(leaves[index])
            grad = given[index].detach().to(copy.dtype, copy=True)
            # An empty state makes torch take the first step of a leaf.
            before = kept[index] if has_begun else {}
            own_hyper = {name: column[index] for name, column in separate.items()}
            works.append(Work(copy, grad, before, own_hyper))
        after = self._stepped(works, shared)

        new, new_begun, new_kept = list(leaves), list(begun), list(kept)
        for index, work, own in zip(active, works, after, strict=True):
            self._check_kept(own, kept[index])
            new[index] = work.param.to(leaves[index].dtype)
            new_kept[index] = own
            new_begun[index] = torch.ones_like(begun[index])
        return unflatten(spec, new), {
            CALLS: state[CALLS] + 1,
            BEGUN: unflatten(spec, new_begun),
            KEPT: unflatten(spec, new_kept),
        }

    def extend(self, state: State, before: Tree, params: Tree) -> State:
        """The state for more params: the leaves of `before` (by path) go on, the others begin."""
        places = {keys: place for place, keys in enumerate(keys_of(before))}
        old_spec, new_spec = flatten(before)[1], flatten(params)[1]
        fresh = self.init(params)
        grown: State = {CALLS: state[CALLS]}
        for entry in (BEGUN, KEPT):
            old, new = old_spec.flatten_up_to(state[entry]), new_spec.flatten_up_to(fresh[entry])
            for index, keys in enumerate(keys_of(params)):
                if keys in places:
                    new[index] = old[places[keys]]
            grown[entry] = unflatten(new_spec, new)
        return grown

    def __repr__(self) -> str:
        options = (f"{name}={value!r}" for name, value in self.options.items())
        return f"{WHO}({', '.join([self.kind.__name__, *options])})"

    def _check_outside(self) -> None:
        if recorded():
            raise TypeError(
                f"{WHO}: {self.kind.__name__} changes tensors in place, so it cannot be compiled, "
                f"mapped over or "
                f"differentiated. A chain of rules can: adamw(), or from_torch."
            )

    def _check_kept(self, own: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        if own.keys() != expected.keys():
            raise ValueError(
                f"{WHO}: with these hypers {self.kind.__name__} keeps {sorted(own)} of a leaf, but "
                f"{sorted(expected)} "
                f"with those it was made with. Make it with others: a hyper of 0 may switch "
                f"something off."
            )

    def _stepped(self, works: Sequence[Work], shared: Hypers) -> list[dict[str, Tensor]]:
        """Step these leaves, in place; returns what torch keeps of each."""
        if not works:
            return []
        optimizer = _made(self.kind, self._groups(works, shared), self.options)
        for work in works:
            work.param.grad = work.grad
            if work.kept:
                copies = {name: value.clone() for name, value in work.kept.items()}
                optimizer.state[work.param] = copies
        # What a class keeps anywhere else than in the state of its parameters would be lost between
        # calls.
        numbers = [_without_params(group) for group in optimizer.param_groups]
        with torch.no_grad():
            optimizer.step()
        numbers_after = [_without_params(group) for group in optimizer.param_groups]
        others = optimizer.state.keys() - {work.param for work in works}
        if numbers_after != numbers or others:
            raise TypeError(
                f"{WHO}: {self.kind.__name__} keeps something that is not of one parameter. It "
                f"cannot be run."
            )
        found = []
        for work in works:
            own = optimizer.state.get(work.param, {})
            found.append(_tensors(self.kind, own, work.param))
        return found

    def _groups(self, works: Sequence[Work], shared: Hypers) -> list[Hypers]:
        """The param groups: one of all leaves, or one of each if their hypers differ."""
        if not any(work.hyper for work in works):
            return [{"params": [work.param for work in works], **self._written(shared)}]
        groups = []
        for work in works:
            hyper = {**shared, **work.hyper}
            groups.append({"params": [work.param], **self._written(hyper)})
        return groups

    def _written(self, hyper: Hypers) -> Hypers:
        """The entries of a param group with these hypers, under torch's names."""
        numbers = {name: _number(value) for name, value in hyper.items()}
        return written(self.entries, self.defaults, numbers)


def torch_optimizer(kind: type[torch.optim.Optimizer], /, **options: Any) -> TorchOptim:
    """Any class of torch.optim as an optimizer: `torch_optimizer(torch.optim.NAdam, lr=0.01)`.

    Every call makes one with the `options`, on copies of params and of what it keeps, and lets it
    step; so runs can be saved, forked and resumed, and the numbers are torch's. The numbers among
    the options are hypers: `weight_decay` as wd, `momentum` as mom, `betas` as mom and sqr_mom,
    others by torch's names ("lr", "eps", "momentum_decay"). Other tuples and switches stay as they
    are. Half-precision parameters are stepped in float32 and rounded once. A leaf whose gradient is
    None is left alone.

    It is slower than a chain, and it cannot be fused (`fuse` leaves it as it is), compiled, mapped
    over or differentiated. SGD, Adam, AdamW, RAdam and RMSprop are chains here; `from_torch` makes
    them of torch's.

    Raises TypeError for what is no such class, for one that needs a closure (LBFGS), and for one
    that keeps more than tensors for each parameter; what torch raises for wrong options; ValueError
    for a hyper that there is not.

    >>> import torch
    >>> opt, params = torch_optimizer(torch.optim.Rprop, lr=0.5), torch.tensor([4.0])
    >>> params, state = opt(params, torch.tensor([3.0]), opt.init(params))
    >>> params, state["calls"], state["kept"]["prev"]
    (tensor([3.5000]), tensor(1), tensor([3.]))
    """
    return TorchOptim(kind, options)


def _made(
    kind: type[torch.optim.Optimizer], params: Any, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    make: Callable[..., torch.optim.Optimizer] = kind
    return make(params, **options)


def _numbers_among(defaults: Group) -> dict[str, Entry]:
    """Where every number among a class's arguments is, by our names."""
    found: dict[str, Entry] = {}
    for key, value in defaults.items():
        names = _OURS.get(key, (key,))
        if _is_number(value):
            found[names[0]] = Entry(key)
        elif key in _OURS and _is_tuple_of_numbers(value, len(names)):
            for place, name in enumerate(names):
                found[name] = Entry(key, place)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)


def _is_tuple_of_numbers(value: object, size: int) -> bool:
    return isinstance(value, tuple) and len(value) == size and all(map(_is_number, value))


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _copy(leaf: Tensor) -> Tensor:
    """A leaf for torch.optim to change: float32 if it is of half precision."""
    return wide(leaf.detach()).clone()


def _without_params(group: Group) -> Hypers:
    return {name: value for name, value in group.items() if name != "params"}


def _tensors(kind: type, own: Mapping[str, object], param: Tensor) -> dict[str, Tensor]:
    """What torch keeps of a parameter, in memory of its own. Raises TypeError if that is more than
    tensors.
    """
    found: dict[str, Tensor] = {}
    for name, value in own.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{WHO}: {kind.__name__} keeps {name!r} as {type(value).__name__}; only tensors "
                f"can be kept in a state."
            )
        found[name] = owned(value, param)
    return found
