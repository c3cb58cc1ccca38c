"""The same state gives the same next state, bit for bit; and a run leaves nothing behind but its result."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from functional_sgd import adamw, apply
from loop import Batches, CancelFit, CancelTrain, DataLoaders, Learner, State, fit, predict, trace, validate
from tests.comparing import Untouched, assert_same
from tests.loop.helpers import (
    Kept,
    assert_at_rest,
    assert_same_run,
    batches,
    learned,
    learner,
    loaders,
    losses,
    net,
    on,
    raise_once,
)

X, Y = (torch.cat(parts) for parts in zip(*batches(5, seed=3), strict=True))


def shuffled(kind: str) -> DataLoaders:
    """Twenty samples in batches of 8, 8 and 4, shuffled by one loader or another; and validation data."""
    generator = torch.Generator() if kind == "DataLoader with a generator" else None
    train: Any = Batches((X, Y), 8, shuffle=True)
    if kind != "Batches":
        train = DataLoader(TensorDataset(X, Y), 8, shuffle=True, generator=generator)
    return DataLoaders(train, Batches((X, Y), 16))


KINDS = ["Batches", "DataLoader", "DataLoader with a generator"]


def full(kind: str = "Batches", **rest: Any) -> Learner:
    """Dropout, BatchNorm, an optimizer with memory, and shuffled data."""
    return learner(net(), shuffled(kind), opt=adamw(lr=0.01), **rest)


def inputs(mine: Learner, start: State, epochs: int = 1) -> list[Tensor]:
    """The training batches that a run sees."""
    running = trace(mine, start, epochs)
    return [state.x for event, state in running if event == "before_batch" and state.training]


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_from_one_state_are_equal(kind: str) -> None:
    mine = full(kind)
    start = mine.init(seed=1)
    first = fit(mine, start, 2)
    torch.rand(3)
    assert_same_run(fit(mine, start, 2), first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_parts_is_the_run_in_one(kind: str) -> None:
    mine = full(kind)
    start = mine.init()
    whole, parts = fit(mine, start, 5), start
    for _ in range(5):
        parts = fit(mine, parts, 1)
    assert_same(learned(parts), learned(whole))
    assert losses(parts) == losses(whole)
    assert (parts.train_iter, parts.epochs_seen) == (whole.train_iter, whole.epochs_seen)


def test_equal_learners_made_twice_run_equally() -> None:
    first, second = full(), full()
    assert_same_run(fit(first, first.init(), 2), fit(second, second.init(), 2))


def test_the_first_state_is_untouched() -> None:
    mine = full()
    start = mine.init()
    kept = Kept(start)
    fit(mine, start, 2, lr=0.5)
    kept.check()


def test_a_state_in_the_middle_is_untouched_by_two_continuations() -> None:
    mine = full()
    middle = fit(mine, mine.init(), 1)
    kept = Kept(middle)
    first, second = fit(mine, middle, 1, lr=0.5), fit(mine, middle, 1)
    kept.check()
    assert losses(first)[:3] == losses(second)[:3] == losses(middle)
    assert losses(first) != losses(second)


def test_seeds_make_a_difference() -> None:
    mine = full()
    assert losses(fit(mine, mine.init(seed=0), 1)) != losses(fit(mine, mine.init(seed=1), 1))


def test_fit_is_trace_drained() -> None:
    mine = full()
    events: list[str] = []
    running = trace(mine, mine.init(), 2)
    while True:
        try:
            events.append(next(running)[0])
        except StopIteration as end:
            traced = end.value
            break
    assert_same_run(traced, fit(mine, mine.init(), 2))
    assert_at_rest(traced)
    assert events.count("after_step") == 6


def test_two_traces_in_turns_are_two_runs() -> None:
    mine = full()
    pair = [trace(mine, mine.init(seed), 2) for seed in (0, 1)]
    ends: list[State] = []
    while len(ends) < 2:
        for running in pair:
            try:
                next(running)
            except StopIteration as end:
                ends.append(end.value)
    for seed, end in enumerate(ends):
        assert_same_run(end, fit(mine, mine.init(seed), 2))


def test_random_numbers_drawn_by_a_callback_change_nothing() -> None:
    def draw(state: State) -> None:
        torch.rand(7)

    mine = full()
    assert_same_run(fit(mine, mine.init(), 2, [on(before_batch=draw)]), fit(mine, mine.init(), 2))


def outside(mine: Learner) -> tuple[Any, ...]:
    """Everything about the process and the model that a run might disturb."""
    return (
        torch.random.get_rng_state().tolist(),
        [layer.training for layer in mine.model.modules()],
        torch.is_grad_enabled(),
        [value.grad for value in mine.model.parameters()],
        [value.requires_grad for value in mine.model.parameters()],
    )


def normal(mine: Learner, start: State) -> None:
    fit(mine, start, 2)


def signalled(mine: Learner, start: State) -> None:
    fit(mine, start, 2, [on(after_loss=raise_once(CancelFit, at=1))])


def failing(mine: Learner, start: State) -> None:
    with pytest.raises(ZeroDivisionError):
        fit(mine, start, 2, [on(after_loss=raise_once(ZeroDivisionError, at=4))])


def traced(mine: Learner, start: State) -> None:
    running = trace(mine, start, 2)
    next(event for event, _ in running if event == "after_loss")
    running.close()


def validated(mine: Learner, start: State) -> None:
    validate(mine, start)


def predicted(mine: Learner, start: State) -> None:
    predict(mine, start)


WAYS = [normal, signalled, failing, traced, validated, predicted]


@pytest.mark.parametrize("way", WAYS)
def test_the_surroundings_are_as_before(way: Callable[..., None]) -> None:
    mine = full()
    mine.model.eval()
    mine.model[3].train()  # a mixture that no phase has
    before = outside(mine)
    way(mine, mine.init())
    assert outside(mine) == before


@pytest.mark.parametrize("way", WAYS)
def test_the_models_own_tensors_are_untouched(way: Callable[..., None]) -> None:
    mine = full()
    kept = Untouched(dict(mine.model.state_dict()))
    way(mine, mine.init())
    kept.check()


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_run_touches_its_state(way: Callable[..., None]) -> None:
    mine = full()
    start = fit(mine, mine.init(), 1)
    kept = Kept(start)
    way(mine, start)
    kept.check()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_run_does_not_depend_on_the_grad_mode_around_it(mode: Callable[[], Any]) -> None:
    mine = full()
    expected = fit(mine, mine.init(), 1)
    with mode():
        before = torch.is_grad_enabled()
        assert_same_run(fit(mine, mine.init(), 1), expected)
        assert torch.is_grad_enabled() == before


STILL = learner(net(), DataLoaders([(X[:4], Y[:4])]), opt=adamw(lr=0.0))


def predictions(start: State) -> list[Tensor]:
    """What the net predicts for one batch in training, three times, with parameters that do not change."""
    return [state.pred for event, state in trace(STILL, start, 3) if event == "after_pred"]


def test_dropout_differs_from_batch_to_batch() -> None:
    first, second, third = predictions(STILL.init())
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_dropout_is_a_function_of_seed_and_train_iter() -> None:
    """Not of the epoch, of the data order, or of what happened before."""
    start = STILL.init(seed=5)
    assert torch.equal(predictions(start)[2], predictions(start.replace(train_iter=2, epochs_seen=40))[0])


def test_the_order_of_the_data_differs_from_epoch_to_epoch() -> None:
    first, second = inputs(full(), full().init(), 2)[:3], inputs(full(), full().init(), 2)[3:]
    assert not torch.equal(torch.cat(first), torch.cat(second))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_data_is_a_function_of_seed_and_epoch(kind: str) -> None:
    """Not of the number of batches so far: an epoch cut short does not disturb the next one."""
    mine = full(kind)
    cut = inputs(full(kind, callbacks=[on(after_batch=raise_once(CancelTrain))]), mine.init(), 2)[1:]
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
    with_, without = full(), learner(net(), DataLoaders(Batches((X, Y), 8, shuffle=True)), opt=adamw(lr=0.01))
    assert_same(learned(fit(with_, with_.init(), 3)), learned(fit(without, without.init(), 3)))


def test_validation_has_no_gradients() -> None:
    mine = full()
    states = [state for event, state in trace(mine, mine.init(), 1) if event == "after_loss" and not state.training]
    assert [state.loss.requires_grad or state.pred.requires_grad for state in states] == [False, False]


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
    assert (int(start.buffers["1.num_batches_tracked"]), int(end.buffers["1.num_batches_tracked"])) == (0, 3)


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
    mine, listed = learner(), learner(data=DataLoaders(iterable_twice(loaders().train), loaders().valid))
    assert_same(learned(fit(mine, mine.init(), 2)), learned(fit(listed, listed.init(), 2)))


def iterable_twice(source: Any) -> Any:
    """A loader that has nothing but __iter__."""

    class Only:
        def __iter__(self) -> Iterator[Any]:
            return iter(list(source))

    return Only()
