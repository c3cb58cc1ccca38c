"""Every signal at every place, in fastai's Learner and in ours: the same, but for the differences
listed here.
"""

from dataclasses import dataclass

import pytest
import torch

from loop import events
from tests.peers.fastai_runs import SIGNAL_NAMES, callbacks, fit_both


@dataclass(frozen=True)
class Difference:
    """If one of these signals is raised at one of these events, both loops differ in this."""

    what: str  # "events" delivered, how the run "ended", "weights" then, or "losses" recorded
    events: str
    signals: str
    times: tuple[int, ...]  # at which occurrences of the event outside validation
    why: str


EVERY, BUT_LAST = (0, 1, 2, 3), (0, 1, 2)  # two epochs of two training batches

DIFFERENCES = (
    Difference(
        "events", "before_backward", "backward", EVERY,
        "a cancelled backward scope leaves no gradients, so the step scope is not entered; fastai "
        "enters it",
    ),
    Difference(
        "weights", "before_backward", "backward", (1, 2, 3),
        "so no step is made; fastai's momentum goes on with gradients of zero, once it has any",
    ),
    Difference(
        "events ended", "before_epoch", "epoch", (0,),
        "an epoch without a batch has an empty row; fastai's Recorder fails on it, if no epoch was "
        "before it",
    ),
    Difference(
        "weights", "after_backward before_step after_step", "batch", BUT_LAST,
        "gradients belong to their batch; fastai clears them at the end of one that is not "
        "cancelled, and adds them "
        "to those of the next otherwise",
    ),
    Difference(
        "weights", "after_backward before_step after_step", "epoch train", (0, 1),
        "the same, with the next epoch's first batch",
    ),
    Difference(
        "losses", "before_batch after_pred after_loss", "batch", EVERY,
        "a batch that the Recorder has seen no loss of is not recorded; fastai records the loss of "
        "the one before",
    ),
    Difference(
        "losses", "before_backward after_backward before_step after_step after_batch",
        "fit epoch train", EVERY,
        "a batch whose loss is known is recorded, whatever ends it; fastai does so in after_batch, "
        "if it gets there",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A delivered event: by number, and as the nth of its name in training (and around it) or in
    validation.
    """

    position: int
    event: str
    validation: bool
    time: int

    def __str__(self) -> str:
        return f"{'validation ' * self.validation}{self.event} {self.time}"


def places() -> list[Place]:
    """All events of a run without signals."""
    found: list[Place] = []
    validation = False
    for position, event in enumerate(NORMAL.events):
        validation = (validation or event == "before_validate") and event != "after_epoch"
        time = sum((place.event, place.validation) == (event, validation) for place in found)
        found.append(Place(position, event, validation, time))
    return found


def differs_in(plan: dict[int, str]) -> set[str]:
    """What both loops differ in. Losses that follow from other weights are not counted, nor what an
    error cuts off.
    """
    theirs, ours = fit_both(plan)
    found = {"events"} if theirs.events != ours.events else set()
    if theirs.end != "finished" or ours.end != "finished":
        return found | ({"ended"} if theirs.end != ours.end else set())
    if not all(
        torch.allclose(theirs.params[name], ours.params[name], atol=1e-6) for name in ours.params
    ):
        return {*found, "weights"}
    return found if ours.losses == pytest.approx(theirs.losses, rel=1e-5) else {*found, "losses"}


def listed(place: Place, signal: str) -> set[str]:
    """What they should differ in."""
    found = {
        what
        for one in DIFFERENCES
        for what in one.what.split()
        if not place.validation
        and place.event in one.events.split()
        and signal in one.signals.split()
        if place.time in one.times
    }
    return found - {"losses"} if "weights" in found else found


NORMAL, MINE = fit_both({})
PLACES = places()


def test_a_run_without_signals() -> None:
    assert NORMAL.events == MINE.events
    assert len(NORMAL.events) == 62
    assert differs_in({}) == set()


def test_the_names_of_events_and_signals() -> None:
    """fastai has one event more: making a learner is no event in ours, which is a record."""
    theirs = {name for name in dir(callbacks.event) if name[0] != "_"}
    assert theirs == {*events(), "after_create"}
    assert len({name for name in dir(callbacks) if name.startswith("Cancel")}) == len(SIGNAL_NAMES)


@pytest.mark.parametrize("signal", SIGNAL_NAMES)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_every_signal_at_every_place(place: Place, signal: str) -> None:
    """A signal that nothing can catch ends both runs at once: as itself in fastai, as a SignalError
    in ours.
    """
    assert differs_in({place.position: signal}) == listed(place, signal)


@pytest.mark.parametrize("second", SIGNAL_NAMES)
@pytest.mark.parametrize("first", SIGNAL_NAMES)
@pytest.mark.parametrize("later", [1, 2])
def test_every_signal_in_the_events_after_a_signal(first: str, second: str, later: int) -> None:
    """In after_cancel_x, and in after_x."""
    position = NORMAL.events.index(f"before_{first}")
    theirs, ours = fit_both({position: first, position + later: second})
    assert (ours.events, ours.end) == (theirs.events, theirs.end)
    expected = [f"before_{first}", f"after_cancel_{first}", f"after_{first}"][: later + 1]
    assert ours.events[position : position + later + 1] == expected


@pytest.mark.parametrize("error", [ValueError, KeyError, SystemError])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_an_error_at_every_place(place: Place, error: type[Exception]) -> None:
    theirs, ours = fit_both({place.position: error})
    assert ours.events == theirs.events == NORMAL.events[: place.position + 1]
    assert ours.end == theirs.end == error.__name__


def test_stop_iteration_is_an_error() -> None:
    """In fastai it ends the event without a word, or as something else."""
    theirs, ours = fit_both({PLACES[5].position: StopIteration})
    assert (theirs.end, ours.end) == ("finished", "RuntimeError")


def test_every_listed_difference_has_its_place() -> None:
    found = {(place.event, place.time) for place in PLACES if not place.validation}
    for one in DIFFERENCES:
        assert {*one.signals.split()} <= {*SIGNAL_NAMES}
        assert {(event, time) for event in one.events.split() for time in one.times} <= found
