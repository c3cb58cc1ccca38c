"""kill -9, and signals, for some of several processes: what was kept is whole, and a run goes on on
any number of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.places import LONG, in_process, times
from tests.loop.saving import ROOT

FRESH = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Else torchrun keeps one store for all starts, and gloo may find the addresses of dead ranks in
it: the ranks then fail, or wait, in init_process_group (pytorch issue 135712).
"""


def test_pieces_are_whole_whichever_rank_is_killed_and_whenever(tmp_path: Path) -> None:
    found = in_process("pieces", tmp_path, times(6, 200), script="pieces_script")
    assert (found["wrong"], found["left"]) == ([], [])
    assert found["ends"].keys() == {"killed", "lonely", "done"}
    assert found["within a save"] >= times(0, 40)


def test_pieces_are_whole_before_whichever_line_a_rank_is_killed(tmp_path: Path) -> None:
    found = in_process("lines", tmp_path, times(170, 11), script="pieces_script")
    assert found["wrong"] == []
    assert found["found"] == [1, 2]
    assert found["ends"].keys() == {"killed", "lonely", "done"}


@pytest.mark.parametrize("kind", ["whole", "fetched", "pieces"] if LONG else ["pieces"])
def test_a_run_of_two_ranks_is_killed_and_started_again(tmp_path: Path, kind: str) -> None:
    found = in_process("again", tmp_path, kind, times(1, 20), script="rank_script")
    assert found["same"]
    assert found["ends"]["killed"] >= times(1, 15)


@pytest.mark.parametrize("kind", ["whole", "fetched", "pieces"] if LONG else ["fetched"])
def test_a_run_that_is_killed_goes_on_on_two_three_one_and_two_ranks(
    tmp_path: Path, kind: str
) -> None:
    found = in_process("chain", tmp_path, kind, times(1, 8), script="rank_script")
    assert found["wrong"] == []
    assert found["distance"] <= 1e-12
    assert found["went on"] >= times(1, 12)
    assert found["ends"].keys() <= {"killed", "lonely", "done"}


def test_two_signals_for_each_rank_leave_no_pieces_of_different_states(tmp_path: Path) -> None:
    found = in_process("twice", tmp_path, times(2, 20), script="rank_script")
    assert found["wrong"] == []
    assert found["checkpoints"] > 0
    assert "stopped" in found["ends"]


@pytest.mark.skipif(not LONG, reason="FAULTS=long: torchrun and four ranks import torch each")
@pytest.mark.parametrize("kind", ["whole", "pieces"])
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_starts_a_run_again_when_a_rank_is_killed(
    tmp_path: Path, kind: str, victim: int
) -> None:
    options = "--standalone --nproc-per-node 2 --max-restarts 1 --monitor-interval 0.1"
    script = ["-m", "tests.faults.torchrun_script", tmp_path, kind, victim, 7, "after_backward"]
    command = [sys.executable, "-m", "torch.distributed.run", *options.split(), *script]
    process = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=FRESH, timeout=300
    )
    assert process.returncode == 0, process.stderr
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["again"] == 1
        assert 0 < found["begun"] <= 8
        assert found["same"]
