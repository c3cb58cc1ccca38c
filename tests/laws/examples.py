"""Random optimizers, trees and calls, for the law of fused steps."""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from hypothesis import strategies as st
from torch import Tensor

import functional_sgd as fs
from functional_sgd import Chain, Optimizer, Rule, all_finite, chain, elementwise, leafwise, rename
from functional_sgd.reduction import largest
from tests.catalogue import OPTIMIZERS, halves
from tests.functional_sgd.fusion.helpers import draw

Tree = Any
LARGE = 17_000  # elements: from some 16,000 on, pure results share memory that is used again

# Optimizers.


@elementwise
def jitter(grad: Tensor, *, key: Any, noise: float = 0.01) -> dict[str, Tensor]:
    """Random numbers, which depend on the order of elements."""
    return dict(grad=grad + noise * fs.normal(key, grad) + noise * fs.uniform(key, grad, draw=1))


@elementwise(peak=0.0)
def relative_to_peak(
    update: Tensor,
    *,
    peak: Tensor,
    top: Tensor = largest(lambda update: update.abs(), over="tree"),
    fine: Tensor = all_finite("update"),
) -> dict[str, Tensor]:
    """Numbers of the tree, and one that is kept."""
    peak = torch.where(top > peak, top, 0.9 * peak)
    return dict(update=torch.where(fine == 0, 0.0, update / (1 + peak)), peak=peak)


@leafwise(rows=lambda param: param.new_zeros(param.shape[0] if param.dim() else 1))
def by_row(update: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """A matrix rule with a slot of another shape, which torch runs."""
    if update.dim() < 2 or not update.numel():
        return dict(update=update, rows=1.0 * rows)
    rows = 0.5 * rows + update.flatten(1).abs().amax(1)
    return dict(update=update / (1 + rows.reshape(-1, *[1] * (update.dim() - 1))), rows=rows)


@elementwise(last_update=torch.zeros_like)
def delay(update: Tensor, last_update: Tensor) -> dict[str, Tensor]:
    """With the update of the step before: what a slot was is read, and it is overwritten."""
    return dict(update=0.5 * (update + last_update), last_update=update)


@leafwise(last_grad=torch.zeros_like)
def remember(grad: Tensor, last_grad: Tensor) -> dict[str, Tensor]:
    """A rule by torch that keeps the very tensor that it is given."""
    return dict(last_grad=grad)


def _again(rule: Rule, **names: str) -> Rule:
    return rename(rule, **names)


POOL: tuple[Rule, ...] = (
    fs.clip_norm, fs.clip_value, fs.centralize, fs.l2_reg, fs.weight_decay, fs.dampen,
    fs.average_grad, fs.heavy_ball, fs.sign_of_average, fs.nesterov, fs.average_sqr_grad, fs.center,
    fs.debias, fs.quasi_hyperbolic, fs.scale_by_rms, fs.scale_by_rms_eps_inside, fs.rectify,
    fs.rectify_eps_early, fs.rectify_softplus, fs.trust_ratio, fs.larc_ratio, fs.lars_ratio,
    fs.sync_slow_params, jitter, relative_to_peak, by_row, delay, remember,
    _again(fs.clip_norm, grad="update", max_norm="max_update"),
    _again(fs.clip_value, grad="update", max_value="max_step"),
    _again(fs.centralize, grad="update"),
    _again(fs.heavy_ball, grad="update", velocity="second_velocity"),
    _again(fs.average_grad, grad="update", grad_avg="slow_avg", mom="slow_mom"),
    _again(fs.clip_norm, grad="param", max_norm="max_param"),
)  # fmt: skip

DEFAULTS = dict(
    lr=0.1, wd=0.1, mom=0.9, sqr_mom=0.99, eps=1e-8, max_norm=1.0, max_update=0.5, max_step=0.7,
    max_param=5.0, slow_mom=0.5, sync_every=2, trust_coeff=0.02,
)  # fmt: skip


def chain_of(rules: tuple[Rule, ...], step_at: int) -> Chain:
    """Those of the rules, in this order, that `chain` accepts; one is the step."""
    kept: list[Rule] = [fs.sgd_step]
    for number, rule in enumerate(rules):
        place = len(kept) if number >= step_at else kept.index(fs.sgd_step)
        tried = [*kept[:place], rule, *kept[place:]]
        if _accepted(tried):
            kept = tried
    return _chain(kept)


def _chain(rules: list[Rule]) -> Chain:
    read = {rule.outer(name) for rule in rules for name in rule.scalars}
    return chain(*rules, **{name: value for name, value in DEFAULTS.items() if name in read})


def _accepted(rules: list[Rule]) -> bool:
    try:
        _chain(rules)
    except ValueError:
        return False
    return True


CHAINED: dict[str, Callable[[], Optimizer]] = {
    "clip, partition": lambda: chain(fs.clip_norm, halves(), max_norm=0.5),
    "partition, sync": lambda: chain(halves(), fs.sync_slow_params, sync_every=2),
    "decay, centralize, partition": lambda: chain(fs.l2_reg, fs.centralize, halves(), wd=0.1),
}

random_chains = st.builds(
    chain_of,
    st.lists(st.sampled_from(POOL), max_size=7).map(tuple),
    st.integers(1, 7),
)
known = st.sampled_from(sorted({**OPTIMIZERS, **CHAINED}))
optimizers = random_chains | known.map(lambda name: {**OPTIMIZERS, **CHAINED}[name]())


# Trees.

REALS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def turned(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """With the axes in memory in reverse order."""
    return draw(shape[::-1], dtype, seed).permute(tuple(reversed(range(len(shape)))))


def channels_last(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """An image as convolutions like it; anything else is dense."""
    dense = draw(shape, dtype, seed)
    return dense.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else dense


def offset(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """In the middle of a buffer, at no round address."""
    return draw((torch.Size(shape).numel() + 3,), dtype, seed)[3:].view(shape)


def strided(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Every other element of a buffer."""
    return draw((*shape, 2), dtype, seed)[..., 1]


def part(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Some columns of a larger matrix."""
    if not shape:
        return draw(shape, dtype, seed)
    return draw((*shape[:-1], shape[-1] + 2), dtype, seed)[..., : shape[-1]]


def expanded(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """One number, everywhere."""
    return draw((1,) * len(shape), dtype, seed).expand(shape)


LAYOUTS: dict[str, Callable[[tuple[int, ...], torch.dtype, int], Tensor]] = {
    "dense": draw,
    **{f.__name__: f for f in (turned, channels_last, offset, strided, part, expanded)},
}

OF_PARAMS = [name for name in LAYOUTS if name != "expanded"]

SHAPES = [(), (0,), (1,), (5,), (3, 4), (4, 3), (2, 0, 3), (2, 3, 4, 5), (1, 7), (LARGE,)]

SCALES = {"one": 1.0, "small": 1e-4, "large": 1e3, "zero": 0.0, "inf": 1.0, "nan": 1.0}


@dataclass(frozen=True)
class Leaf:
    """A parameter and its gradient."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    grad: str | None  # the layout of the gradient; None for no gradient
    grad_dtype: torch.dtype
    tied: bool  # whether it has the gradient of the leaf before it, if that fits
    scale: str


@st.composite
def leaves(pick: Any) -> Leaf:
    """A leaf of any kind."""
    dtype = pick(st.sampled_from([torch.float32, torch.float32, *REALS, torch.complex64]))
    grad_dtype = dtype
    if not dtype.is_complex and pick(st.integers(0, 5)) == 0:
        grad_dtype = pick(st.sampled_from(REALS))
    return Leaf(
        pick(st.sampled_from(SHAPES)),
        dtype,
        pick(st.sampled_from(["dense", "dense", *OF_PARAMS])),
        pick(st.sampled_from(["dense", "dense", *LAYOUTS, None])),
        grad_dtype,
        pick(st.integers(0, 4)) == 0,
        pick(st.sampled_from(["one", "one", "one", *SCALES])),
    )


@st.composite
def usual_leaves(pick: Any) -> tuple[Leaf, ...]:
    """Leaves of one dtype, dense and all with gradients: trees that are recognised again."""
    dtype, count = pick(st.sampled_from(REALS)), pick(st.integers(1, 3))
    return tuple(
        Leaf(
            pick(st.sampled_from(SHAPES)),
            dtype,
            pick(st.sampled_from(["dense", "channels_last", "offset"])),
            pick(st.sampled_from(["dense", "dense", *LAYOUTS])),
            dtype,
            pick(st.integers(0, 4)) == 0,
            "one",
        )
        for _ in range(count)
    )


trees = usual_leaves() | st.lists(leaves(), min_size=1, max_size=4).map(tuple)

BUILT: dict[str, Callable[[list[Any]], Tree]] = {
    "list": list,
    "dict": lambda values: {f"p{number}": value for number, value in enumerate(values)},
    "nested": lambda values: {"a": tuple(values[:2]), "b": [{"c": v} for v in values[2:]]},
}


@dataclass(frozen=True)
class Call:
    """Some steps on one tree."""

    leaves: tuple[Leaf, ...]
    built: str
    seed: int
    mode: str  # in MODES
    tracked: str | None  # which tensors are: "params", "grads", "state"
    hyper: str  # in HYPERS
    steps: int

    def params(self) -> Tree:
        """New parameters."""
        made = [
            LAYOUTS[leaf.layout](leaf.shape, leaf.dtype, self.seed + number)
            for number, leaf in enumerate(self.leaves)
        ]
        return BUILT[self.built](made)

    def grads(self, step: int) -> Tree:
        """New gradients; the same for the same step."""
        made: list[Tensor | None] = []
        before = None
        for number, leaf in enumerate(self.leaves):
            grad = None
            if leaf.grad is not None:
                grad = LAYOUTS[leaf.grad](leaf.shape, leaf.grad_dtype, 1000 + self.seed + number)
                grad = _scaled(grad, leaf.scale, 1 + step)
            if leaf.tied and before is not None and grad is not None:
                fits = before.shape == leaf.shape and before.is_complex() == leaf.dtype.is_complex
                grad = before if fits else grad
            made.append(grad)
            before = grad
        return BUILT[self.built](made)

    def context(self) -> AbstractContextManager[Any]:
        """Where the steps are taken."""
        return MODES[self.mode]()


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}

VALUES = dict(
    lr=(0.0, 0.003, 0.5), wd=(0.0, 0.3), mom=(0.0, 0.5), sqr_mom=(0.5, 0.9), eps=(1e-3, 0.1),
    max_norm=(0.1, 10.0), max_value=(0.2, 5.0), max_update=(0.01, 3.0), trust_coeff=(0.1, 1.0),
    max_trust=(0.5, 3.0), slow_step=(0.1, 1.0), noise=(0.0, 0.1), beta=(1.0, 10.0),
)  # fmt: skip

HYPERS = ("none", "number", "tensor", "by leaf", "tensors by leaf", "some by leaf")


def hyper_of(call: Call, opt: Optimizer, params: Tree) -> dict[str, Any]:
    """Hypers of the kind that the call has."""
    names = [name for name in VALUES if name in opt.hyper]
    by_leaf = isinstance(opt, Chain) and not _keeps_numbers(opt)
    kind = call.hyper if by_leaf or "by leaf" not in call.hyper else "tensor"
    if kind == "none" or not names:
        return {}
    chosen = [name for place, name in enumerate(names) if (call.seed >> place) % 2]
    found = {}
    for name in chosen:
        allowed = opt.plan.ranges.get(name, ()) if isinstance(opt, Chain) else ()
        fitting = [one for one in VALUES[name] if all(one in each for each in allowed)]
        values = itertools.cycle(fitting)
        number = next(values)
        if kind == "number":
            found[name] = number
        elif kind == "tensor":
            found[name] = torch.tensor(number)
        else:
            tensors = kind == "tensors by leaf" or (kind == "some by leaf" and call.seed % 2)
            found[name] = optree.tree_map(
                lambda _, values=values, tensors=tensors: (
                    torch.tensor(next(values)) if tensors else next(values)
                ),
                params,
            )
    return found


def _keeps_numbers(opt: Chain) -> bool:
    return any(rule.numbers or rule.scope == "treewise" for rule in opt.rules)


@st.composite
def calls(pick: Any, steps: int = 1) -> Call:
    """A call on a tree."""
    return Call(
        pick(trees),
        pick(st.sampled_from(sorted(BUILT))),
        pick(st.integers(0, 255)),
        pick(st.sampled_from(["plain", "plain", *MODES])),
        pick(st.sampled_from([None, None, None, "params", "grads", "state"])),
        pick(st.sampled_from(HYPERS)),
        steps,
    )


@st.composite
def calls_like(pick: Any, call: Call) -> Call:
    """Another call on a tree that differs from this one in a few things only, or in none."""
    changed = list(call.leaves)
    if pick(st.booleans()):
        place = pick(st.integers(0, len(changed) - 1))
        leaf, what = changed[place], pick(st.sampled_from(["layout", "grad", "dtype"]))
        if what == "layout":
            leaf = replace(leaf, layout=pick(st.sampled_from(OF_PARAMS)))
        if what == "grad":
            leaf = replace(leaf, grad=pick(st.sampled_from([*LAYOUTS, None])))
        if what == "dtype" and not leaf.dtype.is_complex:
            leaf = replace(leaf, dtype=pick(st.sampled_from(REALS)))
        changed[place] = leaf
    return replace(pick(calls()), leaves=tuple(changed), built=call.built)


@dataclass(frozen=True)
class Example:
    """An optimizer, what it is called with before, and the call that counts."""

    opt: Optimizer
    history: tuple[Call, ...]
    last: Call


@st.composite
def examples(pick: Any) -> Example:
    """An example."""
    last = pick(calls(steps=2))
    count = pick(st.integers(0, 3))
    before = calls_like(last) | calls_like(last) | calls()
    history = [pick(before) for _ in range(count)]
    return Example(pick(optimizers), tuple(history), last)


def twin(tree: Tree) -> Tree:
    """The same numbers, laid out alike in other memory; not tracked."""

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        memory = leaf.detach().untyped_storage().clone()
        empty = torch.empty(0, dtype=leaf.dtype)
        return empty.set_(memory, leaf.storage_offset(), leaf.shape, leaf.stride())

    return optree.tree_map(copy, tree)


def _scaled(grad: Tensor, scale: str, factor: float) -> Tensor:
    """The gradient times a number that every dtype holds exactly, in the layout it has."""
    with torch.no_grad():
        memory = torch.empty(0, dtype=grad.dtype).set_(grad.untyped_storage())
        memory.mul_(SCALES[scale] * factor)
        if scale in ("inf", "nan") and memory.numel():
            memory[-1] = float(scale)
    return grad
