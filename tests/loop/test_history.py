"""The log: an immutable sequence that is cheap to extend; and the table around it."""

import pickle
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop import History, fit
from loop.history import Log
from tests.loop.helpers import learner


def log_of(*items: int) -> Log:
    log = Log()
    for item in items:
        log = log.append(item)
    return log


def test_appending_leaves_the_log_as_it_was() -> None:
    log = log_of(1, 2)
    log.append(3)
    assert list(log) == [1, 2]


def test_forks_do_not_see_each_other() -> None:
    base = log_of(1, 2)
    left, right = base.append(3).append(4), base.append(5)
    assert (list(left), list(right), list(base)) == ([1, 2, 3, 4], [1, 2, 5], [1, 2])


def test_a_fork_of_a_fork() -> None:
    base = log_of(1)
    left = base.append(2)
    right = base.append(3)
    assert (list(right.append(4)), list(left.append(5)), list(right)) == (
        [1, 3, 4],
        [1, 2, 5],
        [1, 3],
    )


def test_the_list_that_a_log_is_made_of_may_change() -> None:
    items = [1, 2]
    log = Log(items)
    items.append(3)
    assert list(log) == [1, 2]


def test_an_iterator_does_not_see_what_is_appended_meanwhile() -> None:
    log = log_of(1, 2)
    iterator = iter(log)
    next(iterator)
    log.append(3)
    assert list(iterator) == [2]


@pytest.mark.parametrize("index", [0, 2, -1, -3])
def test_items_by_index(index: int) -> None:
    assert log_of(5, 6, 7)[index] == [5, 6, 7][index]


@pytest.mark.parametrize("index", [3, -4, 100])
def test_an_index_out_of_range(index: int) -> None:
    log = log_of(5, 6, 7)
    log.append(8)
    with pytest.raises(IndexError, match="out of range for 3 items"):
        log[index]


@pytest.mark.parametrize(
    "part", [slice(1, 3), slice(-2, None), slice(None, None, -1), slice(0, 100, 2), slice(2, 1)]
)
def test_slices_are_those_of_a_list(part: slice) -> None:
    log = log_of(5, 6, 7, 8)
    log.append(9)
    assert log[part] == [5, 6, 7, 8][part]


def test_a_log_is_a_sequence() -> None:
    log = log_of(5, 6, 5)
    assert isinstance(log, Sequence)
    assert (len(log), 6 in log, 9 in log, log.count(5), log.index(6), list(reversed(log))) == (
        3, True, False, 2, 1, [5, 6, 5]
    )  # fmt: skip


def test_logs_are_equal_if_their_items_are() -> None:
    assert log_of(1, 2) == log_of(1, 2) == [1, 2] == log_of(1, 2)
    assert log_of(1, 2) != log_of(1, 3)
    assert log_of(1, 2) != log_of(1)
    assert log_of(1) != 1


def test_a_log_has_no_hash() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(log_of(1))


def test_a_pickled_log_has_what_it_saw_and_no_more() -> None:
    log = log_of(1, 2)
    log.append(3)
    copy = pickle.loads(pickle.dumps(log))
    assert copy == [1, 2]
    assert list(copy.append(4)) == [1, 2, 4]


def test_a_log_shows_itself() -> None:
    assert repr(log_of(1, 2)) == "Log([1, 2])"
    assert repr(log_of(*range(9))) == "Log of 9 items"


def test_an_empty_log() -> None:
    assert list(Log()) == []
    assert not Log()


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers()), max_size=60))
@settings(max_examples=100, derandomize=True, database=None, deadline=None)
def test_logs_are_tuples_that_grow(moves: list[tuple[int, int]]) -> None:
    """Append to any log so far, again and again: each is the tuple that it would be."""
    pairs: list[tuple[Log, tuple[int, ...]]] = [(Log(), ())]
    for which, item in moves:
        log, items = pairs[which % len(pairs)]
        pairs.append((log.append(item), (*items, item)))
    for log, items in pairs:
        assert tuple(log) == items
        assert len(log) == len(items)
        assert log[1:-1] == list(items[1:-1])


def test_a_column_of_the_table() -> None:
    history = History(rows=({"epoch": 0, "accuracy": 0.5}, {"epoch": 1}))
    assert history.column("accuracy") == [0.5, None]


def test_histories_are_values() -> None:
    mine = learner()
    end = fit(mine, mine.init(), 1)
    assert end.history == fit(mine, mine.init(), 1).history
    assert pickle.loads(pickle.dumps(end.history)) == end.history


def test_the_history_of_a_fork_is_its_own() -> None:
    mine = learner()
    base = fit(mine, mine.init(), 1)
    left, right = fit(mine, base, 2), fit(mine, base, 1, lr=0.5)
    assert [len(state.history.losses) for state in (base, left, right)] == [3, 9, 6]
    assert list(left.history.hypers["lr"]) == [0.1] * 9
    assert list(right.history.hypers["lr"]) == [0.1] * 3 + [0.5] * 3


def test_a_state_can_be_pickled_and_gone_on_from() -> None:
    mine = learner()
    middle = fit(mine, mine.init(), 1)
    copy = pickle.loads(pickle.dumps(middle))
    assert fit(mine, copy, 1).history == fit(mine, middle, 1).history
