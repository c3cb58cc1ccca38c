"""Which events happen in which order, with every signal raised at every place, against a model that
shares no code.

Where the loop differs from fastai 2.8.12 on purpose:

| fastai | loop | why |
|---|---|---|
| a signal that no open scope has a name for leaves fit as a raw exception | SignalError that says \
what is legal there | a silent exit hides a slip |
| CancelBackward is followed by the step, with old gradients | no gradients, no step scope | \
a step needs gradients |
| nothing is cleaned up when an error or an outer signal passes | \
brackets close on every way out | effects would leak |
| a batch cancelled before its loss is recorded with the loss of the batch before | \
not recorded | it has no loss |
| CancelEpoch in before_epoch crashes the recorder or repeats a row | a row of None | \
nothing was measured |
| StopIteration in a callback ends the event without a word | RuntimeError | \
it is nearly always a slip |
| rows change their length | fixed columns, None where nothing was measured | a table has columns |
| validate() fires the events of fit and erases the history | \
only those of validate; history kept | it is no fit |
| schedules pass through float32 | float64 | nobody asked for the rounding |
| run_before and run_after are ignored | they decide | they are what the book teaches |
| the mode of the layers is set by a callback, and stays | set by the machine, and put back | \
a callback may be absent |
| after_create is an event | it is not | a learner is a record; making it runs nothing |
"""

from typing import Any

import pytest
import torch

import loop
from functional_sgd import apply
from loop import Cancel, SignalError, fit, trace, validate
from tests.comparing import assert_same
from tests.each import for_each
from tests.loop.helpers import EVENTS, SCOPES, assert_at_rest, everywhere, learner, loaders

SIGNALS: dict[str, type[Cancel]] = {
    scope: getattr(loop, f"Cancel{scope.capitalize()}") for scope in SCOPES
}  # CancelFit, CancelEpoch, ...

Node = Any  # the name of an event, or (name of a scope, parts)

FORWARD = ("after_pred", "after_loss")
TRAIN_BATCH = ("batch", (*FORWARD, ("backward", ()), ("step", ())))
VALID_BATCH = ("batch", FORWARD)


def tree(epochs: int, train: int, valid: int | None) -> Node:
    """A whole run, every repetition written out."""
    phases = [("train", (TRAIN_BATCH,) * train)]
    if valid is not None:
        phases.append(("validate", (VALID_BATCH,) * valid))
    return "fit", (("epoch", tuple(phases)),) * epochs


class Illegal(Exception):
    """A signal that nothing can catch; holds the scopes that are open."""


class Expected:
    """What should be delivered if, at these deliveries (by number), the signals of these scopes are
    raised.
    """

    def __init__(self, run: Node, plan: dict[int, str]) -> None:
        self.plan = plan
        self.events: list[str] = []
        self.legal: tuple[str, ...] | None = None  # the open scopes at an illegal signal
        try:
            self.play(run, ())
        except Illegal as illegal:
            self.legal = illegal.args[0]

    def play(self, node: Node, around: tuple[str, ...]) -> str | None:
        """Deliver the events of a node; return the scope that a signal now flying wants to end."""
        if isinstance(node, str):
            return self.deliver(node, around)
        name, parts = node
        if name == "step" and self.events[-2:] == ["after_cancel_backward", "after_backward"]:
            return None
        flying = self.deliver(f"before_{name}", (*around, name))
        for part in parts:
            flying = flying or self.play(part, (*around, name))
        if flying == name:
            flying = self.deliver(f"after_cancel_{name}", around)
        return flying or self.deliver(f"after_{name}", around)

    def deliver(self, event: str, open_scopes: tuple[str, ...]) -> str | None:
        """One event; the scope that is to be cancelled there, if any."""
        signal = self.plan.get(len(self.events))
        self.events.append(event)
        if signal and signal not in open_scopes:
            raise Illegal(open_scopes)
        return signal

    def training(self, index: int) -> bool:
        """Whether this delivery is after the beginning of a training phase, and before the next
        validation.
        """
        phases = [
            event
            for event in self.events[: index + 1]
            if event in ("before_train", "before_validate")
        ]
        return phases[-1:] == ["before_train"]

    def count(self, event: str) -> int:
        """How often an event is delivered in training."""
        return sum(name == event and self.training(index) for index, name in enumerate(self.events))

    @property
    def trained(self) -> int:
        """How many training batches count: those that came to their end, or that the model saw."""
        count, seen = 0, False
        for index, event in enumerate(self.events):
            if event == "before_batch":
                seen = False
            elif event in ("after_pred", "after_batch") and self.training(index) and not seen:
                count, seen = count + 1, True
        return count

    @property
    def steps(self) -> int:
        """How many updates there are: as many as steps that begin undisturbed."""
        return sum(
            name == "before_step" and index not in self.plan
            for index, name in enumerate(self.events)
        )


class Delivered:
    """What is delivered, and the same signals raised there."""

    def __init__(self, plan: dict[int, str], with_state: bool = True) -> None:
        self.plan, self.with_state = plan, with_state
        self.events: list[str] = []
        self.training: list[bool] = []
        self.carried: Any = None

    def __call__(self, event: str, state: loop.State) -> None:
        self.events.append(event)
        self.training.append(state.training)
        assert state.event == event
        signal = self.plan.get(len(self.events) - 1)
        if signal:
            self.carried = state
            raise SIGNALS[signal](state if self.with_state else None)


LEARNER = learner(data=loaders(train=2, valid=2))
START = LEARNER.init()
RUN = tree(epochs=2, train=2, valid=2)
NORMAL = Expected(RUN, {})


def compare(plan: dict[int, str], with_state: bool = True) -> None:
    """Run the loop and the model with the same signals, and compare events and end states."""
    expected, delivered = Expected(RUN, plan), Delivered(plan, with_state)
    callbacks = [everywhere(delivered, order=-1000)]
    if expected.legal is not None:
        with pytest.raises(SignalError) as caught:
            fit(LEARNER, START, 2, callbacks)
        last = expected.events[-1]
        legal = {f"Cancel{scope.capitalize()}" for scope in expected.legal}
        words = str(caught.value).replace(",", " ").replace(".", " ").split()
        assert "'spy'" in words
        assert last in words
        raised = SIGNALS[plan[max(plan)]].__name__
        assert {word for word in words if word.startswith("Cancel")} == legal | {raised}
        assert delivered.events == expected.events
        return
    end = fit(LEARNER, START, 2, callbacks)
    assert delivered.events == expected.events
    assert end.opt_state["step"].max() == expected.steps
    assert end.train_iter == expected.trained
    assert end.epochs_seen == expected.events.count("after_epoch")
    assert_at_rest(end)


def labels() -> list[str]:
    """The name of every delivery of the normal run: event, occurrence, phase."""
    seen: dict[tuple[str, bool], int] = {}
    names = []
    for index, event in enumerate(NORMAL.events):
        key = event, NORMAL.training(index)
        seen[key] = seen.get(key, 0) + 1
        names.append(f"{event}-{seen[key]}-{'training' if key[1] else 'not_training'}")
    return names


@for_each("signal", SCOPES)
@pytest.mark.parametrize("position", range(len(NORMAL.events)), ids=labels())
def test_every_signal_at_every_place(position: int, signal: str) -> None:
    compare({position: signal})


@pytest.mark.parametrize("second", SCOPES)
@pytest.mark.parametrize("first", SCOPES)
@pytest.mark.parametrize("later", [1, 2])
def test_every_signal_right_after_another_and_in_the_event_after_that(
    first: str, second: str, later: int
) -> None:
    """That is, in every after_cancel_x, and in after_x once x is cancelled."""
    position = NORMAL.events.index(f"before_{first}")
    compare({position: first, position + later: second})


@pytest.mark.parametrize("signal", SCOPES)
def test_a_signal_without_a_state_has_the_same_events(signal: str) -> None:
    compare({NORMAL.events.index(f"before_{signal}"): signal}, with_state=False)


@pytest.mark.parametrize("valid", [None, 1, 2])
@pytest.mark.parametrize("train", [1, 3])
@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_a_normal_run(epochs: int, train: int, valid: int | None) -> None:
    delivered = Delivered({})
    mine = learner(data=loaders(train, valid))
    fit(mine, mine.init(), epochs, [everywhere(delivered)])
    assert delivered.events == Expected(tree(epochs, train, valid), {}).events


def test_the_run_of_the_book_written_out() -> None:
    train = "before_batch after_pred after_loss before_backward after_backward before_step"
    train += " after_step after_batch"
    valid = "before_batch after_pred after_loss after_batch"
    epoch = f"before_epoch before_train {train} {train} {train} after_train "
    epoch += f"before_validate {valid} {valid} after_validate after_epoch"
    delivered = Delivered({})
    fit(learner(), learner().init(), 2, [everywhere(delivered)])
    assert delivered.events == f"before_fit {epoch} {epoch} after_fit".split()
    assert len(delivered.events) == 78


def test_no_epochs_changes_no_tensor() -> None:
    end = fit(LEARNER, START, 0)
    assert_same(end.params, START.params)
    assert (end.train_iter, end.epochs_seen, len(end.history.rows)) == (0, 0, 0)


def test_training_is_true_from_before_train_to_after_train() -> None:
    delivered = Delivered({})
    fit(LEARNER, START, 2, [everywhere(delivered)])
    expected = [NORMAL.training(index) for index in range(len(NORMAL.events))]
    assert delivered.training == expected


def test_training_is_false_outside_the_training_phase_even_if_nothing_is_validated() -> None:
    mine = learner(data=loaders(valid=None))
    seen = {(event, state.training) for event, state in trace(mine, mine.init(), 2)}
    outside = {"before_fit", "before_epoch", "after_epoch", "after_fit"}
    assert {event for event, training in seen if not training} == outside
    assert not {event for event, training in seen if training} & outside


def test_the_names_of_all_events() -> None:
    assert sorted(loop.events()) == sorted(EVENTS)
    assert len(EVENTS) == 23


def test_the_four_stages_happen_between_their_events() -> None:
    """predict, loss, gradients and update are each done by the event after them, and not by the
    event before.
    """
    done = {}
    for event, state in trace(LEARNER, START, 1):
        present = tuple(getattr(state, name) is not None for name in ("pred", "loss", "grads"))
        done.setdefault(event, (*present, int(state.opt_state["step"].max())))
    assert done["before_batch"] == (False, False, False, 0)
    assert done["after_pred"] == (True, False, False, 0)
    assert done["after_loss"] == done["before_backward"] == (True, True, False, 0)
    assert done["after_backward"] == done["before_step"] == (True, True, True, 0)
    assert done["after_step"] == done["after_batch"] == (True, True, True, 1)
    assert done["after_train"] == (False, False, False, 2)


def test_validate_has_only_its_own_events() -> None:
    delivered = Delivered({})
    validate(learner(callbacks=[everywhere(delivered)]), START)
    batch = ["before_batch", "after_pred", "after_loss", "after_batch"]
    assert delivered.events == ["before_validate", *batch, *batch, "after_validate"]


def test_the_prediction_is_that_of_the_state() -> None:
    for event, state in trace(LEARNER, START, 1):
        if event == "after_pred":
            pred, _ = apply(LEARNER.model, START.params, START.buffers, *state.xb)
            assert torch.equal(state.pred, pred)
            return
