"""What changes on entering a scope and on leaving it: the batch, the counters, the model's mode."""

from collections.abc import Callable, Iterator

from loop.run.passes import TRAIN_DATA, VALID_DATA, Feed, Pass, length
from loop.run.stages import BEFORE_VALIDATION, device_of, learner_of, split_batch
from loop.state import State, Tensors


def epochs(state: State, start: int, feed: Feed) -> Iterator[Callable[[State], State]]:
    """Enter every epoch of the run, from this one on."""
    n_epoch = state.n_epoch
    del state, feed  # or its tensors would live as long as the run
    for epoch in range(start, n_epoch):
        yield _Enter(epoch=epoch)


def batches(state: State, start: int, feed: Feed) -> Iterator[Callable[[State], State]]:
    """Enter every batch of the phase, from this one on.

    The data are a pass over the loader, whose order is a function of (seed, epochs_seen) alone; but
    in the training phases of a run that counts steps, as many as are due, from `position` on.
    """
    if state.training and state.n_step is not None:
        return fed_batches(state, start, feed)
    return batches_of_a_pass(state, start)


def batches_of_a_pass(state: State, start: int) -> Iterator[Callable[[State], State]]:
    """Enter every batch of a pass over the data of the phase, from this one on."""
    learner, device, training = learner_of(state), device_of(state), state.training
    loader = learner.data.train if training else learner.data.valid
    purpose = TRAIN_DATA if training else VALID_DATA
    number = state.epochs_seen
    source = Pass(loader, purpose, state.seed, number, start, device)
    del state  # or it would live as long as the phase does
    for batch in source:
        xb, yb = split_batch(learner, batch, device)
        changes: dict[str, object] = {"xb": xb, "yb": yb, "iter": source.index - 1}
        if training:
            changes["position"] = (number, source.index)
        # done=(): from here on until the batch is over, there is no place to go on from.
        yield _Enter(**changes, done=())
    source.check()


def fed_batches(state: State, start: int, feed: Feed) -> Iterator[Callable[[State], State]]:
    """Enter every training batch that an epoch of so many steps has, from this one on."""
    learner, device = learner_of(state), device_of(state)
    seed, position, due = state.seed, state.position, state.n_iter
    assert due is not None, "enter_train has counted them"
    del state  # or it would live as long as the phase does
    for index in range(start, due):
        batch, position = feed.batch(learner.data.train, seed, position, device)
        xb, yb = split_batch(learner, batch, device)
        yield _Enter(iter=index, xb=xb, yb=yb, done=(), position=position)


def enter_train(state: State) -> State:
    """The training phase begins."""
    learner_of(state).model.train(True)
    if state.n_step is None:
        due = length(learner_of(state).data.train)
    else:
        due = min(state.steps_per_epoch, state.n_step - state.epoch * state.steps_per_epoch)
    state = state.replace(training=True, iter=0, n_iter=due)
    return state.replace(pct_train=_share_done(state, 0))


def enter_validate(state: State) -> State:
    """The validation phase begins."""
    learner_of(state).model.train(False)
    return state.replace(training=False, iter=0, n_iter=length(learner_of(state).data.valid))


def leave_batch(state: State) -> State:
    """A training batch, cancelled or not, counts."""
    if not state.training:
        return state
    pct = _share_done(state, state.iter + 1)
    return state.replace(train_iter=state.train_iter + 1, pct_train=pct)


def _share_done(state: State, batches: int) -> float:
    """The share of the run that is done, with so many batches of this epoch."""
    if state.n_step is not None:
        return (state.epoch * state.steps_per_epoch + batches) / max(state.n_step, 1)
    done = min(batches / state.n_iter, 1.0) if state.n_iter else 0.0
    return (state.epoch + done) / max(state.n_epoch, 1)


def leave_epoch(state: State) -> State:
    """An epoch, cancelled or not, counts. One that is a pass over the data is over; one of so many
    steps leaves the pass where it is.
    """
    passes = state.epochs_seen + 1
    if state.n_step is not None:
        return state.replace(epochs_seen=passes, done=())
    return state.replace(epochs_seen=passes, done=(), position=(passes, 0))


def left_batch(state: State) -> State:
    """Nothing of a batch stays."""
    return state.without_batch()


def left_validate(state: State) -> State:
    """What the forward passes of a validation have made of the buffers ends with it."""
    before: Tensors | None = state.memory.get(BEFORE_VALIDATION)
    return state if before is None else state.forget(BEFORE_VALIDATION).replace(buffers=before)


def left_train(state: State) -> State:
    """The training phase is over."""
    return state.replace(training=False)


def has_validation_data(state: State) -> bool:
    """Whether there is anything to validate on."""
    return learner_of(state).data.valid is not None


def has_gradients(state: State) -> bool:
    """Whether [update] has anything to go by: not after CancelBackward."""
    return state.grads is not None


class _Enter:
    """The change of fields on entering a scope."""

    def __init__(self, **changes: object) -> None:
        self.changes = changes

    def __call__(self, state: State) -> State:
        return state.replace(**self.changes)
