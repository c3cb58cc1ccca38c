"""The field's optimizers, written as a user would: chains of small rules, no closures, no state.

Each is compared, in float64, with a plain loop over the leaves that follows its paper.
"""

import ast
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import (
    Optimizer,
    Rule,
    chain,
    elementwise,
    fuse,
    leafwise,
    norm,
    normal,
    partition,
)
from tests.comparing import assert_close

STEPS = 12


@elementwise
def clip(grad, *, grad_norm=norm("grad", over="tree"), max_norm=1.0):
    return dict(grad=grad * (max_norm / (grad_norm + 1e-6)).clamp(max=1.0))


@elementwise
def lamb_ratio(param, update, *, size=norm("param"), length=norm("update")):
    ratio = torch.where((size > 0) & (length > 0), size / length, 1.0)
    return dict(update=ratio * update)


@leafwise
def clip_units(param, grad, *, clipping=0.01, eps=1e-3):
    axes = tuple(range(1, param.dim()))
    size = param.square().sum(axes, keepdim=True).sqrt() if axes else param.abs()
    slope = grad.square().sum(axes, keepdim=True).sqrt() if axes else grad.abs()
    longest = clipping * size.clamp(min=eps)
    return dict(grad=torch.where(slope > longest, grad * longest / slope.clamp(min=1e-6), grad))


@elementwise(curvature=torch.zeros_like)
def average_curvature(hessian, curvature, *, sqr_mom=0.99):
    return dict(curvature=sqr_mom * curvature + (1 - sqr_mom) * hessian)


@elementwise
def sophia_ratio(update, curvature, *, rho=0.04, eps=1e-12):
    return dict(update=(update / (rho * curvature).clamp(min=eps)).clamp(-1, 1))


def row_zeros(param):
    return param.new_zeros(param.shape[0] if param.dim() == 2 else param.shape)


def column_zeros(param):
    return param.new_zeros(param.shape[1] if param.dim() == 2 else ())


@leafwise(rows=row_zeros, columns=column_zeros)
def factored_rms(grad, rows, columns, *, step, decay=0.8, eps=1e-30):
    sqr_mom = 1 - step**-decay
    square = grad.square() + eps
    if grad.dim() != 2:
        rows = sqr_mom * rows + (1 - sqr_mom) * square
        return dict(rows=rows, columns=columns, update=grad / rows.sqrt())
    rows = sqr_mom * rows + (1 - sqr_mom) * square.mean(1)
    columns = sqr_mom * columns + (1 - sqr_mom) * square.mean(0)
    size = rows[:, None] * columns[None, :] / rows.mean()
    return dict(rows=rows, columns=columns, update=grad / size.sqrt())


@leafwise
def clip_rms(update, *, threshold=1.0):
    rms = update.square().mean().sqrt()
    return dict(update=update / (rms / threshold).clamp(min=1.0))


def left_zeros(param):
    return torch.zeros(param.shape[0], param.shape[0], dtype=param.dtype)


def right_zeros(param):
    return torch.zeros(param.shape[1], param.shape[1], dtype=param.dtype)


def inverse_root(matrix, power, eps):
    values, vectors = torch.linalg.eigh(matrix + eps * torch.eye(len(matrix), dtype=matrix.dtype))
    return vectors * values.clamp(min=eps) ** (-1 / power) @ vectors.T


@leafwise(left=left_zeros, right=right_zeros)
def precondition(grad, left, right, *, eps=1e-4):
    left, right = left + grad @ grad.T, right + grad.T @ grad
    update = inverse_root(left, 4, eps) @ grad @ inverse_root(right, 4, eps)
    return dict(left=left, right=right, update=update)


@elementwise
def add_noise(param, *, key, lr, temperature=1e-4):
    return dict(param=param + (2 * lr * temperature) ** 0.5 * normal(key, param))


def is_matrix(path: str, leaf: Tensor) -> str:
    return "matrix" if leaf.dim() == 2 else "vector"


def sophia() -> Optimizer:
    return chain(
        fs.weight_decay, fs.average_grad, average_curvature, sophia_ratio, fs.sgd_step,
        lr=0.1, wd=0.01, mom=0.9,
    )  # fmt: skip


def muon_under_one_clip() -> Optimizer:
    matrices = chain(fs.heavy_ball, fs.orthogonalize, fs.sgd_step, lr=0.02, mom=0.9)
    return chain(clip, partition({"matrix": matrices, "vector": fs.adamw(lr=0.01)}, is_matrix))


# What the papers say, leaf by leaf.

Tensors = dict[str, Tensor]
Reference = Callable[[Tensors, list[Tensors]], Tensors]


def length(tensors: Tensors) -> float:
    return math.sqrt(sum(float(value.square().sum()) for value in tensors.values()))


def prodigy_by_hand(params: Tensors, steps: list[Tensors]) -> Tensors:
    d, r, b1, b2, eps, lr = 1e-6, 0.0, 0.9, 0.999, 1e-8, 1.0
    x = {name: value.clone() for name, value in params.items()}
    m, v, s = ({n: torch.zeros_like(p) for n, p in params.items()} for _ in range(3))
    for grads in steps:
        dot = sum(float((g * (params[n] - x[n])).sum()) for n, g in grads.items())
        r = b2**0.5 * r + (1 - b2**0.5) * lr * d**2 * dot
        for n, g in grads.items():
            s[n] = b2**0.5 * s[n] + (1 - b2**0.5) * lr * d**2 * g
            m[n] = b1 * m[n] + (1 - b1) * d * g
            v[n] = b2 * v[n] + (1 - b2) * d**2 * g**2
            x[n] = x[n] - lr * d * m[n] / (v[n].sqrt() + d * eps)
        d = max(d, r / sum(float(value.abs().sum()) for value in s.values()))
    return x


def schedule_free_by_hand(params: Tensors, steps: list[Tensors]) -> Tensors:
    b1, b2, lr, wd, eps, weights = 0.9, 0.999, 0.1, 0.1, 1e-8, 0.0
    x, y, z = ({n: p.clone() for n, p in params.items()} for _ in range(3))
    v = {n: torch.zeros_like(p) for n, p in params.items()}
    for number, grads in enumerate(steps, 1):
        weights += lr**2
        for n, g in grads.items():
            v[n] = b2 * v[n] + (1 - b2) * g**2
            z[n] = z[n] - lr * (g / ((v[n] / (1 - b2**number)).sqrt() + eps) + wd * y[n])
            x[n] = x[n] + lr**2 / weights * (z[n] - x[n])
            y[n] = b1 * x[n] + (1 - b1) * z[n]
    return y


def adafactor_by_hand(params: Tensors, steps: list[Tensors]) -> Tensors:
    x, rows, columns = dict(params), {}, {}
    for number, grads in enumerate(steps, 1):
        b = 1 - number**-0.8
        for n, g in grads.items():
            square = g**2 + 1e-30
            if g.dim() == 2:
                rows[n] = b * rows.get(n, 0) + (1 - b) * square.mean(1)
                columns[n] = b * columns.get(n, 0) + (1 - b) * square.mean(0)
                size = torch.outer(rows[n], columns[n]) / rows[n].mean()
            else:
                rows[n] = b * rows.get(n, 0) + (1 - b) * square
                size = rows[n]
            update = g / size.sqrt()
            update = update / max(1.0, float(update.square().mean().sqrt()))
            x[n] = x[n] - 0.1 * update
    return x


def shampoo_by_hand(params: Tensors, steps: list[Tensors]) -> Tensors:
    x, left, right = dict(params), {}, {}
    for grads in steps:
        for n, g in grads.items():
            left[n] = left.get(n, 0) + g @ g.T
            right[n] = right.get(n, 0) + g.T @ g
            x[n] = x[n] - 0.1 * (
                inverse_root(left[n], 4, 1e-4) @ g @ inverse_root(right[n], 4, 1e-4)
            )
    return x


def clipped_sgd_by_hand(params: Tensors, steps: list[Tensors]) -> Tensors:
    x = dict(params)
    for grads in steps:
        scale = min(1.0, 1.0 / (length(grads) + 1e-6))
        x = {n: value - 0.1 * scale * grads[n] for n, value in x.items()}
    return x


def lamb_by_hand(params: Tensors, steps: list[Tensors]) -> Tensors:
    x = dict(params)
    m, v = ({n: torch.zeros_like(p) for n, p in params.items()} for _ in range(2))
    for number, grads in enumerate(steps, 1):
        for n, g in grads.items():
            m[n] = 0.9 * m[n] + 0.1 * g
            v[n] = 0.99 * v[n] + 0.01 * g**2
            update = (m[n] / (1 - 0.9**number)) / ((v[n] / (1 - 0.99**number)).sqrt() + 1e-5)
            x[n] = x[n] - 0.1 * float(x[n].norm() / update.norm()) * update
    return x


def agc_by_hand(params: Tensors, steps: list[Tensors]) -> Tensors:
    x = dict(params)
    for grads in steps:
        for n, g in grads.items():
            units = [(u, k) for u, k in zip(x[n], g, strict=True)]
            new = []
            for unit, slope in units:
                longest = 0.01 * max(float(unit.norm()), 1e-3)
                new.append(slope * min(1.0, longest / max(float(slope.norm()), 1e-6)))
            x[n] = x[n] - 0.1 * torch.stack(new)
    return x


def adaptive(*rules: Rule) -> Optimizer:
    moments = (fs.average_grad, fs.average_sqr_grad, fs.debias, fs.scale_by_rms)
    return chain(*moments, *rules, fs.sgd_step, lr=0.1, mom=0.9, sqr_mom=0.99, eps=1e-5)


SHAPES = {"bias": (3,), "first": (4, 3), "second": (4, 3)}
MATRICES = {"first": (4, 3), "second": (2, 5)}

CASES: dict[str, tuple[Optimizer, Reference, dict[str, tuple[int, ...]]]] = {
    "clip_norm": (chain(clip, fs.sgd_step, lr=0.1), clipped_sgd_by_hand, SHAPES),
    "lamb": (adaptive(lamb_ratio), lamb_by_hand, SHAPES),
    "agc": (chain(clip_units, fs.sgd_step, lr=0.1), agc_by_hand, SHAPES),
    "prodigy": (fs.prodigy(), prodigy_by_hand, SHAPES),
    "schedule-free AdamW": (
        fs.schedule_free_adamw(lr=0.1, wd=0.1),
        schedule_free_by_hand,
        SHAPES,
    ),
    "adafactor": (
        chain(factored_rms, clip_rms, fs.sgd_step, lr=0.1),
        adafactor_by_hand,
        SHAPES,
    ),
    "shampoo": (chain(precondition, fs.sgd_step, lr=0.1), shampoo_by_hand, MATRICES),
    "shampoo of the catalogue": (fs.shampoo(lr=0.1, eps=1e-4), shampoo_by_hand, MATRICES),
}


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("form", ["plain", "fused", "donated"])
@pytest.mark.parametrize("name", CASES)
def test_it_does_what_its_paper_says(name: str, form: str) -> None:
    opt, reference, shapes = CASES[name]
    params, steps = drawn(shapes, 0), [drawn(shapes, 1 + k) for k in range(STEPS)]
    expected = reference(params, steps)
    run: Any = opt if form == "plain" else fuse(opt, donate=form == "donated")
    now = {leaf: value.clone() for leaf, value in params.items()}
    state = opt.init(now)
    for grads in steps:
        now, state = run(now, grads, state)
    assert_close(now, expected, rtol=1e-9, atol=1e-11)


def test_sophia_takes_the_hessian_from_the_caller() -> None:
    opt = sophia()
    params, grads, hessian = (drawn(SHAPES, seed) for seed in (0, 1, 2))
    hessian = {name: value.abs() for name, value in hessian.items()}
    assert opt.required == ("hessian",)
    after, _ = opt(params, grads, opt.init(params), hessian=hessian)
    for name, value in params.items():
        ratio = 0.1 * grads[name] / (0.04 * 0.01 * hessian[name]).clamp(min=1e-12)
        expected = value * (1 - 0.1 * 0.01) - 0.1 * ratio.clamp(-1, 1)
        torch.testing.assert_close(after[name], expected)
    fused, _ = fuse(opt)(params, grads, opt.init(params), hessian=hessian)
    assert_close(fused, after, rtol=1e-12)


def test_muon_and_adamw_share_one_global_clip() -> None:
    opt = muon_under_one_clip()
    params, grads = drawn(SHAPES, 0), drawn(SHAPES, 1)
    after, _ = opt(params, grads, opt.init(params))
    scale = 1.0 / (length(grads) + 1e-6)
    clipped = {name: value * scale for name, value in grads.items()}
    vectors = {"bias": params["bias"]}
    adamw = fs.adamw(lr=0.01)
    expected, _ = adamw(vectors, {"bias": clipped["bias"]}, adamw.init(vectors))
    assert_close(after["bias"], expected["bias"], rtol=1e-12)
    moved = fs.orthogonalize(clipped["first"])["update"]
    assert_close(after["first"], params["first"] - 0.02 * moved, rtol=1e-12)
    fused, _ = fuse(opt)(params, grads, opt.init(params))
    assert_close(fused, after, rtol=1e-12)


def test_langevin_noise_is_the_same_in_every_executor() -> None:
    opt = chain(fs.sgd_step, add_noise, lr=0.1)
    params, grads = drawn(SHAPES, 0), drawn(SHAPES, 1)
    after, _ = opt(params, grads, opt.init(params))
    fused, _ = fuse(opt)(params, grads, opt.init(params))
    assert_close(fused, after)
    other, _ = opt(params, grads, {**opt.init(params), "seed": torch.tensor(1)})
    assert not torch.equal(other["bias"], after["bias"])


def test_polyak_steps_by_the_loss() -> None:
    opt = fs.polyak_sgd()
    params = {"w": torch.tensor([3.0, 4.0], dtype=torch.float64)}
    loss = params["w"].square().sum() / 2  # 12.5, with the gradient w, of length 5
    after, _ = opt(params, params, opt.init(params), value=loss)
    assert_close(after["w"], params["w"] / 2, rtol=1e-12)


PRODIGY = (
    fs.estimate_distance,
    fs.rate_by_distance,
    fs.track_slope,
    fs.average_progress,
    fs.compare_with_slope,
    fs.scale_by_distance_rms,
)

SCHEDULE_FREE = (fs.weigh_steps, fs.step_from_fast, fs.train_between)

RULES: dict[str, tuple[tuple[Any, ...], int]] = {
    "clip_norm": ((clip,), 4),
    "LAMB's ratio": ((lamb_ratio,), 5),
    "AGC": ((clip_units,), 8),
    "Prodigy": (PRODIGY, 25),
    "schedule-free AdamW": (SCHEDULE_FREE, 15),
    "Sophia": ((average_curvature, sophia_ratio), 12),
    "Adafactor": ((row_zeros, column_zeros, factored_rms, clip_rms), 25),
    "Shampoo": ((left_zeros, right_zeros, inverse_root, precondition), 25),
    "Langevin": ((add_noise,), 5),
    "Polyak": ((fs.polyak_ratio,), 6),
}


@pytest.mark.parametrize("name", RULES)
def test_it_is_written_in_a_few_lines(name: str) -> None:
    functions, lines = RULES[name]
    assert sum(map(lines_of, functions)) <= lines


def lines_of(rule: Any) -> int:
    """The lines of a function without its text, and with the signature in one line."""
    source = inspect.getsource(rule.function if isinstance(rule, Rule) else rule)
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:]
    return len(ast.unparse(function).splitlines())
