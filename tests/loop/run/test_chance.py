"""What chance depends on: (seed, epoch) for the order of the data, (seed, train_iter) in a batch;
nothing else.
"""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from functional_sgd import adamw, apply
from loop import Batches, CancelTrain, DataLoaders, Learner, State, fit, predict, trace, validate
from tests.comparing import assert_same
from tests.loop.helpers import (
    KINDS,
    X,
    Y,
    full,
    learned,
    learner,
    loaders,
    net,
    on,
    raise_once,
)


def inputs(mine: Learner, start: State, epochs: int = 1) -> list[Tensor]:
    """The training batches that a run sees."""
    running = trace(mine, start, epochs)
    return [state.x for event, state in running if event == "before_batch" and state.training]


STILL = learner(net(), DataLoaders([(X[:4], Y[:4])]), opt=adamw(lr=0.0))


def predictions(start: State) -> list[Tensor]:
    """What the net predicts for one batch in training, three times, with parameters that do not
    change.
    """
    return [state.pred for event, state in trace(STILL, start, 3) if event == "after_pred"]


def test_dropout_differs_from_batch_to_batch() -> None:
    first, second, third = predictions(STILL.init())
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_dropout_is_a_function_of_seed_and_train_iter() -> None:
    """Not of the epoch, of the data order, or of what happened before."""
    start = STILL.init(seed=5)
    assert torch.equal(
        predictions(start)[2], predictions(start.replace(train_iter=2, epochs_seen=40))[0]
    )


def test_the_order_of_the_data_differs_from_epoch_to_epoch() -> None:
    first, second = inputs(full(), full().init(), 2)[:3], inputs(full(), full().init(), 2)[3:]
    assert not torch.equal(torch.cat(first), torch.cat(second))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_data_is_a_function_of_seed_and_epoch(kind: str) -> None:
    """Not of the number of batches so far: an epoch cut short does not disturb the next one."""
    mine = full(kind)
    cut = inputs(full(kind, callbacks=[on(after_batch=raise_once(CancelTrain))]), mine.init(), 2)[
        1:
    ]
    assert_same(cut, inputs(mine, mine.init(), 2)[3:])
    assert_same(cut, inputs(mine, mine.init().replace(epochs_seen=1, train_iter=17), 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_data_depends_on_the_seed(kind: str) -> None:
    mine = full(kind)
    first, second = (torch.cat(inputs(mine, mine.init(seed))) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_every_sample_is_seen_once_an_epoch() -> None:
    seen = torch.cat(inputs(full(), full().init()))
    assert sorted(seen.tolist()) == sorted(X.tolist())


def test_validation_changes_nothing_that_is_learned() -> None:
    mine = full()
    running = trace(mine, mine.init(), 1)
    before = next(state for event, state in running if event == "before_validate")
    after = next(state for event, state in running if event == "after_validate")
    running.close()
    assert_same(learned(after), learned(before))
    assert list(after.history.losses) == list(before.history.losses)


def test_training_with_and_without_validation_learns_the_same() -> None:
    with_, without = (
        full(),
        learner(net(), DataLoaders(Batches((X, Y), 8, shuffle=True)), opt=adamw(lr=0.01)),
    )
    assert_same(learned(fit(with_, with_.init(), 3)), learned(fit(without, without.init(), 3)))


def test_validation_has_no_gradients() -> None:
    mine = full()
    states = [
        state
        for event, state in trace(mine, mine.init(), 1)
        if event == "after_loss" and not state.training
    ]
    assert [state.loss.requires_grad or state.pred.requires_grad for state in states] == [
        False,
        False,
    ]


def test_validation_is_in_evaluation_mode() -> None:
    mine = full()
    mine.model.eval()
    start = mine.init()
    expected, _ = apply(mine.model, start.params, start.buffers, X)
    assert torch.allclose(predict(mine, start), expected)


def test_training_updates_the_buffers_and_keeps_the_old_ones() -> None:
    mine = full()
    start = mine.init()
    end = fit(mine, start, 1)
    assert (
        int(start.buffers["1.num_batches_tracked"]),
        int(end.buffers["1.num_batches_tracked"]),
    ) == (0, 3)


def test_validate_can_be_repeated() -> None:
    mine = full()
    start = mine.init()
    assert validate(mine, start) == validate(mine, start)


def test_returned_states_hold_on_to_no_graph() -> None:
    mine = full()
    end = fit(mine, mine.init(), 1)
    tensors = [*end.params.values(), *end.buffers.values(), *end.history.losses]
    assert not any(tensor.requires_grad for tensor in tensors)


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Data that cannot tell how much it is."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(X, Y, strict=True))


def test_a_torch_loader_without_a_length() -> None:
    mine = learner(data=DataLoaders(DataLoader(Stream(), 10)))
    end = fit(mine, mine.init(), 2)
    assert (end.train_iter, end.n_iter) == (4, None)


def test_a_loader_that_reads_ahead_in_the_same_order() -> None:
    """A list of the batches gives what the batches give."""
    mine, listed = (
        learner(),
        learner(data=DataLoaders(iterable_twice(loaders().train), loaders().valid)),
    )
    assert_same(learned(fit(mine, mine.init(), 2)), learned(fit(listed, listed.init(), 2)))


def iterable_twice(source: Any) -> Any:
    """A loader that has nothing but __iter__."""

    class Only:
        def __iter__(self) -> Iterator[Any]:
            return iter(list(source))

    return Only()


def test_a_run_beside_one_of_another_thread_warns_and_names_the_cure() -> None:
    """They seed one generator by turns. Runs one after the other, or within a run, are silent."""
    ends: list[State] = []

    def run_in_a_thread() -> None:
        thread = threading.Thread(target=lambda: ends.append(fit(full(), full().init(), 1)))
        thread.start()
        thread.join()

    def begin_others(state: State) -> None:
        fit(full(), full().init(), 1)
        with pytest.warns(UserWarning, match=r"torch's global generators.*processes of their own"):
            run_in_a_thread()

    fit(full(), full().init(), 1, [on(before_fit=begin_others)])
    run_in_a_thread()
    assert len(ends) == 2


def test_runs_in_threads_give_the_generator_back_when_the_last_has_ended() -> None:
    """The first to end must not give back what it found: it was in the middle of the
    other's run.
    """
    torch.manual_seed(5)
    before = torch.get_rng_state()
    inside, done = threading.Event(), threading.Event()

    def wait(state: State) -> None:
        if state.iter == 1:
            inside.set()
            assert done.wait(timeout=60)

    long = threading.Thread(target=lambda: fit(full(), full().init(), 1, [on(before_batch=wait)]))
    long.start()
    assert inside.wait(timeout=60)
    with pytest.warns(UserWarning, match="while one of another thread is open"):
        fit(full(), full().init(), 1)
    done.set()
    long.join()
    assert torch.equal(torch.get_rng_state(), before)


def test_traces_side_by_side_give_the_generator_back() -> None:
    """Whichever ends first."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    mine = full()
    one, other = trace(mine, mine.init(), 1), trace(mine, mine.init(), 1)
    for running in (one, other):
        next(running)
        next(running)
    one.close()
    next(other)
    other.close()
    assert torch.equal(torch.get_rng_state(), before)
