"""Take the state of an optimizer of torch.optim over, by name, and hand it back."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functional_sgd.bridge.kinds import Hypers, Kind, kind_of, written
from functional_sgd.chaining import Chain
from functional_sgd.errors import did_you_mean
from functional_sgd.hyper import Hyper
from functional_sgd.pairs import as_complex, as_real
from functional_sgd.signature import STEP
from functional_sgd.state import State, check_state, check_steps
from functional_sgd.tree import paths

Named: TypeAlias = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
"""Parameters with their names: module.named_parameters(), or a dict."""


class Imported(NamedTuple):
    """What `from_torch` returns: go on with `opt(params, grads, state, hyper)`."""

    opt: Chain
    params: dict[str, Tensor]  # copies
    state: State  # copies
    hyper: dict[str, Hyper]  # the hypers in which groups differ: {name: value} for the parameters


def from_torch(optimizer: torch.optim.Optimizer, names: Named) -> Imported:
    """What an optimizer of torch.optim is about to do, as values: (opt, params, state, hyper).

    `opt` is the chain with the numbers of SGD, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, Adagrad,
    Adadelta, Rprop or ASGD, with its hypers as defaults; going on with it is never having
    switched. `names` are the names of the parameters
    (module.named_parameters()), by which params and slots are kept: torch's own order does not
    matter. Hypers in which param groups differ are in `hyper`. Parameters may have taken different
    numbers of steps. SGD does not count them: the entry of state["step"] is then 1 if there were
    any.

    Raises TypeError for other optimizers, and ValueError, naming the parameter, for one without a
    name, and one that lacks state which others have.

    >>> import torch
    >>> layer = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.3)
    >>> opt, params, state, hyper = from_torch(optimizer, layer.named_parameters())
    >>> opt.hyper["lr"], opt.hyper["wd"], list(params), state["step"], hyper
    (0.1, 0.3, ['weight', 'bias'], tensor([0, 0]), {})
    """
    kind = kind_of("from_torch", optimizer)
    named = _by_name("from_torch", optimizer, names)
    opt = kind.chain_of("from_torch", optimizer.param_groups)
    params = {name: param.detach().clone() for name, param in named.items()}
    kept = {name: _kept(kind, optimizer.state.get(param, {})) for name, param in named.items()}
    state = opt.init(params)
    hypers = _hypers(kind, optimizer, named)
    counts = [_count(kind, kept[name]) for name in paths(params)]
    state[STEP] = torch.tensor(counts, dtype=torch.int64, device=state[STEP].device)
    for slot in state.keys() - {STEP}:
        theirs = kind.slots[slot]
        for name, own in kept.items():
            if own.get(theirs) is not None:
                state[slot][name].copy_(as_real(own[theirs]))
            elif own and kind.counts and _expected(theirs, hypers[name]):
                raise ValueError(
                    f"from_torch: the state of {name!r} has no {theirs!r}; it has {', '.join(own)}."
                )
    return Imported(opt, params, state, _differing(hypers, opt))


def into_torch(
    optimizer: torch.optim.Optimizer,
    names: Named,
    state: State,
    hyper: Mapping[str, Hyper] | None = None,
) -> dict[str, Any]:
    """A state dict for an optimizer of torch.optim with this state:
    `optimizer.load_state_dict(into_torch(...))`.

    The way back from `from_torch`: `optimizer` must be of the kind that `state` belongs to, and
    have exactly the parameters that the state has slots for. It is not touched. `hyper` sets the
    hypers of its groups, by our names; a dict {parameter name: value} must have one value within
    each group. The parameters themselves go back with module.load_state_dict.

    Raises ValueError for a slot that is missing or too many, and TypeError for other optimizers.

    >>> import torch
    >>> from functional_sgd import adam
    >>> layer, opt = torch.nn.Linear(1, 1), adam()
    >>> state = opt.init(dict(layer.named_parameters()))
    >>> optimizer = torch.optim.Adam(layer.parameters())
    >>> hyper = dict(lr=0.5, mom=0.8)
    >>> taken = into_torch(optimizer, layer.named_parameters(), state, hyper)
    >>> optimizer.load_state_dict(taken)
    >>> optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]
    (0.5, (0.8, 0.999))
    """
    kind = kind_of("into_torch", optimizer)
    named = _by_name("into_torch", optimizer, names)
    # Which slots there are depends on the switches (amsgrad, say), so the chain is asked.
    empty = kind.chain_of("into_torch", optimizer.param_groups).init({})
    slots = [slot for slot in kind.slots if slot in empty]
    check_state("into_torch", state, (STEP, *slots))
    for slot in slots:
        _check_names(slot, state[slot], named)
    check_steps("into_torch", state[STEP], len(named))
    # Slots may be in a dict of another order than the names here: an OrderedDict, say.
    in_order = paths(state[slots[0]]) if slots else paths(named)
    counts = dict(zip(in_order, state[STEP].tolist(), strict=True))
    entries: dict[int, dict[str, Any]] = {}
    for number, (name, param) in enumerate(named.items()):
        own: dict[str, Any] = {}
        if kind.counts:
            own["step"] = torch.tensor(float(counts[name]))
        for slot in slots:
            own[kind.slots[slot]] = _theirs(state[slot][name], param, slot in kind.single)
        # To torch an entry means that the first step is over, and SGD's first step is different.
        if own and counts[name] > 0:
            entries[number] = own
    packed = optimizer.state_dict()["param_groups"]
    order = list(named)
    given = hyper or {}
    for name in given:
        if name not in kind.hypers:
            raise ValueError(
                f"into_torch: no hyper of {type(optimizer).__name__} is {name!r}. "
                f"{did_you_mean(name, kind.hypers)}"
            )
    for group in packed:
        members = [order[number] for number in group["params"]]
        own_hyper = _of_group(given, members)
        group.update(written(kind.hypers, group, own_hyper))
        if kind.derived is None:
            continue
        # After the group has been updated, since these values follow from its hypers.
        for number in group["params"]:
            if number in entries:
                derived = kind.derived(kind.read(group), counts[order[number]])
                for key, value in derived.items():
                    entries[number][key] = torch.tensor(value).double()
    return {"state": entries, "param_groups": packed}


def _by_name(who: str, optimizer: torch.optim.Optimizer, names: Named) -> dict[str, Tensor]:
    """The parameters of the optimizer in its order, by name."""
    pairs = names.items() if isinstance(names, Mapping) else names
    known = {id(param): name for name, param in pairs}
    named: dict[str, Tensor] = {}
    for number, group in enumerate(optimizer.param_groups):
        for place, param in enumerate(group["params"]):
            if id(param) not in known:
                raise ValueError(
                    f"{who}: parameter {place} of group {number}, of shape {tuple(param.shape)}, "
                    f"has no name. "
                    f"Pass the named_parameters() of the module that the optimizer was made for."
                )
            named[known[id(param)]] = param
    return named


def _check_names(slot: str, values: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a slot has a value for each of the parameters, and no others."""
    for name in values:
        if name not in named:
            raise ValueError(
                f"into_torch: the state has slots for {name!r}, which is no parameter of the "
                f"optimizer."
            )
    for name in named:
        if name not in values:
            raise ValueError(
                f"into_torch: the state has no {slot!r} for {name!r}; it has {', '.join(values)}."
            )


def _kept(kind: Kind, own: Mapping[str, Any]) -> dict[str, Any]:
    """What torch keeps for a parameter that has taken a step: first values are made here."""
    has_stepped = not kind.counts or own.get("step", 0) > 0
    return dict(own) if has_stepped else {}


def _count(kind: Kind, own: Mapping[str, Any]) -> int:
    if kind.counts:
        return int(own.get("step", 0))
    return int(any(value is not None for value in own.values()))


def _theirs(value: Tensor, param: Tensor, single: bool) -> Tensor:
    """A slot as torch keeps it, in memory of its own; `single` if that is one number for all
    elements.
    """
    if single:
        # A leaf without elements has none to read; the empty product is 1.
        return value.reshape(-1)[0].clone() if value.numel() else value.new_ones(())
    return as_complex(value, param).clone()


def _hypers(
    kind: Kind, optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]
) -> dict[str, Hypers]:
    """The hypers of every parameter, by our names."""
    every: list[Hypers] = []
    for group in optimizer.param_groups:
        every += [kind.read(group)] * len(group["params"])
    return dict(zip(named, every, strict=True))


def _expected(slot: str, hypers: Hypers) -> bool:
    """Whether torch keeps this for a parameter that it has stepped with these hypers."""
    return slot != "momentum_buffer" or hypers["mom"] != 0


def _differing(hypers: Mapping[str, Hypers], opt: Chain) -> dict[str, Hypers]:
    """The hypers in which groups differ, with a value for every parameter."""
    found: dict[str, Hypers] = {}
    for name, default in opt.hyper.items():
        values = {path: own[name] for path, own in hypers.items()}
        if any(value != default for value in values.values()):
            found[name] = values
    return found


def _of_group(hyper: Mapping[str, Hyper], paths: list[str]) -> Hypers:
    """The hypers of a group with these parameters, one value of each."""
    own: Hypers = {}
    for name, value in hyper.items():
        if not isinstance(value, Mapping):
            own[name] = value
        elif paths:  # a group without parameters has no value by parameter, and keeps its own
            own[name] = _only_value(name, value, paths)
    return own


def _only_value(name: str, value: Mapping[str, Any], paths: list[str]) -> Any:
    """The value of a hyper that these parameters have in common."""
    for path in paths:
        if path not in value:
            raise ValueError(
                f"into_torch: {name!r} has no value for {path!r}; it has {', '.join(value)}."
            )
    values = {value[path] for path in paths}
    if len(values) > 1:
        raise ValueError(
            f"into_torch: {name!r} has several values within one group: {sorted(values)}."
        )
    return values.pop()
