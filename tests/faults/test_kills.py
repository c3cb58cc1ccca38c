"""kill -9 at random moments of saving and of whole runs: nothing that was kept is lost."""

from pathlib import Path

from tests.faults.places import in_process, times


def test_what_is_saved_is_whole_whenever_the_process_is_killed(tmp_path: Path) -> None:
    found = in_process("saving", tmp_path, times(30, 1000))
    assert (found["wrong"], found["left"]) == ([], [])
    assert found["saved"] > 0


def test_the_file_of_the_best_weights_is_whole_whenever_the_process_is_killed(
    tmp_path: Path,
) -> None:
    assert in_process("weights", tmp_path, times(20, 500)) == {"wrong": [], "left": []}


def test_runs_that_are_killed_again_and_again_end_as_those_that_are_not(tmp_path: Path) -> None:
    found = in_process("runs", tmp_path, times(15, 1000))
    assert found["kills"] >= times(15, 1000)
    assert (found["same"], found["left"]) == (True, [])


def test_a_process_that_is_killed_while_it_compiles_leaves_nothing_that_is_run(
    tmp_path: Path,
) -> None:
    assert in_process("kernels", tmp_path, times(6, 100)) == {"good": True}


def test_a_run_that_keeps_its_best_weights_is_killed(tmp_path: Path) -> None:
    assert in_process("keeper", tmp_path, times(10, 200))["read"] > 0
