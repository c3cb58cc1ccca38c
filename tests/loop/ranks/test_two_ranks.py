"""Several ranks hold the same state, bit for bit, and it is that of one process."""

import random
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from loop import (
    Callback,
    MixedPrecision,
    TerminateOnNaN,
    fit,
    parallel,
)
from loop.run.chance import key
from tests.faults.places import LONG, times
from tests.loop.ranks.learners import (
    CASES,
    Normed,
    as_numbers,
    learner,
    numbers,
    trained,
)
from tests.loop.ranks.runs import (
    Looking,
    as_numbers_of_two_epochs,
    cancelled,
    collectives,
    compiled,
    compiled_with_an_unused,
    dense,
    dropped,
    every_commit,
    first_part,
    kept_in,
    measured,
    measured_by,
    normed,
    not_written,
    read_at_once,
    said,
    second_part,
    signalled,
    signalled_in,
    signalled_late,
    stopped_early,
    undisturbed,
    with_a_nan,
)
from tests.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:Learner. the loss does not depend on 1 parameter")
"""Leaves that no rank uses, or only one, are part of what is tried."""


def check_near(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal but for the order of additions."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        wide = other.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-11 if wide else 1e-6, atol=1e-12)


def check_equal(every: list[list[Tensor]]) -> None:
    """Every rank has the same bits."""
    for other in every[1:]:
        assert all(map(torch.equal, every[0], other))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_end_where_one_process_ends(ranks: Ranks, case: str) -> None:
    every = ranks(as_numbers, case)
    check_equal(every)
    check_near(every[0], numbers(trained(case, ranks=False)))


@pytest.mark.parametrize("case", ["adamw", "accumulated", "tiny batches"])
def test_three_ranks_end_where_one_process_ends(three: Ranks, case: str) -> None:
    every = three(as_numbers, case)
    check_equal(every)
    check_near(every[0], numbers(trained(case, ranks=False)))


def test_every_commit_has_the_same_bits_on_all_ranks(ranks: Ranks) -> None:
    one, other = ranks(every_commit)
    assert len(one) > 5
    for mine, theirs in zip(one, other, strict=True):
        assert all(map(torch.equal, mine, theirs))


# What else takes a learner.


def test_predict_validate_and_lr_find_are_those_of_one_process(ranks: Ranks) -> None:
    expected = measured_by(learner())
    for found in ranks(measured):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("callbacks", [(), (Looking(-60),)])
def test_a_compiled_batch_has_its_collectives_inside(
    ranks: Ranks, callbacks: Sequence[Callback]
) -> None:
    every = ranks(compiled, callbacks)
    check_equal(every)
    check_near(every[0], numbers(fit(dense(), dense().init(), 2)))


def test_a_compiled_batch_may_leave_a_parameter_unused(ranks: Ranks) -> None:
    every = ranks(compiled_with_an_unused)
    check_equal(every)
    mine = dense(unused=True)
    check_near(every[0], numbers(fit(mine, mine.init(), 2)))


# BatchNorm, dropout.


def test_global_batch_norm_is_that_of_one_process(ranks: Ranks) -> None:
    every = ranks(normed, "global")
    check_equal(every)
    mine = learner(fs.sgd(lr=0.1, mom=0.9), model=Normed)
    check_near(every[0], numbers(fit(mine, mine.init(), 2)))


def test_batch_norm_of_parts_leaves_the_ranks_alike(ranks: Ranks) -> None:
    check_equal(ranks(normed, "of parts"))


def test_dropout_differs_between_ranks_and_their_states_do_not(ranks: Ranks) -> None:
    (one, state), (other, other_state) = ranks(dropped)
    assert not torch.equal(one, other)
    check_equal([state, other_state])


def test_cancelled_batches_leave_the_ranks_alike(ranks: Ranks) -> None:
    check_equal(ranks(cancelled))


# Stops.


def test_a_nan_in_one_part_ends_the_run_of_all(ranks: Ranks) -> None:
    (one, state), (other, other_state) = ranks(with_a_nan)
    assert (one, other) == (7, 7)
    assert all(bool(number.isfinite().all()) for number in state[:5])
    check_equal([state, other_state])


def test_early_stopping_is_agreed(ranks: Ranks) -> None:
    assert ranks(stopped_early) == [2, 2]


def test_a_signal_at_an_event_ends_all_ranks_at_the_same_batch(ranks: Ranks) -> None:
    mine = ranks(as_numbers_of_two_epochs)[0]
    for trial in range(times(30, 122)):
        rank, number = trial % 2, (signal.SIGINT, signal.SIGTERM)[trial // 2 % 2]
        event = 1 + (trial if LONG else key(trial)) % 122  # so many there are
        one, other = ranks(signalled, rank, event, number)
        assert one[0] == other[0] == signal.Signals(number).name, (trial, event)
        assert one[1] == other[1]
        check_equal([one[2], other[2]])
        check_equal([one[3], other[3], mine])


@pytest.mark.parametrize(("kind", "trials"), [("whole", times(5, 100)), ("pieces", times(2, 60))])
def test_a_signal_at_any_moment_ends_all_ranks_at_the_same_batch(
    ranks: Ranks, tmp_path: Path, kind: str, trials: int
) -> None:
    """A run that has got it goes on from its folder, to the same bits."""
    (seconds, mine), _ = ranks(undisturbed, str(tmp_path / "undisturbed"), kind)
    chance, within, trial = random.Random(f"{kind} 8"), Counter[str](), 0
    while within.total() < trials:
        trial += 1
        rank, moment = chance.randrange(2), chance.random() * seconds
        one, other = ranks(signalled_in, str(tmp_path / f"{trial}"), kind, rank, moment)
        assert one[:2] == other[:2], (trial, rank, moment)
        check_equal([one[3], other[3], mine])
        if one[0]:  # else it was before the run, or after it
            within[one[2] or other[2] or "beginning"] += 1
        assert trial <= 9 + 3 * trials, within
    print(kind, trial, dict(within))  # pytest -s shows it
    if LONG:
        assert within["validation"] > 0


def test_a_signal_that_nobody_can_be_told_of_is_for_whoever_comes_after_the_run(
    ranks: Ranks,
) -> None:
    assert ranks(signalled_late) == [("", 1, True), ("", 1, False)]


# Files.


def test_rank_zero_writes_and_all_end_with_the_best(ranks: Ranks, tmp_path: Path) -> None:
    (names, one), (_, other) = ranks(kept_in, str(tmp_path))
    assert names == ["best-0.safetensors", "run"]
    check_equal([one, other])


def test_when_a_run_is_over_its_last_checkpoint_is_there_on_every_rank(
    ranks: Ranks, tmp_path: Path
) -> None:
    assert ranks(read_at_once, str(tmp_path)) == [5, 5]


def test_all_ranks_are_told_that_rank_zero_cannot_write(ranks: Ranks, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    one, other = ranks(not_written, folder)
    assert folder in one
    assert "rank 0 could not write its part" in other
    assert folder in other


def test_a_run_goes_on_on_another_number_of_ranks(
    ranks: Ranks, three: Ranks, tmp_path: Path
) -> None:
    folder = str(tmp_path / "run")
    ranks(first_part, folder, 3)
    every = three(second_part, folder, 3)
    check_equal(every)
    check_near(every[0], numbers(trained("adamw", ranks=False)))


def test_one_process_goes_on_with_the_run_of_two(ranks: Ranks, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    ranks(first_part, folder, 3)
    mine = learner()
    end = fit(mine, mine.init(seed=5), 3, resume=folder)
    check_near(numbers(end), numbers(trained("adamw", ranks=False)))


# Refusals.


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("params", "begin with another params, buffers or optimizer state .* torch.manual_seed"),
        ("data", "begin with another number of batches each"),
        ("place", "begin with another place in the run each"),
        ("twice", "the learner is parallel already"),
        ("sam", "takes a second gradient"),
        ("mesh", r"2 dimensions, \('data', 'model'\).* mesh\['data'\]"),
        ("sampler", "DistributedSampler, which cuts the data already"),
        ("weight", "weight must be 'samples' or 'targets'.*'tokens'"),
        ("other data", "other data than parallel has cut"),
    ],
)
def test_what_would_go_wrong_is_refused_on_all_ranks(ranks: Ranks, what: str, words: str) -> None:
    for text in ranks(said, what):
        with pytest.raises(ValueError, match=words):
            raise ValueError(text)


def test_without_torch_distributed_the_error_says_how_to_start_it() -> None:
    with pytest.raises(RuntimeError, match="init_process_group.*torchrun"):
        parallel(learner())


# Collectives.


@pytest.mark.parametrize(
    ("looking", "number"), [((), 1), ((MixedPrecision(),), 1), ((TerminateOnNaN(),), 2)]
)
def test_a_batch_takes_one_collective_unless_somebody_looks_at_its_loss(
    ranks: Ranks, looking: Sequence[Callback], number: int
) -> None:
    assert ranks(collectives, looking) == [number] * 2
