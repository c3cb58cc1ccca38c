"""L-BFGS: Newton's method with a curvature that is remembered from the last few steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sgd.autodiff import value_and_grad
from functional_sgd.hyper import Hyper
from functional_sgd.optimizer import Optimizer, check_names
from functional_sgd.pairs import as_complex, as_real
from functional_sgd.ranges import Range, check_number
from functional_sgd.state import State, check_state, working_dtype
from functional_sgd.tree import Spec, Tree, flatten, flatten_like, paths, unflatten
from functional_sgd.wiring import CALLS
from functional_sgd.wrappers.wrapper import no_calls, take_grads

ENOUGH_DESCENT, ENOUGH_FLATTER = 1e-4, 0.9  # the constants of the strong Wolfe conditions
LEAST_CURVATURE = 1e-10  # a pair with less is not remembered

SLOTS = ("steps", "count", "grad_changes", "moves", "direction", "length", "last_grad")


class Point(NamedTuple):
    """A point on the line that is searched."""

    at: float  # how many directions from the start
    value: float
    slope: float  # along the direction
    grad: Tensor


@dataclass(frozen=True)
class LBFGS(Optimizer):
    """An optimizer that keeps the last changes of params and gradient; `lbfgs` makes one."""

    lr: float = 1.0
    history: int = 10
    line_search: bool = True
    max_evals: int = 25
    grad_tolerance: float = 1e-7
    step_tolerance: float = 1e-9

    def __post_init__(self) -> None:
        check_number("lbfgs", "lr", self.lr, Range(0))
        for name in ("history", "max_evals"):
            if getattr(self, name) < 1:
                raise ValueError(f"lbfgs: {name} must be at least 1, got {getattr(self, name)}.")

    @property
    def hyper(self) -> dict[str, Hyper]:
        """The rate; without a search, the length of every step but the first."""
        return {"lr": self.lr}

    @property
    def required(self) -> tuple[str, ...]:
        """The loss as a function of the params, if a line is to be searched."""
        return ("value_fn",) if self.line_search else ()

    @property
    def names(self) -> frozenset[str]:
        """Every hyper and extra that is understood."""
        if self.line_search:
            return frozenset({"lr", "value", "value_fn"})
        return frozenset({"lr"})

    @property
    def traceable(self) -> bool:
        """How often the loss is computed depends on its values."""
        return False

    def init(self, params: Tree) -> State:
        """A fresh state: nothing is remembered."""
        flat = torch.zeros_like(_flat(flatten(params)[0]))
        # On the CPU, since the host branches on these numbers at every step.
        number = torch.zeros((), dtype=torch.int64, device="cpu")
        return {
            CALLS: no_calls(params),
            "steps": number,
            "count": number.clone(),
            "grad_changes": flat.new_zeros(self.history, len(flat)),
            "moves": flat.new_zeros(self.history, len(flat)),
            "direction": flat,
            "length": torch.zeros((), dtype=torch.float64, device="cpu"),
            "last_grad": flat.clone(),
        }

    def extend(self, state: State, before: Tree, params: Tree) -> State:
        """The state for more params: what was remembered of fewer is of no use."""
        return state if paths(before) == paths(params) else self.init(params)

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Hyper] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step: (new params, new state)."""
        check_state("lbfgs", state, (CALLS, *SLOTS))
        hyper = check_names("lbfgs", hyper, extras, self.names)
        given = {**hyper, **extras}
        lr = given.get("lr", self.lr)
        check_number("lbfgs", "lr", lr, Range(0))
        leaves, slopes, spec = take_grads("lbfgs", params, grads).dense()
        if self.line_search and "value_fn" not in given:
            raise ValueError(
                "lbfgs: needs the loss as a function of the params: opt(..., value_fn=loss). "
                "fit passes it; lbfgs(line_search=False) does without."
            )
        with torch.no_grad():
            moved, kept = self._step(leaves, slopes, spec, state, float(lr), given)
        return moved, {CALLS: state[CALLS] + 1, **kept}

    def _step(
        self,
        leaves: list[Tensor],
        slopes: Sequence[Tensor | None],
        spec: Spec,
        state: State,
        lr: float,
        given: Mapping[str, Any],
    ) -> tuple[Tree, State]:
        kept = {name: state[name] for name in SLOTS}
        grad = _flat(_with_zeros(leaves, slopes))
        if not len(grad) or grad.abs().max() <= self.grad_tolerance:
            return unflatten(spec, leaves), kept
        kept |= self._remembered(state, grad)
        first = int(state["steps"]) == 0
        direction = -grad if first else _newton(kept, grad)
        # Remembered curvature would also move a leaf that has no gradient in this step.
        has_grad = []
        for leaf, own in zip(leaves, slopes, strict=True):
            has_grad.append(torch.full_like(leaf, own is not None))
        direction = direction * _flat(has_grad)
        slope = float(grad.dot(direction))
        length = lr
        if first:
            # Without any curvature yet, start with a move whose 1-norm is at most lr, as
            # torch.optim.LBFGS does.
            length = min(1.0, 1 / float(grad.abs().sum())) * lr
        # A length of 0 also keeps the next step from remembering this one.
        if slope > -self.step_tolerance:  # nowhere to go
            length, where = 0.0, unflatten(spec, leaves)
        else:
            line = _Line(leaves, spec, direction)
            if self.line_search:
                length = self._search(line, given, length, slope, grad)
            where = line.params(length)
        return where, {
            **kept,
            "steps": state["steps"] + 1,
            "direction": direction,
            "length": torch.tensor(length, dtype=torch.float64, device="cpu"),
            "last_grad": grad,
        }

    def _remembered(self, state: State, grad: Tensor) -> State:
        """The history with the step before this one, if the loss was curved along it."""
        move = state["direction"] * float(state["length"])
        change = grad - state["last_grad"]
        # "not >" also rejects NaN.
        if int(state["steps"]) == 0 or not change.dot(move) > LEAST_CURVATURE:
            return {}
        count = int(state["count"])
        first = int(count == self.history)
        return {
            "count": torch.clamp(state["count"] + 1, max=self.history),
            "grad_changes": _inserted(state["grad_changes"], change, count, first),
            "moves": _inserted(state["moves"], move, count, first),
        }

    def _search(
        self, line: "_Line", given: Mapping[str, Any], length: float, slope: float, grad: Tensor
    ) -> float:
        """How far to go along the line."""
        value_fn = given["value_fn"]
        value = given["value"] if "value" in given else value_fn(line.params(0.0))
        compute = value_and_grad(value_fn)

        def evaluate(at: float) -> Point:
            loss, found = compute(line.params(at))
            slopes = flatten_like(line.spec, found, found, "lbfgs", "grads")
            there = _flat(_with_zeros(line.leaves, slopes))
            return Point(at, float(loss), float(there.dot(line.direction)), there)

        start = Point(0.0, float(value), slope, grad)
        # The tolerance is in units of params, places on the line are in units of the direction.
        least = self.step_tolerance / float(line.direction.abs().max())
        return strong_wolfe(evaluate, start, length, self.max_evals, least).at


def lbfgs(
    lr: float = 1.0,
    history: int = 10,
    line_search: bool = True,
    max_evals: int = 25,
    grad_tolerance: float = 1e-7,
    step_tolerance: float = 1e-9,
) -> LBFGS:
    """Newton's method with the curvature of the last `history` steps, for losses without noise.

    param = param - length * H grad;  H is the inverse of the Hessian, as far as it is known from
    pairs (s, y): how params and gradient changed in a step, if s . y > 1e-10

    H starts as (s . y / y . y) times the identity for the last pair, and the first step goes along
    the gradient. `length` is searched for, from lr on, until the strong Wolfe conditions hold:
    there the loss is lower, by 1e-4 of what the slope promised, and the slope is 0.9 times as steep
    or less. The search asks for `value_fn`, a function params -> loss (and takes the loss here as
    `value`, to save one evaluation); `fit` passes both. It ends after `max_evals` further
    evaluations. With `line_search=False` the length is lr, and nothing but gradients is read.

    One call is one step: torch's LBFGS takes max_iter = 20 of them in one. Nothing moves where no
    gradient is above `grad_tolerance`, or the slope is not below -step_tolerance. All leaves are
    one vector; the state has 2 * history vectors. It decides by numbers, so it cannot be traced,
    mapped over or differentiated. A change of the batch changes the function that it remembers: use
    batches that are all of the data, or large.

    Raises ValueError without `value_fn`. Source: Nocedal 1980; Nocedal and Wright 2006, algorithms
    7.5 and 3.5; numbers of torch.optim.LBFGS(line_search_fn="strong_wolfe"), whose history_size is
    100.

    >>> import torch
    >>> from functional_sgd import value_and_grad
    >>> def loss(x):
    ...     return (x[0] - 1) ** 2 + 10 * (x[1] - x[0] ** 2) ** 2
    >>> opt, params = lbfgs(), torch.tensor([-1.0, 1.0], dtype=torch.float64)
    >>> state = opt.init(params)
    >>> for _ in range(25):
    ...     value, grads = value_and_grad(loss)(params)
    ...     params, state = opt(params, grads, state, value=value, value_fn=loss)
    >>> params
    tensor([1.0000, 1.0000], dtype=torch.float64)
    """
    return LBFGS(lr, history, line_search, max_evals, grad_tolerance, step_tolerance)


def strong_wolfe(
    evaluate: Callable[[float], Point], start: Point, first: float, limit: int, least: float
) -> Point:
    """A point at which the strong Wolfe conditions hold, or the best after `limit` evaluations.

    First go on, from `first`, until a stretch of the line must have such a point; then narrow it,
    down to `least`.
    """

    def too_high(point: Point) -> bool:
        # "not <=" also holds for NaN, from which the search must come back.
        return not point.value <= start.value + ENOUGH_DESCENT * point.at * start.slope

    def flat_enough(point: Point) -> bool:
        return abs(point.slope) <= -ENOUGH_FLATTER * start.slope

    before, point, tries = start, evaluate(first), 0
    while tries < limit:
        # Values are compared from the third point on, as in torch.optim.LBFGS; Nocedal and Wright
        # begin with the second.
        if too_high(point) or (tries > 1 and point.value >= before.value):
            break
        if flat_enough(point):
            return point
        if point.slope >= 0:
            break
        # The bounds of torch.optim.LBFGS, so that the numbers agree.
        low, high = point.at + 0.01 * (point.at - before.at), 10 * point.at
        before, point = point, evaluate(_lowest(before, point, low, high))
        tries += 1
    else:
        # No bracket within the limit: the better of the start and the last point is returned.
        before = start
    ends = [before, point]
    best = _lower(ends)
    cramped = False
    while tries < limit and abs(ends[1].at - ends[0].at) >= least:
        left, right = sorted(end.at for end in ends)
        at, cramped = _inside(_lowest(ends[0], ends[1], left, right), left, right, cramped)
        point = evaluate(at)
        tries += 1
        if too_high(point) or point.value >= ends[best].value:
            ends[1 - best] = point
            best = _lower(ends)
            continue
        if flat_enough(point):
            return point
        # The line rises towards the far end, so the minimum lies between this point and the old
        # best.
        if point.slope * (ends[1 - best].at - ends[best].at) >= 0:
            ends[1 - best] = ends[best]
        ends[best] = point
    return ends[best]


def _lower(ends: list[Point]) -> int:
    """Which of two points is lower: the first of equal ones, and of a number and NaN the number."""
    one, other = ends
    return int(other.value < one.value or math.isnan(one.value))


def _inside(at: float, left: float, right: float, cramped: bool) -> tuple[float, bool]:
    """(the place, away from the ends if it was near one of them twice, whether it is near one)."""
    margin = 0.1 * (right - left)
    if min(right - at, at - left) >= margin:
        return at, False
    if not cramped and left < at < right:
        return at, True
    if abs(at - right) < abs(at - left):
        return right - margin, False
    return left + margin, False


def _lowest(one: Point, other: Point, low: float, high: float) -> float:
    """Where the cubic through two points, with their slopes, is lowest in [low, high]."""
    left, right = (one, other) if one.at <= other.at else (other, one)
    secant = 3 * (left.value - right.value) / (left.at - right.at)
    middle = left.slope + right.slope - secant
    square = middle * middle - left.slope * right.slope
    # Without a real root the cubic has no minimum, and the middle is taken.
    if square >= 0:
        width, bend = right.at - left.at, math.sqrt(square)
        below = right.slope - left.slope + 2 * bend
        if below:
            place = right.at - width * ((right.slope + bend - middle) / below)
            if math.isfinite(place):
                return min(max(place, low), high)
    return (low + high) / 2


class _Line:
    """The points params + at * direction."""

    def __init__(self, leaves: list[Tensor], spec: Spec, direction: Tensor) -> None:
        self.leaves, self.spec, self.direction = leaves, spec, direction

    def params(self, at: float) -> Tree:
        """The tree at this place."""
        moved, start = [], 0
        for leaf in self.leaves:
            real = as_real(leaf)
            part = self.direction[start : start + real.numel()].view(real.shape).to(real.device)
            wide = real.to(working_dtype(real))
            new = (wide + at * part.to(wide.dtype)).to(real.dtype)
            moved.append(as_complex(new, leaf))
            start += real.numel()
        return unflatten(self.spec, moved)


def _newton(kept: State, grad: Tensor) -> Tensor:
    """Minus the inverse Hessian, as far as it is remembered, times the gradient."""
    count = int(kept["count"])
    pairs = list(zip(kept["moves"][:count], kept["grad_changes"][:count], strict=True))
    if not pairs:
        return -grad
    # The two loops of algorithm 7.4 in Nocedal and Wright: from the last pair to the first, and
    # back.
    shares = [1 / change.dot(move) for move, change in pairs]
    result: Tensor = -grad
    sizes: list[Tensor] = []
    for (move, change), share in zip(pairs[::-1], shares[::-1], strict=True):
        sizes.append(move.dot(result) * share)
        result = result - sizes[-1] * change
    move, change = pairs[-1]
    result = result * (change.dot(move) / change.dot(change))
    for (move, change), share, size in zip(pairs, shares, sizes[::-1], strict=True):
        result = result + (size - change.dot(result) * share) * move
    return result


def _inserted(rows: Tensor, row: Tensor, count: int, first: int) -> Tensor:
    """The rows with one more: at `count`, after the first has gone if there is no room."""
    return torch.cat([rows[first:count], row[None], rows[count + 1 :]])


def _with_zeros(leaves: list[Tensor], slopes: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients, with zeros where there is none."""
    found = []
    for leaf, slope in zip(leaves, slopes, strict=True):
        if slope is None:
            found.append(torch.zeros_like(leaf))
        else:
            found.append(slope)
    return found


def _flat(leaves: list[Tensor]) -> Tensor:
    """All leaves as one vector, where the first of them is."""
    if not leaves:
        # torch.cat needs at least one tensor.
        return torch.zeros(0)
    real = list(map(as_real, leaves))
    wide = [leaf.reshape(-1).to(working_dtype(leaf)) for leaf in real]
    any_double = any(one.dtype == torch.float64 for one in wide)
    dtype = torch.float64 if any_double else torch.float32
    return torch.cat([one.to(wide[0].device, dtype) for one in wide])
