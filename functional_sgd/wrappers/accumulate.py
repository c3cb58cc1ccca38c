"""Accumulate: gather gradients over several calls, and step along their mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from functional_sgd.call import here
from functional_sgd.hyper import Hyper
from functional_sgd.optimizer import Optimizer
from functional_sgd.precision import widest
from functional_sgd.ranges import Range
from functional_sgd.state import State, check_state, device_of, in_order_of
from functional_sgd.tracing import known
from functional_sgd.tree import Tree, flatten, flatten_like, unflatten
from functional_sgd.wiring import CALLS
from functional_sgd.wrappers.wrapper import (
    INNER,
    Wrapper,
    choose,
    choose_leaf,
    no_calls,
    one_number,
    take_grads,
    wide,
)


@dataclass(frozen=True, repr=False)
class Accumulate(Wrapper):
    """An optimizer that acts on every k-th call; `accumulate` makes one."""

    every: int = 1

    name: ClassVar[str] = "accumulate"
    own_hypers: ClassVar[Mapping[str, Range]] = {"every": Range(1, whole=True)}
    needs_old: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if "value_fn" in self.opt.names:
            raise ValueError(
                f"accumulate: {self.opt!r} reads 'value_fn', the loss as a function of the params, "
                f"which would be that of the last piece alone. Expected an optimizer that does "
                f"without; give this one all pieces at once."
            )

    @property
    def entries(self) -> tuple[str, ...]:
        """The entries of the state."""
        values = ("value_sum",) if "value" in self.opt.names else ()
        return (CALLS, "gathered", "given", "grad_sum", *values, INNER)

    def init(self, params: Tree) -> State:
        """A fresh state: nothing is gathered, and the optimizer inside has not acted.

        What is counted of a window stays on the CPU: so the host knows which calls act, without
        waiting for a device, and does nothing more in the others.
        """
        leaves, spec = flatten(params)
        device = device_of(leaves)
        first: State = {
            CALLS: no_calls(params),
            "gathered": torch.zeros((), dtype=torch.int64, device="cpu"),
            "given": torch.zeros(len(leaves), dtype=torch.int64, device="cpu"),
            "grad_sum": unflatten(spec, [torch.zeros_like(wide(leaf)) for leaf in leaves]),
            "value_sum": torch.zeros((), dtype=widest(device), device=device),
            INNER: self.opt.init(params),
        }
        return {name: first[name] for name in self.entries}

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Hyper] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One call: (params, new state), with new params if it is the k-th."""
        check_state(self.name, state, self.entries)
        own, others, extras = self.take_own(hyper, extras)
        leaves, grads_now, spec = take_grads(self.name, params, grads)
        old = flatten_like(spec, state["grad_sum"], params, self.name, "state['grad_sum']")
        sums = _added(old, grads_now)
        present = [grad is not None for grad in grads_now]
        there = torch.tensor(present, dtype=torch.bool, device="cpu")
        counted = in_order_of(spec, state["given"], state["grad_sum"])
        given = counted + there.to(torch.int64)
        gathered = state["gathered"] + 1
        values = self._values(state, {**others, **extras})
        calls = state[CALLS] + 1
        # Not only when it is equal: `every` may be lower now than when the window began.
        act = gathered >= own["every"]
        says = known(act)
        # Where derivatives are tracked, they are to be there on every call, if only as zeros.
        free = known(act, lambda: (*leaves, *grads_now, *values.values(), *flatten(others)[0]))
        if says is False and free is not None:  # the optimizer need not be asked
            grad_sum = unflatten(spec, sums)
            kept = {"gathered": gathered, "given": given, "grad_sum": grad_sum, **values}
            # The same tensors in dicts of their own: whoever changes the new state does not change
            # the old.
            inner = choose(act, state[INNER], state[INNER])
            return unflatten(spec, leaves), {CALLS: calls, **kept, INNER: inner}
        if says is None:  # while a program is recorded, nobody can look
            active, taken = there, present
        else:
            active = given > 0
            taken = active.tolist()
        window = torch.maximum(gathered, given).unbind()  # longer for a leaf that had to wait
        means = unflatten(spec, _means(sums, window, taken))
        if values:
            others = {name: value for name, value in others.items() if name != "value"}
            extras = {**extras, "value": values["value_sum"] / gathered}
        moved, inner = self.opt(params, means, state[INNER], others, **extras)
        kept_sums = []
        for total, is_taken in zip(sums, taken, strict=True):
            if is_taken:
                kept_sums.append(choose_leaf(act, torch.zeros_like(total), total))
            else:
                kept_sums.append(total)
        return choose(act, moved, params), {
            CALLS: calls,
            "gathered": torch.where(act, 0, gathered),
            "given": torch.where(act & active, 0, given),
            "grad_sum": unflatten(spec, kept_sums),
            **{n: choose_leaf(act, torch.zeros_like(one), one) for n, one in values.items()},
            INNER: choose(act, inner, state[INNER]),
        }

    def _values(self, state: State, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """The sum of the losses, this one included, as an entry of the state; none if the optimizer
        reads no loss.
        """
        if "value_sum" not in state:
            return {}
        value = given.get("value", self.opt.hyper.get("value"))
        if value is None:
            raise ValueError(
                f"accumulate: {self.opt!r} reads 'value', the loss, of which it gets the mean, but "
                f"this call has none. Pass that of each piece: opt(..., value=loss)."
            )
        loss = one_number(self.name, "value", value)
        total: Tensor = state["value_sum"]
        return {"value_sum": total + here(loss, total.device)}


def accumulate(opt: Optimizer, every: int) -> Accumulate:
    """The optimizer, acting on every `every`-th call, along the mean of the gradients since then.

    mean = (g_1 + g_2 + ... + g_every) / every, summed in that order (in float32 for half-precision
    parameters); a gradient that is None counts as 0

    On the other calls params come back with the same bits and the state inside stays. A larger
    batch in pieces of equal size: for losses that are means, `every` pieces give what one step on
    all of it gives. `every` is a hyper, so it can be changed at a call or scheduled. A leaf that
    had no gradient in any of the calls is left alone.

    An optimizer that reads the loss (`value`: polyak_sgd, momo) gets the mean of those of the
    calls; give every call its own. Columns and other extras (`hessian`) are those of the call that
    acts: give it their means.

    It compiles and can be mapped over: then the step inside is computed on every call, and a leaf
    whose gradient is None in the very call that acts waits for the next one.

    Raises ValueError if every < 1, or if `opt` overwrites its arguments or reads `value_fn`, the
    loss as a function of the params.

    >>> import torch
    >>> from functional_sgd import sgd
    >>> opt, params = accumulate(sgd(lr=1.0), every=2), torch.tensor([5.0])
    >>> params, state = opt(params, torch.tensor([1.0]), opt.init(params))
    >>> params, state = opt(params, torch.tensor([3.0]), state)
    >>> params, state["calls"], state["inner"]["step"]
    (tensor([3.]), tensor(2), tensor([1]))
    """
    return Accumulate(opt, every)


def _added(sums: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The sums with these gradients."""
    found = []
    for total, grad in zip(sums, grads, strict=True):
        if grad is None:
            found.append(total)
        else:
            # In the dtype of the sum: a gradient of higher precision does not widen the state.
            found.append(total + grad.to(total.dtype))
    return found


def _means(
    sums: Sequence[Tensor], counts: Sequence[Tensor], taken: Sequence[bool]
) -> list[Tensor | None]:
    """The mean gradient of each leaf that is to be stepped."""
    found: list[Tensor | None] = []
    for total, count, is_taken in zip(sums, counts, taken, strict=True):
        if is_taken:
            found.append(total / count)
        else:
            found.append(None)
    return found
