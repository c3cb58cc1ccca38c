"""The log: an immutable sequence that is cheap to extend; and the table around it."""

import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
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


# In little memory


def test_a_million_numbers_are_kept_in_columns() -> None:
    log = Log([0.5 * count for count in range(5000)])
    assert [type(run).__name__ for run in log.runs()] == ["Numbers"]
    assert (log[4999], log[1023], log[1024], len(log)) == (2499.5, 511.5, 512.0, 5000)


def test_0d_tensors_are_kept_as_one_and_come_out_as_they_went_in() -> None:
    log = Log()
    for count in range(3000):
        log = log.append(torch.tensor(float(count), dtype=torch.bfloat16))
    assert [type(run).__name__ for run in log.runs()] == ["Scalars"]
    assert (log[2500].shape, log[2500].dtype, float(log[-1])) == ((), torch.bfloat16, 2992.0)


def test_a_hyper_that_nothing_changes_takes_a_byte_a_batch() -> None:
    rates = {"weight": 0.1, "bias": 0.2}
    log = Log()
    for _ in range(3000):
        log = log.append(rates)
    assert [type(run).__name__ for run in log.runs()] == ["Repeated"]
    assert log[2999] is rates


def test_a_tree_of_hypers_is_kept_column_by_column() -> None:
    log = Log()
    for count in range(3000):
        log = log.append({"weight": [0.1 * count], "bias": (0.2 * count, None)})
    assert [type(run).__name__ for run in log.runs()] == ["Trees"]
    assert log[2000] == {"weight": [0.1 * 2000], "bias": (0.2 * 2000, None)}
    assert list(log[2000]) == ["weight", "bias"]


def test_what_is_not_alike_stays_as_it_is() -> None:
    items = [True, 2**70, "a", None, 1, 1.0, torch.ones(2)] * 200
    assert all(left is right for left, right in zip(Log(items), items, strict=True))


def test_a_fork_in_the_middle_of_what_is_packed() -> None:
    long = Log(list(range(5000)))
    short = Log().append(0)
    for item in range(1, 2000):
        short = short.append(item)
    cut = short
    for item in range(2000, 4000):
        short = short.append(item)
    assert list(cut.append(-1)) == [*range(2000), -1]
    assert list(short) == list(range(4000)) == long[:4000]
    assert list(cut) == list(range(2000))


def test_forks_in_threads_do_not_see_each_other() -> None:
    base = Log(list(range(100)))

    def grow(thread: int) -> Log:
        log = base
        for _ in range(3000):
            log = log.append(thread)
        return log

    with ThreadPoolExecutor(4) as pool:
        for thread, log in enumerate(pool.map(grow, range(4))):
            assert list(log) == [*range(100), *[thread] * 3000]


@pytest.mark.parametrize("size", [1023, 1024, 1025, 3000])
def test_a_pickled_log_of_any_length_comes_back(size: int) -> None:
    items = [{"lr": 0.1 * count} for count in range(size)]
    assert pickle.loads(pickle.dumps(Log(items))) == items


def test_tensors_that_are_tracked_are_not_packed() -> None:
    tracked = torch.ones((), requires_grad=True)
    log = Log([tracked] * 2000)
    assert all(item is tracked for item in log)


def test_an_unknown_column_is_an_error_with_the_names_that_there_are() -> None:
    history = History(rows=({"epoch": 0, "valid_loss": 0.5}, {"epoch": 1, "valid_loss": 0.4}))
    with pytest.raises(ValueError, match="no column 'val_loss'.*Did you mean 'valid_loss'"):
        history.column("val_loss")


def test_a_column_that_comes_later_is_none_before() -> None:
    history = History(rows=({"epoch": 0}, {"epoch": 1, "accuracy": 0.5}))
    assert history.column("accuracy") == [None, 0.5]


def test_a_history_without_rows_knows_no_columns() -> None:
    assert History().column("valid_loss") == []
