"""Schedules: fastai's numbers (float32 inside, so rtol 1e-6), tensor positions, errors, copies."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from functional_sgd import sgd
from functional_sgd.schedules import (
    Constant,
    Cosine,
    Exponential,
    Join,
    Linear,
    Polynomial,
    Schedule,
    flat_cosine,
    one_cycle,
    three_cosines,
    warm_restarts,
    warmup_cosine,
)

POSITIONS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
BOOK = Join((0.3, 0.7), (Cosine(0.3, 0.6), Cosine(0.6, 0.2)))

TABLE: dict[str, tuple[Schedule, tuple[float, ...]]] = {
    "linear": (Linear(0.001, 0.1), (0.001, 0.0109, 0.02575, 0.0505, 0.07525, 0.0901, 0.1)),
    "cosine": (
        Cosine(0.001, 0.1),
        (0.001, 0.0034227024, 0.015498214, 0.0505, 0.085501786, 0.097577298, 0.1),
    ),
    "constant": (Constant(0.001), (0.001,) * 7),
    "exponential": (
        Exponential(0.001, 0.1),
        (0.001, 0.0015848932, 0.0031622777, 0.01, 0.031622777, 0.063095734, 0.1),
    ),
    "square": (
        Polynomial(0.001, 0.1, 2),
        (0.001, 0.00199, 0.0071875, 0.02575, 0.0566875, 0.08119, 0.1),
    ),
    "root": (
        Polynomial(0.001, 0.1, 0.5),
        (0.001, 0.032306549, 0.0505, 0.071003571, 0.086736515, 0.094919647, 0.1),
    ),
    "join": (BOOK, (0.3, 0.375, 0.57990381, 0.52469797, 0.31322326, 0.21980624, 0.2)),
    "one_cycle": (
        one_cycle(1e-2),
        (0.0004, 0.0037167185, 0.01, 0.0075000250, 0.0025000750, 0.00043236872, 1e-7),
    ),
    "momentum": (
        three_cosines(0.25, 0.95, 0.85, 0.95),  # Q10
        (0.95, 0.91545085, 0.85, 0.875, 0.925, 0.94567727, 0.95),
    ),
    "flat_cosine": (flat_cosine(1e-2), (0.01, 0.01, 0.01, 0.01, 0.01, 0.0034549819, 1e-7)),
    "warm_restarts": (
        warm_restarts(1.0),
        (1, 0.20610739, 0.69134185, 0.9619398, 0.40245484, 0.073679977, 0),
    ),
}


@pytest.fixture(params=TABLE)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("index", range(7))
def test_table(name: str, index: int) -> None:
    schedule, values = TABLE[name]
    assert schedule(POSITIONS[index]) == pytest.approx(values[index], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=str
)
@pytest.mark.parametrize("position", POSITIONS)
def test_tensor_positions_give_the_same_values(
    name: str, position: float, dtype: torch.dtype, rtol: float
) -> None:
    schedule, _ = TABLE[name]
    found = float(schedule(torch.tensor(position, dtype=dtype)))
    assert found == pytest.approx(schedule(position), rel=rtol, abs=rtol / 100)


@pytest.mark.usefixtures("fresh_compiler")
def test_schedules_compile(name: str) -> None:
    schedule, values = TABLE[name]

    def double(position: torch.Tensor) -> Any:
        return 2 * schedule(position) + 0 * position

    fast = torch.compile(double, fullgraph=True, backend="eager")
    found = [float(fast(torch.tensor(position, dtype=torch.float64))) for position in POSITIONS]
    assert found == pytest.approx([2 * value for value in values], rel=1e-6, abs=1e-12)


def test_schedules_have_a_derivative_by_position() -> None:
    """d/dp of 1 - cos(pi p) is pi sin(pi p)."""
    position = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    Cosine(0, 2)(position).backward()
    assert float(position.grad) == pytest.approx(torch.pi)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Linear(0, 2), (0, 0.5, 1, 1.5, 2)),
        (Cosine(0, 2), (0, 0.2928932188, 1, 1.7071067812, 2)),
        (Polynomial(0, 2, 2), (0, 0.125, 0.5, 1.125, 2)),
        (Exponential(1, 2), (1, 1.1892071150, 1.4142135624, 1.6817928305, 2)),
    ],
    ids=["linear", "cosine", "square", "exponential"],
)
def test_quarters(schedule: Schedule, values: tuple[float, ...]) -> None:
    assert [schedule(k / 4) for k in range(5)] == pytest.approx(values, abs=1e-10)


def test_linear_is_exact() -> None:
    assert Linear(1, 2)(0.3) == 1.3


def test_recorded_rates_of_one_cycle() -> None:
    """Two epochs of five batches, maximum 0.1."""
    recorded = [
        *(0.004, 0.03716718512, 0.09083281679, 0.09890739036, 0.09045094494),
        *(0.07500024865, 0.05522686593, 0.03454981013, 0.01654430239, 0.004323687191),
    ]
    assert [one_cycle(0.1)(k / 10) for k in range(10)] == pytest.approx(recorded, rel=1e-6)


def test_recorded_momenta_of_one_cycle() -> None:
    recorded = [
        *(0.95, 0.9154508488, 0.8595491492, 0.8510926206, 0.8595491506),
        *(0.8750000014, 0.8947735818, 0.9154508444, 0.9334565322, 0.9456772696),
    ]
    momentum = three_cosines(0.25, 0.95, 0.85, 0.95)
    assert [momentum(k / 10) for k in range(10)] == pytest.approx(recorded, rel=1e-6)


def test_join_hands_over_at_the_border() -> None:
    jump = Join((0.25, 0.75), (Constant(1.0), Constant(2.0)))
    assert [jump(position) for position in (0.0, 0.2499, 0.25, 1.0)] == [1.0, 1.0, 2.0, 2.0]


def test_join_holds_its_values_beyond_the_ends() -> None:
    assert (BOOK(-0.5), BOOK(1.5)) == (pytest.approx(0.3), pytest.approx(0.2))


@pytest.mark.parametrize("shares", [[1 / 7] * 7, [0.1] * 10, [0.1, 0.2, 0.7], [1.0]], ids=str)
def test_shares_may_sum_to_one_up_to_rounding(shares: list[float]) -> None:
    parts = [Constant(float(index)) for index in range(len(shares))]
    joined = Join(tuple(shares), tuple(parts))
    starts = [sum(shares[:index]) for index in range(len(shares))]
    assert [joined(start) for start in starts] == list(map(float, range(len(shares))))
    assert joined(1.0) == len(shares) - 1


@pytest.mark.parametrize(("share", "end"), [(0.0, 1e-7), (1.0, 1e-2)])
def test_one_cycle_without_one_of_its_halves(share: float, end: float) -> None:
    assert one_cycle(1e-2, pct_start=share)(1.0) == pytest.approx(end)


def test_cycles_of_equal_length() -> None:
    """cycle_mult 1: every cycle starts at the maximum."""
    schedule = warm_restarts(1.0, cycles=4, cycle_mult=1)
    assert [schedule(k / 4) for k in range(4)] == pytest.approx([1.0] * 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Exponential(0.0, 1.0),
            r"Exponential: start and end must .*not be 0, got 0\.0 and 1\.0\. Use Linear or C",
        ),
        (lambda: Exponential(1.0, 0.0), r"Exponential: .*got 1\.0 and 0\.0"),
        (lambda: Exponential(1.0, -1.0), r"Exponential: start and end must have one sign"),
        (lambda: Join((), ()), r"Join: needs one share for each part, got 0 for 0"),
        (lambda: Join((1.0,), ()), r"Join: needs one share for each part, got 1 for 0"),
        (
            lambda: Join((0.5, 0.5), (Constant(1.0),)),
            r"Join: needs one share for each part, got 2 for 1",
        ),
        (
            lambda: Join((0.5, 0.4), (Constant(1.0),) * 2),
            r"Join: shares must be at least 0 and sum to 1, got \(0\.5, 0\.4",
        ),
        (lambda: Join((1.5, -0.5), (Constant(1.0),) * 2), r"Join: shares must be at least 0"),
        (lambda: warmup_cosine(0.1, warmup=100), r"100 steps of 1000 are 100 / 1000"),
        (lambda: one_cycle(0.1, pct_start=1.5), r"Join: shares must be at least 0"),
    ],
    ids=[
        "from 0",
        "to 0",
        "signs",
        "nothing",
        "no part",
        "parts",
        "sum",
        "negative",
        "steps",
        "cycle",
    ],
)
def test_schedules_that_cannot_be_are_refused(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_schedules_survive_pickle_and_deepcopy(name: str) -> None:
    schedule, _ = TABLE[name]
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert copy.deepcopy(schedule) == schedule


def test_schedules_are_values(name: str) -> None:
    schedule, _ = TABLE[name]
    twin = copy.deepcopy(schedule)
    assert hash(twin) == hash(schedule)
    assert [other for other, _ in TABLE.values() if other == schedule] == [schedule]


def test_repr_is_the_call_that_makes_the_schedule(name: str) -> None:
    schedule, _ = TABLE[name]
    assert eval(repr(schedule)) == schedule


def test_a_list_of_parts_makes_the_same_join() -> None:
    assert Join([0.3, 0.7], list(BOOK.parts)) == BOOK  # type: ignore[arg-type]


def test_a_schedule_drives_a_hyper() -> None:
    """Rates 0.5 and 0.25 along a gradient of 1."""
    opt, params, schedule = sgd(), torch.tensor([1.0]), Linear(0.5, 0.0)
    state = opt.init(params)
    for step in range(2):
        params, state = opt(params, torch.ones(1), state, {"lr": schedule(step / 2)})
    assert float(params) == 0.25
