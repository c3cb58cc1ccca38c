"""How the optimizers of torch.optim are written here: chains, and names of slots and hypers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch

from functional_sgd.catalogue import (
    adadelta,
    adagrad,
    adam,
    adamax,
    adamw,
    asgd,
    nadam,
    radam,
    rmsprop,
    rprop,
    sgd,
)
from functional_sgd.chaining import Chain, chain
from functional_sgd.rules import ascend, weight_decay

Group: TypeAlias = Mapping[str, Any]
Hypers: TypeAlias = dict[str, Any]

MAXIMIZE = "maximize"
"""A switch that every optimizer of torch.optim has."""


class Entry(NamedTuple):
    """Where in a param group of torch a hyper is."""

    key: str
    place: int | None = None  # in the tuple that is there, such as betas

    def of(self, group: Group) -> Any:
        """What is there."""
        value = group[self.key]
        return value if self.place is None else value[self.place]


def written(entries: Mapping[str, Entry], group: Group, hypers: Group) -> Hypers:
    """The entries of a group in which these hypers are set; the others stay as they are."""
    found: Hypers = {}
    for name, value in hypers.items():
        key, place = entries[name]
        if place is None:
            found[key] = value
        else:
            # Several hypers share a tuple, so what is already written of it is kept.
            before = found[key] if key in found else group[key]
            whole = list(before)
            whole[place] = value
            found[key] = tuple(whole)
    return found


@dataclass(frozen=True)
class Kind:
    """One optimizer of torch.optim."""

    build: Callable[..., Chain]  # (hypers by our names, switches by torch's) -> the chain
    slots: Mapping[str, str]  # our slot -> torch's
    hypers: Mapping[str, Entry]  # our hyper -> where torch has it
    optional: tuple[str, ...] = ()  # hypers that switch a rule off where they are 0
    # torch's name -> its value if absent
    switches: Mapping[str, bool] = field(default_factory=dict)
    counts: bool = True  # whether torch counts the steps of a parameter
    single: tuple[str, ...] = ()  # our slots of which torch keeps one number for a parameter
    derived: Callable[[Hypers, int], dict[str, float]] | None = None
    """What torch keeps besides, that follows from hypers and the number of steps."""

    def read(self, group: Group) -> Hypers:
        """The hypers of a group by our names."""
        values = {name: _number(entry.of(group)) for name, entry in self.hypers.items()}
        if "dampening" in values and values["mom"] == 0:  # torch dampens momentum only
            values["dampening"] = 0
        return values

    def chain_of(self, who: str, groups: Sequence[Group]) -> Chain:
        """The chain that does what torch does for these groups. Raises ValueError if there is none
        for all of them.
        """
        hypers = [self.read(group) for group in groups]
        given = dict(hypers[0])
        for name in self.optional:
            # One group with this hyper is enough to need the rule; the other groups set it to 0.
            values = [own[name] for own in hypers if own[name] != 0]
            given[name] = values[0] if values else None
        chosen = {name: value for name, value in given.items() if value is not None}
        switches = self._switches(who, groups)
        up = switches.pop(MAXIMIZE)
        built = self.build(**chosen, **switches)
        return chain(ascend, built) if up else built

    def _switches(self, who: str, groups: Sequence[Group]) -> dict[str, bool]:
        found = {}
        for name, default in {MAXIMIZE: False, **self.switches}.items():
            values = {bool(group.get(name, default)) for group in groups}
            if len(values) > 1:
                raise ValueError(
                    f"{who}: groups differ in {name!r}. Take them over one by one: one optimizer "
                    f"each."
                )
            found[name] = values.pop()
        return found


def _adam(decoupled_weight_decay: bool, **hypers: Any) -> Chain:
    if decoupled_weight_decay:
        # No wd means 0 here, but adamw has a default that is not 0.
        return adamw(**{"wd": 0.0, **hypers})
    return adam(**hypers)


def _nadam(decoupled_weight_decay: bool, **hypers: Any) -> Chain:
    return _with_decay(nadam, decoupled_weight_decay, **hypers)


def _radam(decoupled_weight_decay: bool, **hypers: Any) -> Chain:
    return _with_decay(radam, decoupled_weight_decay, **hypers)


def _with_decay(
    recipe: Callable[..., Chain], decoupled: bool, wd: float | None = None, **hypers: Any
) -> Chain:
    if decoupled and wd is not None:
        return chain(weight_decay, recipe(**hypers), wd=wd)
    return recipe(**hypers, wd=wd)


def _asgd_scalars(hypers: Hypers, count: int) -> dict[str, float]:
    """The rate of the next step, and the weight that it will have in the average."""
    rate = hypers["lr"] / (1 + hypers["lambd"] * hypers["lr"] * count) ** hypers["power"]
    return {"eta": rate, "mu": 1 / max(1, count - hypers["average_from"])}


_MOMENTS = {"grad_avg": "exp_avg", "sqr_avg": "exp_avg_sq"}
_BETAS = {"mom": Entry("betas", 0), "sqr_mom": Entry("betas", 1)}
_COMMON = {"lr": Entry("lr"), "wd": Entry("weight_decay")}
_EPS = {"eps": Entry("eps")}
_MOM = {"mom": Entry("momentum")}

KINDS: dict[type, Kind] = {
    torch.optim.SGD: Kind(
        sgd,
        {"velocity": "momentum_buffer"},
        {**_COMMON, **_MOM, "dampening": Entry("dampening")},
        optional=("mom", "dampening", "wd"),
        switches={"nesterov": False},
        counts=False,
    ),
    torch.optim.Adam: Kind(
        _adam,
        {**_MOMENTS, "max_sqr_avg": "max_exp_avg_sq"},
        {**_COMMON, **_BETAS, **_EPS},
        ("wd",),
        switches={"decoupled_weight_decay": False, "amsgrad": False},
    ),
    torch.optim.AdamW: Kind(
        _adam,
        {**_MOMENTS, "max_sqr_avg": "max_exp_avg_sq"},
        {**_COMMON, **_BETAS, **_EPS},
        ("wd",),
        switches={"decoupled_weight_decay": True, "amsgrad": False},
    ),
    torch.optim.Adamax: Kind(
        adamax,
        {"grad_avg": "exp_avg", "max_grad": "exp_inf"},
        {**_COMMON, **_BETAS, **_EPS},
        ("wd",),
    ),
    torch.optim.NAdam: Kind(
        _nadam,
        {**_MOMENTS, "mom_product": "mu_product"},
        {**_COMMON, **_BETAS, **_EPS, "mom_decay": Entry("momentum_decay")},
        ("wd",),
        switches={"decoupled_weight_decay": False},
        single=("mom_product",),
    ),
    torch.optim.RAdam: Kind(
        _radam,
        _MOMENTS,
        {**_COMMON, **_BETAS, **_EPS},
        ("wd",),
        switches={"decoupled_weight_decay": False},
    ),
    torch.optim.RMSprop: Kind(
        rmsprop,
        {"sqr_avg": "square_avg", "velocity": "momentum_buffer", "grad_mean": "grad_avg"},
        {**_COMMON, **_MOM, **_EPS, "sqr_mom": Entry("alpha")},
        optional=("mom", "wd"),
        switches={"centered": False},
    ),
    torch.optim.Adagrad: Kind(
        adagrad,
        {"sqr_sum": "sum"},
        {
            **_COMMON,
            **_EPS,
            "lr_decay": Entry("lr_decay"),
            "first_sum": Entry("initial_accumulator_value"),
        },
        optional=("lr_decay", "wd"),
    ),
    torch.optim.Adadelta: Kind(
        adadelta,
        {"sqr_avg": "square_avg", "sqr_update_avg": "acc_delta"},
        {**_COMMON, **_EPS, "sqr_mom": Entry("rho")},
        ("wd",),
    ),
    torch.optim.Rprop: Kind(
        rprop,
        {"last_grad": "prev", "step_size": "step_size"},
        {
            "lr": Entry("lr"),
            "shrink": Entry("etas", 0),
            "grow": Entry("etas", 1),
            "min_size": Entry("step_sizes", 0),
            "max_size": Entry("step_sizes", 1),
        },
    ),
    torch.optim.ASGD: Kind(
        asgd,
        {"average": "ax"},
        {**_COMMON, "lambd": Entry("lambd"), "power": Entry("alpha"), "average_from": Entry("t0")},
        ("wd",),
        derived=_asgd_scalars,
    ),
}


def kind_of(who: str, optimizer: object) -> Kind:
    """The kind of an optimizer. Raises TypeError for those that cannot be taken over."""
    if type(optimizer) not in KINDS:
        known = ", ".join(sorted(kind.__name__ for kind in KINDS))
        raise TypeError(
            f"{who}: expected an optimizer of torch.optim: {known}; got "
            f"{type(optimizer).__name__}. "
            f"torch_optimizer runs others."
        )
    return KINDS[type(optimizer)]


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, torch.Tensor) else value
