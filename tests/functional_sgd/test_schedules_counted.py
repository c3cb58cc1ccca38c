"""Schedules with lengths of their own, and shapes for a run: numbers by hand, and laws."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from functional_sgd import scheduled, sgd
from functional_sgd.schedules import (
    Constant,
    Cosine,
    DecayWarmUp,
    Exponential,
    ExponentialDecay,
    InverseSqrt,
    Join,
    Linear,
    Piecewise,
    Polynomial,
    Product,
    Restarts,
    Reverse,
    Rex,
    Schedule,
    Sequence,
    Stretch,
    Sum,
    counts_steps,
    cyclic,
    interpolate,
    inverse_sqrt,
    is_shape,
    linear_one_cycle,
    multi_step,
    one_cycle,
    one_cycle_in_steps,
    one_minus_sqrt,
    polynomial_decay,
    step_decay,
    warm_up,
    warmup_cosine,
    warmup_stable_decay,
)

STEPS: dict[str, tuple[Schedule, tuple[float, ...]]] = {  # of steps 0, 1, 2, 3, 4, 6, 9
    "stretch": (Stretch(Linear(0.0, 1.0), 4), (0, 0.25, 0.5, 0.75, 1, 1, 1)),
    "sequence": (
        Sequence((2, 4), (Constant(1.0), Stretch(Linear(0.5, 0.0), 4), Constant(0.3))),
        (1, 1, 0.5, 0.375, 0.3, 0.3, 0.3),
    ),
    "restarts": (Restarts(Linear(1.0, 0.0), 2), (1, 0.5, 1, 0.5, 1, 1, 0.5)),
    "longer restarts": (  # at 0, 2, 6, 14
        Restarts(Linear(1.0, 0.0), 2, mult=2, factor=0.5),
        (1, 0.5, 0.5, 0.375, 0.25, 0.25, 0.15625),
    ),
    "sum": (Sum((Constant(1.0), Stretch(Linear(0, 8), 8))), (1, 2, 3, 4, 5, 7, 9)),
    "product": (
        Product((ExponentialDecay(1.0, 0.5), ExponentialDecay(2.0, 2.0))),
        (2, 2, 2, 2, 2, 2, 2),
    ),
    "decay": (ExponentialDecay(64.0, 0.5), (64, 32, 16, 8, 4, 1, 0.125)),
    "decay, late": (
        ExponentialDecay(16.0, 0.25, every=2, begin=1, limit=1.0),
        (16, 16, 8, 4, 2, 1, 1),
    ),
    "growth": (ExponentialDecay(1.0, 2.0, limit=5.0), (1, 2, 4, 5, 5, 5, 5)),
    "stairs": (step_decay(1.0, 0.5, every=3), (1, 1, 1, 0.5, 0.5, 0.25, 0.125)),
    "piecewise": (Piecewise((1, 4), (0.3, 0.2, 0.1)), (0.3, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1)),
    "multi step": (multi_step(1.0, (2, 6), 0.5), (1, 1, 0.5, 0.5, 0.5, 0.25, 0.25)),
    "inverse sqrt": (
        InverseSqrt(6.0, 3),
        (6, 27**0.5, 21.6**0.5, 18**0.5, 108**0.5 / 7**0.5, 12**0.5, 3),
    ),
    "with warm-up": (inverse_sqrt(6.0, 1), (0, 6, 18**0.5, 12**0.5, 3, 6**0.5, 2)),
    "decay of an average": (DecayWarmUp(0.5, 4), (0.25, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5)),
    "interpolate": (
        interpolate((1, 3, 4), (1.0, 3.0, 2.0)),
        (1, 1, 2, 3, 2, 2, 2),
    ),
    "interpolate from 0": (interpolate((0, 4), (0.0, 1.0)), (0, 0.25, 0.5, 0.75, 1, 1, 1)),
    "warm_up": (warm_up(2, Constant(1.0), start=0.5), (0.5, 0.75, 1, 1, 1, 1, 1)),
    "cyclic": (cyclic(1.0, 3.0, up=1, down=2), (1, 3, 2, 1, 3, 1, 1)),
    "cyclic, falling": (cyclic(0.0, 8.0, up=1, gamma=0.5), (0, 4, 0, 1, 0, 0, 8 / 512)),
    "one cycle, linear": (  # the top at step 2, the end at 9
        one_cycle_in_steps(8.0, 10, div=4.0, div_final=8.0, pct_start=0.3, shape=Linear),
        (2, 5, 8, 7, 6, 4, 1),
    ),
    "three phases": (  # 2 to 8 at step 2, back at 4, the end at 9
        one_cycle_in_steps(8.0, 10, 4.0, 8.0, 0.3, Linear, three_phase=True),
        (2, 5, 8, 5, 2, 1.6, 1),
    ),
}

SHARES: dict[str, tuple[Schedule, tuple[float, ...]]] = {  # at 0, 1/4, 1/2, 3/4, 1
    "rex": (Rex(3.0, 1.0), (3, 1 + 12 / 7, 1 + 4 / 3, 1.8, 1)),
    "reverse": (Reverse(Linear(1.0, 2.0)), (2, 1.75, 1.5, 1.25, 1)),
    "polynomial decay": (polynomial_decay(17.0, 1.0, 2.0), (17, 10, 5, 2, 1)),
    "one minus sqrt": (one_minus_sqrt(3.0, 1.0), (3, 2, 3 - 2**0.5, 3 - 3**0.5, 1)),
    "linear one cycle": (
        linear_one_cycle(8.0, 4.0, 8.0, 0.25, 0.75),
        (2, 8, 5, 2, 1),
    ),
    "warm-up, cosine": (warmup_cosine(4.0, 0.5, 1.0, 2.0), (1, 2.5, 4, 3, 2)),
    "warm-up, stable, decay": (
        warmup_stable_decay(4.0, 0.25, 0.5, start=1.0, shape=Cosine),
        (1, 4, 4, 2, 0),
    ),
    "no stable part": (warmup_stable_decay(4.0, 0.75, 0.25), (0, 4 / 3, 8 / 3, 4, 0)),
    "stairs in shares": (step_decay(1.0, 0.5, every=0.25), (1, 0.5, 0.25, 0.125, 0.0625)),
}

ALL = {
    **{
        name: (schedule, (0, 1, 2, 3, 4, 6, 9), values)
        for name, (schedule, values) in STEPS.items()
    },
    **{name: (one, (0, 0.25, 0.5, 0.75, 1), values) for name, (one, values) in SHARES.items()},
}


@pytest.fixture(params=ALL)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_numbers(name: str) -> None:
    schedule, positions, values = ALL[name]
    assert [schedule(at) for at in positions] == pytest.approx(list(values), rel=1e-12, abs=1e-12)


def test_tensor_positions_give_the_same_values(name: str) -> None:
    schedule, positions, values = ALL[name]
    found = [float(schedule(torch.tensor(float(at), dtype=torch.float64))) for at in positions]
    assert found == pytest.approx(list(values), rel=1e-12, abs=1e-12)


@pytest.mark.usefixtures("fresh_compiler")
def test_schedules_compile(name: str) -> None:
    schedule, positions, values = ALL[name]
    fast = torch.compile(lambda at: schedule(at) + 0 * at, fullgraph=True, backend="eager")
    found = [float(fast(torch.tensor(float(at), dtype=torch.float64))) for at in positions]
    assert found == pytest.approx(list(values), rel=1e-12, abs=1e-12)


def test_schedules_are_values(name: str) -> None:
    schedule, _, _ = ALL[name]
    for twin in (
        pickle.loads(pickle.dumps(schedule)),
        copy.deepcopy(schedule),
        eval(repr(schedule)),
    ):
        assert twin == schedule
        assert hash(twin) == hash(schedule)


def test_they_are_shapes_or_have_lengths(name: str) -> None:
    schedule, _, _ = ALL[name]
    assert is_shape(schedule) == (name in SHARES and name != "stairs in shares")
    assert not (is_shape(schedule) and counts_steps(schedule))


def test_a_step_schedule_in_shares_is_the_one_in_steps() -> None:
    """k / 30 * 3 is 3 / 10 of k up to rounding, which moves no border."""
    shares, steps = step_decay(1.0, 0.5, every=0.1), step_decay(1.0, 0.5, every=3)
    assert [shares(k / 30) for k in range(31)] == [steps(k) for k in range(31)]


def test_values_of_a_join_of_constants_are_float64() -> None:
    joined = Join((0.5, 0.5), (Constant(0.1), Constant(0.2)))
    assert float(joined(torch.tensor(0.2, dtype=torch.float64))) == 0.1
    assert float(joined(torch.tensor(0.7, dtype=torch.float64))) == 0.2


def test_a_schedule_of_steps_drives_an_optimizer_for_as_long_as_it_likes() -> None:
    opt, params = scheduled(sgd(), lr=multi_step(1.0, (1, 2), 0.5)), torch.tensor([4.0])
    state = opt.init(params)
    for _ in range(4):
        params, state = opt(params, torch.ones(1), state)
    assert float(params) == 4 - 1 - 0.5 - 0.25 - 0.25


def test_derivatives_by_the_position_are_finite_at_the_borders(name: str) -> None:
    schedule, positions, _ = ALL[name]
    for at in positions:
        position = torch.tensor(float(at), dtype=torch.float64, requires_grad=True)
        (0 * position + schedule(position)).backward()
        if "sqrt" not in name:  # whose slope at 0 is infinite
            assert bool(position.grad.isfinite())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stretch(Linear(0, 1), 0), "Stretch: length must be above 0, got 0"),
        (lambda: Sequence((1,), (Constant(1.0),)), "Sequence: needs a border between any two"),
        (lambda: Sequence((2, 2), (Constant(1.0),) * 3), "Sequence: borders must be above 0 and r"),
        (
            lambda: Sequence((0,), (Constant(1.0),) * 2),
            "Sequence: borders must be above 0 and rise",
        ),
        (
            lambda: Sequence((1,), (Linear(0, 1), Constant(1.0))),
            r"Sequence: Linear\(.*no length he",
        ),
        (lambda: Restarts(Linear(1, 0), 0), "Restarts: length must be above 0"),
        (lambda: Restarts(Linear(1, 0), 2, mult=0.5), "Restarts: .*mult at least 1, got 2 and 0.5"),
        (lambda: ExponentialDecay(1.0, 0.0), "ExponentialDecay: factor and every must be above 0"),
        (
            lambda: Piecewise((1,), (1.0,)),
            "Piecewise: needs a border between any two values, got 1",
        ),
        (lambda: Piecewise((2, 1), (1.0,) * 3), "Piecewise: borders must be above 0 and rise"),
        (lambda: InverseSqrt(1.0, 0), "InverseSqrt: length must be above 0"),
        (lambda: interpolate((0,), (1.0,)), "interpolate: needs 2 points or more"),
        (lambda: interpolate((-5, 5), (0.0, 1.0)), r"interpolate: points must rise, from 0 or abo"),
        (lambda: interpolate((0, 2, 2), (0.0,) * 3), r"points must rise, .*got \(0, 2, 2\)"),
        (
            lambda: Join((0.1, 0.9), (Stretch(Linear(0, 1), 100), Cosine(1, 0))),
            r"Join: expected a shape, got Stretch\(.* counts steps; .*Leave out its Stretch",
        ),
        (lambda: Restarts(Stretch(Linear(1, 0), 100), 100), r"Restarts: .*Stretch\(.* counts ste"),
        (lambda: Reverse(Stretch(Linear(1, 0), 100)), r"Reverse: .*Stretch\(.* counts steps"),
        (
            lambda: Stretch(step_decay(1.0, every=30), 100),
            "Stretch: .*ExponentialDecay.* counts st",
        ),
        (
            lambda: Join((1.0,), (Sum((Constant(1.0), Stretch(Linear(1, 0), 9))),)),
            r"Join: .*Sum\(.* counts steps",
        ),
        (lambda: one_cycle_in_steps(1.0, steps=1), "one_cycle_in_steps: .*got steps=1 and pct_sta"),
        (lambda: one_cycle_in_steps(1.0, steps=3), r"the top at step -0\.1 of 0 to 2\. Give at le"),
        (
            lambda: one_cycle_in_steps(1.0, steps=10, pct_start=0.6, three_phase=True),
            "the top at step 5 of 0 to 9",
        ),
        (lambda: warm_up(10, one_cycle(1.0)), "Sequence: Join"),
        (
            lambda: warm_up(0, Constant(1.0)),
            r"warm_up: length must be above 0, got 0\. .* Constant",
        ),
        (lambda: inverse_sqrt(1.0, 0), "inverse_sqrt: warmup must be above 0, got 0"),
        (lambda: cyclic(0.0, 1.0, up=0), "cyclic: up and down must .* not both 0, got 0 and 0"),
        (lambda: cyclic(0.0, 1.0, up=-1, down=3), "cyclic: .* got -1 and 3"),
        (lambda: warmup_stable_decay(1.0, 0.6, 0.6), "Join: shares must be at least 0"),
        (
            lambda: scheduled(sgd(), steps=10, lr=step_decay(1.0, every=3)),
            "scheduled: ExponentialDecay.* counts steps, but with steps=10 it would",
        ),
        (
            lambda: scheduled(sgd(), lr=Sum((Constant(1.0), Linear(0, 1)))),
            "so the length of the run must be known",
        ),
    ],
)
def test_schedules_that_cannot_be_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_of_torchs_operators_can_be_warmed_up_to() -> None:
    schedule = warm_up(2, lambda step: 0.5 * torch.exp2(-step))
    positions = torch.arange(5, dtype=torch.float64)
    assert [float(schedule(at)) for at in positions] == [0.0, 0.25, 0.5, 0.25, 0.125]


def test_a_line_goes_to_one_number() -> None:
    with pytest.raises(TypeError, match=r"warm_up: expected a schedule of one number.*got \{'a'"):
        warm_up(4, lambda step: {"a": 0.1, "b": 0.2})


def test_parts_may_be_lists() -> None:
    parts = [Stretch(Exponential(1.0, 2.0), 2), Stretch(Polynomial(2.0, 1.0, 2), 2)]
    assert Sequence([2], parts) == Sequence((2,), tuple(parts))  # type: ignore[arg-type]


def test_a_length_in_shares_is_one_of_its_part() -> None:
    """Half of a half: the first part has fallen after a quarter of the way."""
    joined = Join((0.5, 0.5), (step_decay(1.0, 0.5, every=0.5), Constant(0.1)))
    assert [joined(k / 8) for k in range(6)] == [1.0, 1.0, 0.5, 0.5, 0.1, 0.1]
