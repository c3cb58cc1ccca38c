"""What matrix rules do, with numbers worked by hand."""

import math
from typing import Any

import torch

import functional_sgd as fs
from functional_sgd import Rule
from functional_sgd.randomness import TrialKey, normal

T = torch.tensor
STEP_1, STEP_2, STEP_1000 = (T(float(step), dtype=torch.float64) for step in (1, 2, 1000))
NOISE = float(normal(TrialKey(), torch.zeros(1, dtype=torch.float64)))
"""What is drawn here, every time."""


def quintic(x: float) -> float:
    """What Muon's iteration makes of a singular value."""
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


SHRUNK = 0.5 * (144 - NOISE**2 / 36) / (144 + NOISE**2 / 36)
LARGEST = max(16 + NOISE**2 / 4, NOISE**2)
VECTOR = [0.5 * (16 - NOISE**2 / 4) / LARGEST, -0.5 * NOISE**2 / LARGEST]
FOUR = [[2.0], [4.0], [6.0], [8.0]]
RMS = [0.375, -0.75, 0.75, 0.0]
ROWS = T([[1.0, 1.0], [1.0, 0.0]]).double()
NONE = [[0.0, 0.0], [0.0, 0.0]]

CASES: list[tuple[Rule, dict[str, Any], dict[str, Any]]] = [
    (fs.orthogonalize, dict(update=[3.0, -4.0]), dict(update=[3.0, -4.0])),
    (fs.orthogonalize, dict(update=[[0.0, 0.0]]), dict(update=[[0.0, 0.0]])),
    (fs.orthogonalize, dict(update=[[0.0], [-5.0]]), dict(update=[[0.0], [-quintic(1.0)]])),
    (
        fs.orthogonalize_in_bfloat16,  # 3 and 4, divided by their length
        dict(update=[[3.0, 0.0], [0.0, 4.0]]),
        dict(update=[[quintic(0.6), 0.0], [0.0, quintic(0.8)]]),
    ),
    (fs.scale_by_aspect, dict(update=[[1.0], [2.0], [3.0], [4.0]]), dict(update=FOUR)),
    (fs.scale_by_aspect, dict(update=[[1.0, 2.0]]), dict(update=[[1.0, 2.0]])),
    (fs.scale_by_aspect, dict(update=[1.0, 2.0]), dict(update=[1.0, 2.0])),
    (
        fs.match_rms_of_adamw,
        dict(update=[[1.0], [2.0], [3.0], [4.0]], rms=1.0),
        dict(update=FOUR),
    ),
    (fs.match_rms_of_adamw, dict(update=[1.0, 2.0]), dict(update=[1.0, 2.0])),
    (fs.set_rms, dict(update=[2.0, -4.0, 4.0, 0.0], rms=0.75, eps=1.0), dict(update=RMS)),
    (fs.set_rms, dict(update=[0.0, 0.0]), dict(update=[0.0, 0.0])),
    (
        fs.normalize_rows,  # all come to 1, and then the length is what it was
        dict(update=[[2.0, 2.0], [0.5, 0.0]], row_avg=[4.0, 0.375], sqr_mom=0.5, eps=0.0),
        dict(row_avg=[4.0, 0.25], update=(ROWS * (8.25 / 3.0) ** 0.5).tolist()),
    ),
    (
        fs.normalize_rows,
        dict(update=[2.0, 3.0], row_avg=[0.0]),
        dict(update=[2.0, 3.0], row_avg=[0.0]),
    ),
    (
        fs.precondition_sides,  # fourth roots of 16, 81 and 256, 16
        dict(
            grad=[[3.0, 0.0], [0.0, 1.0]],
            left=[[7.0, 0.0], [0.0, 80.0]],
            right=[[247.0, 0.0], [0.0, 15.0]],
            left_root=NONE,
            right_root=NONE,
            step=STEP_1,
            eps=1e-12,
        ),
        dict(
            update=[[3.0 / 8, 0.0], [0.0, 1.0 / 6]],
            left=[[16.0, 0.0], [0.0, 81.0]],
            right=[[256.0, 0.0], [0.0, 16.0]],
            left_root=[[1 / 2, 0.0], [0.0, 1 / 3]],
            right_root=[[1 / 4, 0.0], [0.0, 1 / 2]],
        ),
    ),
    (
        fs.precondition_sides,  # not due
        dict(
            grad=[[3.0]],
            left=[[7.0]],
            right=[[1.0]],
            left_root=[[2.0]],
            right_root=[[5.0]],
            step=STEP_2,
            every=2,
        ),
        dict(update=[[30.0]], left=[[16.0]], right=[[10.0]], left_root=[[2.0]], right_root=[[5.0]]),
    ),
    (
        fs.average_in_eigenbasis,  # turned by a quarter: rows are swapped
        dict(
            grad=[[4.0], [0.0]],
            grad_avg=[[0.0], [0.0]],
            sqr_avg=[[8.0], [0.0]],
            left=[[0.0, 0.0], [0.0, 0.0]],
            right=[[16.0]],
            left_basis=[[0.0, 1.0], [1.0, 0.0]],
            right_basis=[[1.0]],
            step=STEP_2,
            mom=0.5,
            sqr_mom=0.5,
            eps=0.0,
        ),
        dict(
            update=[[1.0], [0.0]],  # 4 / sqrt(16): debiased, and no further by the other square
            grad_avg=[[0.0], [2.0]],
            sqr_avg=[[4.0], [8.0]],
            left=[[8.0, 0.0], [0.0, 0.0]],
            right=[[16.0]],
            left_basis=[[0.0, 1.0], [1.0, 0.0]],
            right_basis=[[1.0]],
        ),
    ),
    (
        fs.whiten,  # not due: after 499 calm steps, once in exp(0.5)
        dict(
            update=[[1.0, 0.0], [0.0, 1.0]],
            left=[[2.0, 1.0], [0.0, 1.0]],
            right=[[1.0, 0.0], [0.0, 3.0]],
            waited=[0.0],
            key=TrialKey(),
            step=STEP_1000,
            calm_steps=499,
        ),
        dict(
            update=[[4.0, 18.0], [2.0, 18.0]],
            left=[[2.0, 1.0], [0.0, 1.0]],
            right=[[1.0, 0.0], [0.0, 3.0]],
            waited=[1.0],
        ),
    ),
    (
        fs.whiten,  # a = 12 and b = noise / 6: both factors shrink alike
        dict(
            update=[[2.0]],
            left=[[2.0]],
            right=[[3.0]],
            waited=[1.0],
            key=TrialKey(),
            step=STEP_1000,
            factor_lr=0.5,
            balanced=0.0,
        ),
        dict(
            update=[[72.0 * (1 - SHRUNK) ** 4]],
            left=[[2.0 * (1 - SHRUNK)]],
            right=[[3.0 * (1 - SHRUNK)]],
            waited=[0.0],
        ),
    ),
    (
        fs.whiten,  # balanced to 1 and 1; a = 0 and b = noise, so both grow by all that they are
        dict(
            update=[[0.0]],
            left=[[0.25]],
            right=[[4.0]],
            waited=[0.0],
            key=TrialKey(),
            step=STEP_1,
            factor_lr=1.0,
            balanced=1.0,
        ),
        dict(update=[[0.0]], left=[[2.0]], right=[[2.0]], waited=[0.0]),
    ),
    (
        fs.whiten,  # a vector: 4 and noise / 2; 0 and noise
        dict(
            update=[2.0, 0.0],
            left=[2.0, 1.0],
            right=[1.0],
            waited=[0.0],
            key=TrialKey(),
            step=STEP_1,
            factor_lr=0.5,
        ),
        dict(
            update=[2.0 * (2.0 * (1 - VECTOR[0])) ** 2, 0.0],
            left=[2.0 * (1 - VECTOR[0]), 1.0 * (1 - VECTOR[1])],
            right=[1.0],
            waited=[0.0],
        ),
    ),
    (
        fs.scale_channels_by_sketch,  # drawn: the sketch is (7, 2) times the noise
        dict(
            grad=[[3.0, 4.0], [0.0, 2.0]],
            directions=[[9.0], [9.0]],
            sketch_avg=[[0.0], [0.0]],
            sketch_sqr_avg=[[0.0], [0.0]],
            key=TrialKey(),
            step=STEP_1,
            mom=0.5,
            sqr_mom=0.75,
            eps=0.0,
        ),
        dict(
            update=[[3.0 / 7 / abs(NOISE), 4.0 / 7 / abs(NOISE)], [0.0, 1.0 / abs(NOISE)]],
            directions=[[NOISE], [NOISE]],
            sketch_avg=[[3.5 * NOISE], [NOISE]],
            sketch_sqr_avg=[[12.25 * NOISE**2], [NOISE**2]],
        ),
    ),
    (
        fs.scale_channels_by_sketch,  # not drawn, and wider than high: columns, of 6 and 8
        dict(
            grad=[[3.0, 4.0]],
            directions=[[2.0]],
            sketch_avg=[[0.0, 0.0]],
            sketch_sqr_avg=[[0.0, 0.0]],
            key=TrialKey(),
            step=STEP_2,
            mom=0.0,
            sqr_mom=0.0,
            eps=0.0,
            sketch_scale=2.0,
        ),
        dict(
            update=[[1.0, 1.0]],
            directions=[[2.0]],
            sketch_avg=[[6.0, 8.0]],
            sketch_sqr_avg=[[36.0, 64.0]],
        ),
    ),
    (
        fs.scale_channels_by_sketch,  # a vector: Adam
        dict(
            grad=[3.0, -4.0],
            directions=[0.0],
            sketch_avg=[0.0, 0.0],
            sketch_sqr_avg=[0.0, 0.0],
            key=TrialKey(),
            step=STEP_1,
            mom=0.5,
            sqr_mom=0.75,
            eps=0.0,
        ),
        dict(
            update=[1.0, -1.0],
            directions=[0.0],
            sketch_avg=[1.5, -2.0],
            sketch_sqr_avg=[2.25, 4.0],
        ),
    ),
    (
        fs.scale_by_sketch,  # its own sketch, of length 5
        dict(
            grad=[[3.0], [4.0]],
            directions=[0.0],
            sketch_avg=[[0.0], [0.0]],
            sketch_sqr_avg=[[0.0], [0.0]],
            key=TrialKey(),
            step=STEP_1,
            mom=0.0,
            sqr_mom=0.0,
            eps=0.0,
            sketch_scale=5.0,
        ),
        dict(
            update=[[3.0 * 2**0.5], [4.0 * 2**0.5]],
            directions=[0.0],
            sketch_avg=[[3.0], [4.0]],
            sketch_sqr_avg=[[9.0], [16.0]],
        ),
    ),
    (
        fs.limit_norm_growth,
        dict(update=[[6.0, 8.0]], last_length=[1.0], growth=2.0),
        dict(update=[[1.2, 1.6]], last_length=[2.0]),
    ),
    (
        fs.limit_norm_growth,  # nothing is known yet, or the last update was 0
        dict(update=[[6.0, 8.0]], last_length=[0.0], growth=2.0),
        dict(update=[[6.0, 8.0]], last_length=[10.0]),
    ),
    (
        fs.limit_norm_growth,
        dict(update=[6.0, 8.0], last_length=[0.0], growth=2.0),
        dict(update=[6.0, 8.0], last_length=[0.0]),
    ),
    (
        fs.debias_rate,  # roots of 7/16 and 3/4
        dict(update=[3.0], step=STEP_2, mom=0.5, sqr_mom=0.75),
        dict(update=[4.0 * (7 / 16) ** 0.5]),
    ),
    (
        fs.power_iteration,  # the first of two directions
        dict(
            grad=[[3.0, 0.0], [0.0, 2.0]],
            momentum=[[1.0, 0.0], [0.0, 0.0]],
            basis=[[1.0], [0.0]],
            key=TrialKey(),
            step=STEP_2,
            mom=0.5,
            eps=1.0,
        ),
        dict(
            update=[[0.8, 0.0], [0.0, 0.0]], momentum=[[2.0, 0.0], [0.0, 2.0]], basis=[[0.8], [0.0]]
        ),
    ),
    (
        fs.power_iteration,  # wider than high; LAPACK's sign
        dict(
            grad=[[3.0, 4.0]],
            momentum=[[0.0, 0.0]],
            basis=[[1.0]],
            key=TrialKey(),
            step=STEP_2,
            mom=0.5,
            eps=0.0,
        ),
        dict(update=[[0.6, 0.8]], momentum=[[1.5, 2.0]], basis=[[-1.0]]),
    ),
    (
        fs.power_iteration,  # drawn
        dict(
            grad=[[3.0], [4.0]],
            momentum=[[0.0], [0.0]],
            basis=[[0.0]],
            key=TrialKey(),
            step=STEP_1,
            mom=0.5,
            eps=0.0,
        ),
        dict(update=[[0.6], [0.8]], momentum=[[1.5], [2.0]], basis=[[-math.copysign(1.0, NOISE)]]),
    ),
    (
        fs.power_iteration,  # nothing to go by
        dict(
            grad=NONE,
            momentum=NONE,
            basis=[[3.0], [4.0]],
            key=TrialKey(),
            step=STEP_2,
            mom=0.5,
            eps=0.0,
        ),
        dict(update=NONE, momentum=NONE, basis=[[0.6], [0.8]]),
    ),
    (
        fs.power_iteration,  # a vector
        dict(
            grad=[3.0, -4.0], momentum=[1.0, 2.0], basis=[0.0], key=TrialKey(), step=STEP_1, mom=0.5
        ),
        dict(update=[4.0, -2.0], momentum=[2.0, -1.0], basis=[0.0]),
    ),
    (fs.scale_by_fans, dict(update=[[1.0], [2.0], [3.0], [4.0]]), dict(update=FOUR)),
    (fs.scale_by_fans, dict(update=[[1.0, 2.0, 3.0, 4.0]]), dict(update=[[0.5, 1.0, 1.5, 2.0]])),
    (fs.scale_by_fans, dict(update=[1.0, 2.0]), dict(update=[1.0, 2.0])),
]
