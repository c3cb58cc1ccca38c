"""ShortEpoch: how many batches it leaves, and who sees the last."""

from typing import Any

import pytest

from loop import (
    CollectData,
    DataLoaders,
    RecordValues,
    ShortEpoch,
    accuracy,
    fit,
    predict,
    validate,
)
from tests.comparing import assert_same
from tests.loop.helpers import Kept, assert_same_run, batches, full, learned, learner, loaders, on


def counts(callback: ShortEpoch, train: int, valid: int, epochs: int = 1) -> tuple[int, int]:
    """How many training and validation batches an epoch has."""
    mine = learner(data=loaders(train, valid))
    seen = fit(mine, mine.init(), epochs, [callback, CollectData(("training",))]).memory[
        "collect_data"
    ]
    training = sum(entry["training"] for entry in seen)
    return training // epochs, (len(seen) - training) // epochs


@pytest.mark.parametrize(
    ("pct", "expected"),
    [(0.01, 1), (0.1, 1), (0.11, 2), (0.3, 3), (0.7, 7), (0.99, 10), (1.0, 10), (1, 10)],
)
def test_a_share_is_rounded_up_to_whole_batches(pct: float, expected: int) -> None:
    assert counts(ShortEpoch(pct), 10, 10) == (expected, expected)


@pytest.mark.parametrize("count", [7, 29, 100])
def test_every_share_in_whole_batches_is_exact(count: int) -> None:
    """Though k / n is rounded."""
    for taken in range(1, count + 1):
        stops = [done for done in range(1, count + 1) if done / count >= taken / count]
        assert stops[0] == taken


def test_validation_is_whole_if_asked() -> None:
    assert counts(ShortEpoch(0.3, short_valid=False), 10, 6) == (3, 6)


@pytest.mark.parametrize(("taken", "expected"), [(1, (1, 1)), (3, (3, 2)), (50, (4, 2))])
def test_so_many_batches(taken: int, expected: tuple[int, int]) -> None:
    assert counts(ShortEpoch(batches=taken), 4, 2, epochs=2) == expected


def test_the_parameters_are_those_of_a_run_on_the_first_batches() -> None:
    mine = learner(data=loaders(5))
    short = learner(data=DataLoaders(batches(5, seed=1)[:2], batches(2, seed=2)))
    start = mine.init()
    end = fit(mine, start, 3, [ShortEpoch(0.4, short_valid=False)])
    expected = fit(short, start, 3)
    assert_same(learned(end), learned(expected))
    assert end.history.rows == expected.history.rows
    assert end.train_iter == 6


def test_everyone_sees_the_last_batch() -> None:
    mine = learner()
    callbacks = [ShortEpoch(batches=2), RecordValues(iter=lambda state: state.iter)]
    assert list(fit(mine, mine.init(), 1, callbacks).memory["record_values"]["iter"]) == [0, 1]


def test_the_row_is_measured_on_what_was_seen() -> None:
    """A short phase has a row with all columns."""
    mine = learner(data=loaders(3, 2))
    (row,) = fit(mine, mine.init(), 1, [ShortEpoch()]).history.rows
    assert None not in row.values()


def test_evaluation_takes_all_data() -> None:
    mine, plain = learner(callbacks=[ShortEpoch(batches=1)]), learner()
    start = plain.init()
    assert validate(mine, start) == validate(plain, start)
    assert len(predict(mine, start)) == 8


class Unknown:
    """A loader without a length."""

    def __iter__(self) -> Any:
        return iter(batches(3, seed=1))


def test_a_loader_without_a_length_needs_a_number_of_batches() -> None:
    mine = learner(data=DataLoaders(Unknown(), Unknown()))
    start = mine.init()
    assert fit(mine, start, 2, [ShortEpoch(batches=2)]).train_iter == 4
    with pytest.raises(ValueError, match=r"ShortEpoch: data.train has no len\(\).* batches=10"):
        fit(mine, start, 1, [ShortEpoch(0.5)])


def test_only_what_is_shortened_needs_a_length() -> None:
    mine = learner(data=DataLoaders(batches(3, seed=1), Unknown()))
    start = mine.init()
    assert fit(mine, start, 1, [ShortEpoch(0.5, short_valid=False)]).train_iter == 2
    with pytest.raises(ValueError, match="ShortEpoch: data.valid"):
        fit(mine, start, 1, [ShortEpoch(0.5)])
    validate(
        learner(data=mine.data, callbacks=[ShortEpoch(0.5)], metrics=[accuracy_of_first]), start
    )


def accuracy_of_first(pred: Any, y: Any) -> Any:
    """A metric."""
    return accuracy(pred, y[:, 0])


def test_a_short_run_can_be_resumed() -> None:
    mine = full(callbacks=[ShortEpoch(0.6)])
    states: list[Any] = []
    start = mine.init()
    kept = Kept(start)
    end = fit(mine, start, 2, [on("watch", committed=states.append)])
    for state in states:
        if state.done:
            assert_same_run(fit(mine, state, 2, resume=True), end)
    assert end.train_iter == 4
    kept.check()


@pytest.mark.parametrize(
    "options", [{"pct": 0}, {"pct": 1.01}, {"pct": float("nan")}, {"batches": 0}, {"batches": 1.5}]
)
def test_numbers_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"ShortEpoch: {next(iter(options))} must be"):
        ShortEpoch(**options)
