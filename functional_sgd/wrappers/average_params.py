"""Keep a running mean of the parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from functional_sgd.hyper import Hyper, Scalar
from functional_sgd.optimizer import Optimizer
from functional_sgd.ranges import Range
from functional_sgd.state import State, check_state, device_of, in_order_of, like_params, owned
from functional_sgd.tree import Tree, flatten, flatten_like, unflatten
from functional_sgd.wiring import CALLS
from functional_sgd.wrappers.partition import PARTS
from functional_sgd.wrappers.wrapper import INNER, Wrapper, no_calls, take_grads, towards, wide


@dataclass(frozen=True, repr=False)
class ParamAverage(Wrapper):
    """An optimizer that keeps a mean of its parameters; `average_params` makes one."""

    decay: float = 0.999
    start: int = 0
    every: int = 1
    debias: bool = True

    name: ClassVar[str] = "average_params"
    own_hypers: ClassVar[Mapping[str, Range]] = {"decay": Range(0, 1)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start < 0 or self.every < 1:
            raise ValueError(
                f"average_params: start must be at least 0 and every at least 1, got {self.start} "
                f"and {self.every}."
            )

    @property
    def averages(self) -> bool:
        """Its average is what is to be evaluated and kept."""
        return True

    def evaluated(self, params: Tree, state: State) -> Tree:
        """The average, in the dtypes of the params."""
        return average_of(state, like=params)

    def init(self, params: Tree) -> State:
        """A fresh state: the average is a copy of the parameters, which the first step replaces."""
        inner = self.opt.init(params)
        leaves, spec = flatten(params)
        average = unflatten(spec, [owned(wide(leaf), leaf) for leaf in leaves])
        # float64, since with decay = 1 it counts, and float32 stops counting at 2**24.
        weight = torch.zeros(len(leaves), dtype=torch.float64, device=device_of(leaves))
        return {CALLS: no_calls(params), "weight": weight, "average": average, INNER: inner}

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Hyper] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step: (new params, new state)."""
        check_state(self.name, state, (CALLS, "weight", "average", INNER))
        own, others, extras = self.take_own(hyper, extras)
        _, given, spec = take_grads(self.name, params, grads)
        before = flatten_like(spec, state["average"], params, self.name, "state['average']")
        moved, inner = self.opt(params, grads, state[INNER], others, **extras)
        moves = [grad is not None for grad in given]
        active = torch.tensor(moves, dtype=torch.bool, device=state["weight"].device)
        calls = state[CALLS] + 1
        passed = calls - self.start
        counts = active & ((passed > 0) & (passed % self.every == 0)).to(active.device)
        old_weight = in_order_of(spec, state["weight"], state["average"])
        weight = torch.where(counts, own["decay"] * old_weight + 1, old_weight)
        shares = self._shares(own["decay"], old_weight, weight, counts).unbind()
        average = []
        for old, new, grad, share in zip(before, flatten(moved)[0], given, shares, strict=True):
            if grad is None:
                average.append(old)
            else:
                average.append(towards(old, new, share))
        kept = {"weight": weight, "average": unflatten(spec, average)}
        return moved, {CALLS: calls, **kept, INNER: inner}

    def _shares(self, decay: Scalar, before: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """The share that the params have in the new average, for each leaf."""
        share = 1 / torch.where(weight == 0, 1.0, weight)
        if not self.debias:
            # Before the first params that count there is no average: they take its place.
            share = torch.where(before == 0, share, 1 - decay)
        return torch.where(counts | (weight == 0), share, 0.0)  # all, until there is an average

    def __repr__(self) -> str:
        parts = [repr(self.opt), f"decay={self.decay!r}"]
        for name, default in {"start": 0, "every": 1, "debias": True}.items():
            value = getattr(self, name)
            if value != default:
                parts.append(f"{name}={value!r}")
        return f"{self.name}({', '.join(parts)})"


def average_params(
    opt: Optimizer, decay: float = 0.999, start: int = 0, every: int = 1, debias: bool = True
) -> ParamAverage:
    """The optimizer, with a running mean of the parameters after each step: `average_of(state)`.

    weight = decay * weight + 1;  average = average + (param - average) / weight, from weight = 0,
    for each leaf

    With decay < 1 an exponential mean without the pull of where it started: after n steps, step i
    has the share (1 - decay) * decay**(n - i) / (1 - decay**n). With decay = 1 the plain mean of
    all steps; with 0 the last parameters. `decay` is a hyper: 0 for a while and then 1 is averaging
    from some step on (SWA), which `scheduled(average_params(opt), decay=...)` writes down.
    Half-precision parameters are averaged in float32, as they are stored. A leaf without a gradient
    is left alone, and so is its average.

    Only every `every`-th call after the first `start` counts; until one has, the average is the
    parameters. So `average_params(opt, decay=1.0, start=1000, every=100)` is SWA. With
    `debias=False` the first parameters that count are where the average begins, and keep the weight
    that decay leaves them: average = decay * average + (1 - decay) * param. A decay that grows as
    in TensorFlow is `scheduled(average_params(opt, debias=False), decay=DecayWarmUp(0.999))`.

    Raises ValueError unless 0 <= decay <= 1, start >= 0 and every >= 1. Source: Polyak and Juditsky
    1992; SWA (Izmailov et al. 2018); torch.optim.swa_utils.AveragedModel, with debias=False the one
    of get_ema_multi_avg_fn.

    >>> import torch
    >>> from functional_sgd import sgd
    >>> opt, params = average_params(sgd(lr=1.0), decay=1.0), torch.tensor([4.0])
    >>> state = opt.init(params)
    >>> for _ in range(2):
    ...     params, state = opt(params, torch.tensor([1.0]), state)  # to 3, to 2
    >>> average_of(state)
    tensor([2.5000])
    """
    return ParamAverage(opt, decay, start, every, debias)


def average_of(state: State, like: Tree = None) -> Tree:
    """The averaged parameters in this state, also when they are inside other wrappers.

    They are kept by `average_params` and by `schedule_free`.

    A copy that shares no memory with the state; with `like` (the parameters), in their dtypes:
    half-precision parameters are averaged in float32. Raises ValueError if the state has no
    average, or has it in a part of a partition: `average_of(state["parts"][label])` is that of one
    part.

    >>> import torch
    >>> from functional_sgd import sgd
    >>> average_of(average_params(sgd()).init({"w": torch.ones(2)}))
    {'w': tensor([1., 1.])}
    """
    inside = state
    while "average" not in inside:
        if PARTS in inside:
            raise ValueError(
                f"average_of: the state is that of a partition, which has an average for each part "
                f"or none. Put average_params outside, or look into a part: "
                f"average_of(state[{PARTS!r}][label]), with a label of "
                f"{', '.join(map(repr, inside[PARTS]))}."
            )
        if INNER not in inside:
            raise ValueError(
                f"average_of: the state has no 'average'; it has {', '.join(state)}. "
                f"Wrap the optimizer: average_params(opt)."
            )
        inside = inside[INNER]
    average = inside["average"]
    params = average if like is None else like
    return like_params(params, average)
