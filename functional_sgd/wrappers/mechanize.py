"""Mechanic: any optimizer, with a rate that is found on the way."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from functional_sgd.hyper import Hyper, Scalar
from functional_sgd.optimizer import Optimizer
from functional_sgd.pairs import as_real
from functional_sgd.ranges import Range
from functional_sgd.reduction import global_norm, root
from functional_sgd.sharded import full
from functional_sgd.state import State, check_state, device_of, owned
from functional_sgd.tree import Tree, flatten, flatten_like, unflatten
from functional_sgd.wiring import CALLS
from functional_sgd.wrappers.wrapper import INNER, Wrapper, no_calls, take_grads, wide

TUNERS = ("peak", "sqr_sum", "reward", "rate")
"""What each tuner remembers: a vector, with a number for each of them."""


@dataclass(frozen=True, repr=False)
class Mechanize(Wrapper):
    """An optimizer whose steps are scaled by learned rates; `mechanize` makes one."""

    mechanic_wd: float = 1e-2
    mechanic_eps: float = 1e-8
    first_rate: float = 1e-6
    tuners: int = 6

    name: ClassVar[str] = "mechanize"
    own_hypers: ClassVar[Mapping[str, Range]] = {
        "mechanic_wd": Range(0),
        "mechanic_eps": Range(0, open_low=True),
        "first_rate": Range(0, open_low=True),
    }
    needs_old: ClassVar[bool] = True
    vectors: ClassVar[frozenset[str]] = frozenset(TUNERS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.opt.averages:
            raise ValueError(
                f"mechanize: expected an optimizer whose params are those to evaluate, got "
                f"{self.opt!r}, which averages params; these are not yet scaled by the rate. Put "
                f"the average around it: average_params(mechanize(...))."
            )
        if self.tuners not in Range(1, whole=True):
            raise ValueError(
                f"mechanize: tuners must be {Range(1, whole=True)!r}, got {self.tuners!r}. "
                f"Take the default, 6."
            )

    def init(self, params: Tree) -> State:
        """A fresh state: the params are kept as the start, and no tuner has bet."""
        leaves, spec = flatten(params)
        starts = unflatten(spec, [owned(wide(leaf), leaf) for leaf in leaves])
        zeros = torch.zeros(self.tuners, dtype=torch.float64, device=device_of(leaves))
        tuned = {name: zeros.clone() for name in TUNERS}
        return {CALLS: no_calls(params), "start": starts, **tuned, INNER: self.opt.init(starts)}

    def extend(self, state: State, before: Tree, params: Tree) -> State:
        """The state for more params: tuners go on."""
        # With as many leaves as tuners, `extended` would take them for a number of each leaf.
        tuned = {name: state[name] for name in TUNERS}
        return {**super().extend(state, before, params), **tuned}

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Hyper] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step: (new params, new state)."""
        check_state(self.name, state, (CALLS, "start", *TUNERS, INNER))
        own, others, extras = self.take_own(hyper, extras)
        given, grads_now, spec = take_grads(self.name, params, grads).dense()
        leaves = [wide(leaf) for leaf in given]
        starts = flatten_like(spec, state["start"], params, self.name, "state['start']")
        slopes: list[Tensor | None] = []
        for grad in grads_now:
            if grad is None:
                slopes.append(None)
            else:
                slopes.append(wide(grad))
        moved, inner = self.opt(
            unflatten(spec, leaves), unflatten(spec, slopes), state[INNER], others, **extras
        )
        ends, _ = flatten(moved)
        # The params were made with the rate of the last step, so their way is divided by that one.
        eps, before = own["mechanic_eps"], state["rate"].sum()
        ways = []
        for leaf, start in zip(leaves, starts, strict=True):
            ways.append((leaf - start) / _like(before + eps, leaf))
        tuned = self._tune(state, self._against(leaves, slopes, ways, before, own), own)
        rate = tuned["rate"].sum()
        results = []
        columns = zip(given, leaves, slopes, starts, ways, ends, strict=True)
        for leaf, here, slope, start, way, end in columns:
            if slope is None:
                results.append(leaf)
                continue
            now = start + _like(rate, here) * (way + (end - here))
            results.append(now.to(leaf.dtype))
        return unflatten(spec, results), {
            CALLS: state[CALLS] + 1,
            "start": state["start"],
            **tuned,
            INNER: inner,
        }

    def _against(
        self,
        leaves: list[Tensor],
        slopes: list[Tensor | None],
        ways: list[Tensor],
        rate: Tensor,
        own: Mapping[str, Scalar],
    ) -> Tensor:
        """How far the way, if it is gone at rate 1, leads against this gradient and the decay."""
        there: list[int] = []  # the leaves with a gradient
        sizes: list[Tensor] = []
        found: list[Tensor] = []
        for place, slope in enumerate(slopes):
            if slope is not None:
                there.append(place)
                sizes.append(leaves[place])
                found.append(slope)
        if not there:
            return torch.zeros_like(rate)
        pull = own["mechanic_wd"] * rate * global_norm(found)
        pull = pull / (global_norm(sizes) + own["mechanic_eps"])
        terms = []
        for place, slope in zip(there, found, strict=True):
            dot = _dot(slope, ways[place]).to(rate.device)
            decay = _dot(leaves[place], ways[place]).to(rate.device)
            terms.append(dot + pull * decay)
        return -torch.stack(terms).sum()

    def _tune(self, old: State, against: Tensor, own: Mapping[str, Scalar]) -> dict[str, Tensor]:
        """What the tuners remember after a bet."""
        places = torch.arange(1, self.tuners + 1, dtype=torch.float64, device=against.device)
        decay, eps = 1 - 0.1**places, own["mechanic_eps"]
        won = torch.minimum(torch.maximum(against, -old["peak"]), old["peak"])
        peak = torch.maximum(decay * old["peak"], against.abs() + eps)
        sqr_sum = decay.square() * old["sqr_sum"] + against.square()
        reward = decay * old["reward"] + won * old["rate"]
        wealth = own["first_rate"] / self.tuners * peak + reward.clamp(min=0)
        rate = wealth / (root(sqr_sum) + eps)
        return dict(peak=peak, sqr_sum=sqr_sum, reward=reward, rate=rate)


def mechanize(
    opt: Optimizer,
    mechanic_wd: float = 1e-2,
    mechanic_eps: float = 1e-8,
    first_rate: float = 1e-6,
    tuners: int = 6,
) -> Mechanize:
    """The optimizer, with a rate that is learned: give it lr=1, or a schedule around 1.

    way = way + what opt would add to the params;  param = start + rate * way

    won = -<grad + decay, way>, the old one;  the rate is a sum of bets on it, in each tuner k:
    reward = b * reward + clip(won, -peak, peak) * bet;  peak = max(b * peak, |won| + eps)
    sqr_sum = b**2 * sqr_sum + won**2;  bet = (first_rate / tuners * peak + max(reward, 0)) /
    (sqrt(sqr_sum) + eps), where b = 1 - 0.1**k

    The way is (param - start) / (rate + eps), so `state["start"]` is all that is kept of the
    params. `mechanic_wd` pulls the rate towards 0: decay = mechanic_wd * rate * |grad| / |param| *
    param. Hypers have names of their own, since opt may have an eps and a wd. Leaves without a
    gradient stay, and do not count. Half-precision params are computed in float32, but lose the
    first steps, of 1e-6 or so, when they are rounded again: the way stays 0, and they never move.
    Keep them in float32.

    What `opt` does to params after its step, such as a projection, is scaled like the step: project
    the result instead. Raises ValueError for a hyper out of its range, or if `opt` overwrites its
    arguments or averages params.
    Source: Cutkosky et al. 2023 (NeurIPS), "Mechanic"; numbers of optax.contrib.mechanize.

    >>> import torch
    >>> from functional_sgd import sgd
    >>> opt, params = mechanize(sgd(lr=1.0), first_rate=0.25), torch.tensor([8.0])
    >>> params, state = opt(params, torch.tensor([2.0]), opt.init(params))
    >>> params, state["start"]
    (tensor([7.5000]), tensor([8.]))
    """
    return Mechanize(opt, mechanic_wd, mechanic_eps, first_rate, tuners)


def _like(number: Tensor, leaf: Tensor) -> Tensor:
    dtype = leaf.real.dtype if leaf.is_complex() else leaf.dtype
    return number.to(leaf.device, dtype)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """The sum of the products, of complex leaves as pairs of reals: 0-d, float64, plain."""
    one, other = as_real(one), as_real(other)
    total: Tensor = full((one.double() * other.double()).sum())
    return total
