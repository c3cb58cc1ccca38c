"""Schedule-free learning: steps and their average at once, instead of a rate that falls."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from functional_sgd.chaining import Optimizer, chain
from functional_sgd.hyper import scalar
from functional_sgd.rule import COUNTER, elementwise
from functional_sgd.rules import average_sqr_grad, sgd_step
from functional_sgd.rules.scaling import root
from functional_sgd.state import State, check_state, owned
from functional_sgd.tree import Tree, flatten, flatten_like, unflatten
from functional_sgd.wrappers.wrapper import (
    INNER,
    Wrapper,
    counter_like,
    names_of,
    take_grads,
    towards,
    wide,
)


@dataclass(frozen=True, repr=False)
class ScheduleFree(Wrapper):
    """An optimizer that keeps fast weights and their average, and trains between them;
    `schedule_free` makes one.
    """

    mom: float = 0.9
    wd: float = 0.0
    lr_power: float = 2.0

    name: ClassVar[str] = "schedule_free"
    own_hypers: ClassVar[tuple[str, ...]] = ("mom", "wd", "lr_power")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "lr" not in names_of(self.opt):
            raise ValueError(
                f"schedule_free: {self.opt!r} has no lr, by which steps are weighed. End it with "
                f"sgd_step."
            )
        if not 0 <= self.mom < 1:
            raise ValueError(
                f"schedule_free: mom must be in [0, 1), got {self.mom!r}. 0.9 is usual."
            )

    def init(self, params: Tree) -> State:
        """A fresh state: the fast weights and the average are copies of the parameters."""
        leaves, spec = flatten(params)
        fast, average = (
            unflatten(spec, [owned(wide(leaf), leaf) for leaf in leaves]) for _ in range(2)
        )
        inner = self.opt.init(fast)
        zeros = {name: counter_like(inner).to(torch.float64) for name in ("lr_max", "weight_sum")}
        return {
            COUNTER: counter_like(inner),
            **zeros,
            "fast": fast,
            "average": average,
            INNER: inner,
        }

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Any] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step: (new params, new state). The gradients are those at the params."""
        check_state(self.name, state, ("lr_max", "weight_sum", "fast", "average", INNER))
        own, others, extras = self.take_own(hyper, extras)
        lr = self._rate(others, extras)
        leaves, given, spec = take_grads(self.name, params, grads)
        fast, average = (
            flatten_like(spec, state[name], params, self.name, f"state[{name!r}]")
            for name in ("fast", "average")
        )
        pulled = [
            old if grad is None else old - (lr * own["wd"] * wide(leaf)).to(old.dtype)
            for old, leaf, grad in zip(fast, leaves, given, strict=True)
        ]
        moved, inner = self.opt(unflatten(spec, pulled), grads, state[INNER], others, **extras)
        lr_max = torch.maximum(
            state["lr_max"], lr if isinstance(lr, Tensor) else torch.full_like(state["lr_max"], lr)
        )
        weight = lr_max ** own["lr_power"]
        weight_sum = state["weight_sum"] + weight
        share = weight / torch.where(weight_sum == 0, 1.0, weight_sum)
        new_fast, new_average, new = flatten(moved)[0], list(average), list(leaves)
        for index, grad in enumerate(given):
            if grad is not None:
                new_average[index] = towards(average[index], new_fast[index], share)
                between = towards(new_average[index], new_fast[index], 1 - own["mom"])
                new[index] = between.to(leaves[index].dtype)
        kept = {
            "fast": unflatten(spec, new_fast),
            "average": unflatten(spec, new_average),
            INNER: inner,
        }
        return unflatten(spec, new), {
            COUNTER: state[COUNTER] + 1, "lr_max": lr_max, "weight_sum": weight_sum, **kept
        }  # fmt: skip

    def _rate(self, hyper: Mapping[str, Any], extras: Mapping[str, Any]) -> float | Tensor:
        values = {**self.opt.hyper, **hyper, **extras}
        if "lr" not in values or isinstance(values["lr"], (dict, list, tuple)):
            raise ValueError(
                f"schedule_free: steps are weighed by lr, which must be one number, got "
                f"{values.get('lr')!r}. "
                f"Put the schedule or the partition outside: scheduled(schedule_free(opt), lr=...)."
            )
        return scalar(self.name, "lr", values["lr"])


def schedule_free(
    opt: Optimizer, mom: float = 0.9, wd: float = 0.0, lr_power: float = 2.0
) -> ScheduleFree:
    """The optimizer, moving fast weights by the gradients at a point between them and their running
    average.

    fast = opt(fast - lr * wd * param, grad);  average = average + c * (fast - average) param = mom
    * average + (1 - mom) * fast;  c = w / (sum of all w so far), w = (largest lr so far)**lr_power

    Train with params as ever, and a rate that stays (after a warm-up, if there is one: `scheduled`,
    outside); evaluate with `averaged(state)`. `mom` in [0, 1) takes the place of the optimizer's
    own momentum, which should have none; `wd` decays the fast weights by the params, where the
    gradient is taken. Half-precision parameters have float32 weights. AdamW and SGD in this form
    are `schedule_free_adamw` and `schedule_free_sgd`.

    Raises ValueError if the optimizer has no `lr`, or a hyper of the same name as one of these.
    Source: Defazio et al. 2024, "The Road Less Scheduled".

    >>> import torch
    >>> from functional_sgd import averaged, sgd
    >>> opt, params = schedule_free(sgd(lr=1.0), mom=0.5), torch.tensor([4.0])
    >>> state = opt.init(params)
    >>> for _ in range(2):
    ...     params, state = opt(params, torch.tensor([1.0]), state)  # fast: 3, 2; average: 3, 2.5
    >>> params, averaged(state)
    (tensor([2.2500]), tensor([2.5000]))
    """
    return ScheduleFree(opt, mom, wd, lr_power)


def schedule_free_adamw(
    lr: float = 2.5e-3, mom: float = 0.9, sqr_mom: float = 0.999, eps: float = 1e-8, wd: float = 0.0
) -> ScheduleFree:
    """Adam with schedule-free averaging in the place of momentum, and decoupled weight decay.

    Source: Defazio et al. 2024; numbers of schedulefree.AdamWScheduleFree without warm-up.

    >>> schedule_free_adamw(lr=0.01).hyper
    {'sqr_mom': 0.999, 'eps': 1e-08, 'lr': 0.01, 'mom': 0.9, 'wd': 0.0, 'lr_power': 2.0}
    """
    inner = chain(
        average_sqr_grad, scale_by_debiased_rms, sgd_step, lr=lr, sqr_mom=sqr_mom, eps=eps
    )
    return schedule_free(inner, mom=mom, wd=wd)


def schedule_free_sgd(lr: float = 1.0, mom: float = 0.9, wd: float = 0.0) -> ScheduleFree:
    """SGD with schedule-free averaging in the place of momentum. `wd` is an L2 penalty where the
    gradient is taken.

    Source: Defazio et al. 2024; numbers of schedulefree.SGDScheduleFree without warm-up.

    >>> schedule_free_sgd(lr=0.5).hyper
    {'lr': 0.5, 'mom': 0.9, 'wd': 0.0, 'lr_power': 2.0}
    """
    return schedule_free(chain(sgd_step, lr=lr), mom=mom, wd=wd)


@elementwise
def scale_by_debiased_rms(
    update: Tensor, sqr_avg: Tensor, *, step: Tensor, sqr_mom: float = 0.99, eps: float = 1e-8
) -> dict[str, Tensor]:
    """scale_by_rms with debias for the squares alone, so that the chain has no `mom`.

    update = update / (sqrt(sqr_avg / (1 - sqr_mom**step)) + eps)

    >>> scale_by_debiased_rms(torch.tensor([4.0]), torch.tensor([8.0]), step=torch.tensor(1), sqr_mom=0.5, eps=0.0)
    {'update': tensor([1.])}
    """
    return dict(update=update / (root(sqr_avg / (1 - sqr_mom**step)) + eps))
