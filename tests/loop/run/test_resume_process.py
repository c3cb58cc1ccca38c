"""A run with everything in it, stopped in any batch, goes on in another process and ends the same,
bit for bit.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from loop import State, load
from tests.loop.resume_script import PLACES, RUNS, Place, folder_of
from tests.loop.saving import identical
from tests.processes import python


def script(*arguments: object) -> None:
    """A new process that runs a function of the script; warnings are errors there too."""
    done = python("-W", "error", "-m", "tests.loop.resume_script", *arguments)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Ends:
    """What a run, and those that were stopped and gone on with, have left in a folder."""

    root: Path
    kind: str

    @property
    def end(self) -> State:
        """Of the run that was never stopped."""
        return load(self.root / "end")

    def stopped(self, place: Place) -> State:
        """The state of the run that was stopped there."""
        return load(folder_of(self.root, place) / "stopped")

    def resumed(self, place: Place) -> State:
        """The end of that run."""
        return load(folder_of(self.root, place) / "end")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process stops the runs, another goes on with them."""
    folder = tmp_path_factory.mktemp("runs")
    script("stop", folder)
    script("go_on", folder)
    return folder


@pytest.fixture(params=RUNS, ids=lambda run: f"{run[0]}, {run[1]} workers")
def ends(request: pytest.FixtureRequest, root: Path) -> Ends:
    """Of one kind of run."""
    kind, workers = request.param
    return Ends(root / f"{kind}-{workers}", kind)


def test_it_ends_as_if_it_had_never_been_stopped(ends: Ends) -> None:
    """L15. Every field: parameters, optimizer, memory, history, hypers, counters; whatever the
    number of workers.
    """
    expected = vars(ends.end)
    for place in PLACES:
        found = vars(ends.resumed(place))
        assert [name for name in expected if not identical(found[name], expected[name])] == [], (
            place
        )


def test_its_table_on_the_disk_is_the_same(ends: Ends) -> None:
    expected = (ends.root / "table.csv").read_bytes()
    assert len(expected.splitlines()) == 3
    for place in PLACES:
        assert (folder_of(ends.root, place) / "table.csv").read_bytes() == expected, place


def test_it_was_stopped_everywhere(ends: Ends) -> None:
    """In training, in validation, and with half of an accumulated gradient in hand."""
    found = [
        (*state.done, "gradient_accumulation" in state.memory)
        for state in map(ends.stopped, PLACES)
    ]
    assert found == [
        (epoch, phase, number, phase == 0 and number in (1, 3))
        for epoch in range(2)
        for phase, count in ((0, 5), (1, 2))
        for number in range(count)
    ]


def test_everything_had_its_say(ends: Ends) -> None:
    """Of six steps some were skipped, the scale fell and rose, the run was stopped early, the best
    epoch came back.
    """
    end = ends.end
    taken = int(end.opt_state["step"].max())
    assert 1 < taken < 6
    assert end.memory["average_params"].count == taken
    assert float(end.memory["mixed_precision"]["scale"]) == 2.0 ** (17 + taken - (6 - taken))
    assert (end.epochs_seen, end.n_epoch) == (2, 3)
    assert end.memory["save_model"]["epoch"] == (1 if ends.kind == "plateau" else 2)
    assert end.hyper["lr"] == (0.01 if ends.kind == "plateau" else 0.02)
    assert len(set(end.history.hypers["lr"])) == (1 if ends.kind == "plateau" else 10)
    assert len(set(end.history.hypers["mom"])) == 10
