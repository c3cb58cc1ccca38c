"""Data, from a data set to the validation's numbers, in the order in which the 2019 course's lesson
9 tells it.
"""

import importlib.util
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from functional_sgd import adamw, apply
from loop import Batches, DataLoaders, Learner, fit, predict, trace, validate
from loop.data import class_count, one_batch
from loop.data.collate import padding_collate
from loop.data.loader import dataloaders, make_loader
from tests.comparing import Untouched, assert_same
from tests.loop.helpers import learned, learner, net, one_weight

SPEC = importlib.util.spec_from_file_location(
    "lesson9_data", Path(__file__).parents[3] / "examples" / "lesson9_data.py"
)
assert SPEC is not None
assert SPEC.loader is not None
lesson: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(lesson)

TRAIN = lesson.Dataset(
    torch.randn(50, 784, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 10
)
TEN = lesson.Dataset(torch.arange(10.0)[:, None], torch.arange(10))


def indices(loader: Any) -> list[list[int]]:
    """Which samples of TEN are in each batch."""
    return [y.tolist() for _, y in loader]


def at(loader: Any, seed: int, epoch: int, skip: int = 0) -> Any:
    """The loader, about to begin there."""
    loader.set_position(seed, epoch, skip)
    return loader


@pytest.mark.parametrize("dataset", [TRAIN, TensorDataset(TRAIN.x, TRAIN.y)], ids=["ours", "torch"])
def test_n19_a_data_set_has_a_length_and_slices(dataset: Any) -> None:
    x, y = dataset[0:5]
    assert (len(dataset), tuple(x.shape), tuple(y.shape)) == (50, (5, 784), (5,))


@pytest.mark.parametrize(
    "loader",
    [
        lambda drop: list(lesson.batches(TEN, lesson.sampler(10, 3)))[: 3 if drop else 4],
        lambda drop: Batches((TEN.x, TEN.y), 3, drop_last=drop),
        lambda drop: make_loader(TEN, 3, drop_last=drop),
    ],
    ids=["from scratch", "Batches", "make_loader"],
)
def test_n20_the_last_batch_is_what_is_left(loader: Any) -> None:
    assert [len(y) for _, y in loader(False)] == [3, 3, 3, 1]
    assert [len(y) for _, y in loader(True)] == [3, 3, 3]
    assert (len(loader(False)), len(loader(True))) == (4, 3)


def test_n20_batches_are_made_when_they_are_wanted() -> None:
    read: list[int] = []

    class Watched:
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            read.append(index)
            return TEN[index]

    running = lesson.batches(Watched(), lesson.sampler(10, 3))
    assert read == []
    next(running)
    assert read == [0, 1, 2]


def test_n21_samplers_in_order() -> None:
    expected = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert (
        list(lesson.sampler(10, 3))
        == indices(make_loader(TEN, 3))
        == indices(Batches((TEN.x, TEN.y), 3))
        == expected
    )


@pytest.mark.parametrize(
    "make", [lambda: Batches((TEN.x, TEN.y), 3, shuffle=True), lambda: make_loader(TEN, 3, True)]
)
def test_n21_shuffled_is_a_permutation_and_a_new_one_each_epoch(make: Any) -> None:
    first, second, again = (indices(at(make(), 0, epoch)) for epoch in (0, 1, 0))
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(10))
    assert first == again != second
    assert indices(at(make(), 1, 0)) != first


def test_n21_every_loader_has_the_same_order() -> None:
    assert indices(at(make_loader(TEN, 3, True), 7, 2)) == indices(
        at(Batches((TEN.x, TEN.y), 3, True), 7, 2)
    )


@pytest.mark.parametrize(
    "make", [lambda: Batches((TEN.x, TEN.y), 3, shuffle=True), lambda: make_loader(TEN, 3, True)]
)
def test_n21_without_a_position_the_order_is_drawn_from_torch(make: Any) -> None:
    loader, found = make(), []
    with torch.random.fork_rng():
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            found += [indices(loader), indices(loader)]
    assert found[0:2] == found[2:4]
    assert len({str(order) for order in found}) == 4


def test_n22_samples_are_stacked() -> None:
    x, y = lesson.collate([TEN[0], TEN[3]])
    assert (x.tolist(), y.tolist()) == ([[0.0], [3.0]], [0, 3])


SENTENCES = [
    (torch.tensor([5, 6, 7]), torch.tensor([1, 1, 1])),
    (torch.tensor([8]), torch.tensor([2])),
]


def test_n22_unequal_lengths_are_padded_and_masked() -> None:
    padded, mask, target = padding_collate(SENTENCES)
    assert padded.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    assert target.tolist() == [[1, 1, 1], [2, -100, -100]]


def test_n22_padding_of_vectors_and_of_other_values() -> None:
    samples = [(torch.ones(2, 3), 4, "a"), (torch.zeros(0, 3), 5, "b")]
    padded, mask, number, text = padding_collate(samples, value=-1)
    assert padded[1].tolist() == [[-1.0] * 3] * 2
    assert (mask.tolist(), number.tolist(), text) == (
        [[True, True], [False, False]],
        [4, 5],
        ["a", "b"],
    )


@pytest.mark.parametrize("samples", [[], [(1, 2)], [(torch.ones(1),), (torch.ones(1), 2)]])
def test_n22_samples_that_make_no_batch(samples: Any) -> None:
    with pytest.raises(ValueError, match="padding_collate: samples must be"):
        padding_collate(samples)


class Tagger(nn.Module):
    """A class for each token; padding is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Scores (N, classes, T)."""
        scores: Tensor = self.table(tokens) * mask[..., None]
        return scores.transpose(1, 2)


def test_n22_a_model_is_trained_on_padded_batches() -> None:
    data = dataloaders(SENTENCES * 3, SENTENCES, 2, collate=padding_collate)
    mine = Learner(Tagger(), data, cross_entropy, adamw(lr=0.1), n_inputs=2)
    rows = fit(mine, mine.init(), 5).history.column("valid_loss")
    assert rows[-1] < rows[0] / 2


def count_up() -> Iterator[tuple[Tensor, Tensor]]:
    """A stream of samples, from a generator in a generator."""
    yield from ((TEN.x[index], TEN.y[index]) for index in range(10))


def test_n23_a_stream_of_unknown_length() -> None:
    loader = make_loader(count_up, 4)
    with pytest.raises(TypeError):
        len(loader)
    assert (
        indices(loader)
        == indices(loader)
        == list(lesson.stream(range(10), 4))
        == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    )
    mine = learner(
        one_weight(),
        DataLoaders(loader, loader),
        loss=lambda pred, y: (pred[:, 0] - y).square().mean(),
    )
    end = fit(mine, mine.init(), 2)
    assert (end.train_iter, end.n_iter) == (6, None)


@pytest.mark.parametrize("workers", [0, 2])
def test_n24_torchs_loader_does_the_same(workers: int) -> None:
    theirs = DataLoader(TensorDataset(TEN.x, TEN.y), 3)
    scratch = list(lesson.batches(TEN, lesson.sampler(10, 3)))
    assert lesson.same(scratch, theirs)
    assert lesson.same(scratch, make_loader(TensorDataset(TEN.x, TEN.y), 3, workers=workers))


def test_n24_one_batch_of_anything() -> None:
    data = dataloaders(TEN, None, 4)
    mine = learner(one_weight(), DataLoaders(Batches((TEN.x, TEN.y), 4)))
    assert [len(one_batch(source)[1]) for source in (data.train, data, mine)] == [4, 4, 4]
    with pytest.raises(ValueError, match="one_batch: the loader is empty"):
        one_batch([])


def test_n25_evaluation_is_deterministic_and_training_mode_is_not() -> None:
    """Dropout and BatchNorm: in training mode a validation would change from time to time, and
    change the model.
    """
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    mine = learner(net(), DataLoaders([(x, x)], [(x, x)]))
    start = mine.init()
    assert torch.equal(predict(mine, start), predict(mine, start))
    mine.model.train()
    with torch.random.fork_rng():
        (one, after), (two, _) = (
            apply(mine.model, start.params, start.buffers, x) for _ in range(2)
        )
    assert not torch.equal(one, two)
    assert not torch.equal(one, predict(mine, start))
    assert not torch.equal(after["1.running_mean"], start.buffers["1.running_mean"])


def test_n25_validation_data_does_not_leak_into_the_buffers() -> None:
    x, far = torch.zeros(8, 2), torch.full((8, 2), 1e6)
    mine = learner(net(), DataLoaders([(x, x)], [(far, far)]))
    without = learner(net(), DataLoaders([(x, x)]))
    assert_same(learned(fit(mine, mine.init(), 2)), learned(fit(without, without.init(), 2)))


def test_n26_validation_has_no_gradients_and_changes_nothing() -> None:
    mine = learner(net())
    start = fit(mine, mine.init(), 1)
    kept, seen = Untouched(learned(start)), []
    validate(mine, start)
    running = trace(mine, start, 1)
    for event, state in running:
        if event == "after_loss" and not state.training:
            seen.append((state.pred.requires_grad, state.loss.requires_grad, state.grads))
    kept.check()
    assert seen == [(False, False, None)] * 2


def test_n27_validation_is_right_for_batches_of_any_size() -> None:
    """The squares 1, 1, 0, 4, 9 in batches of 4 and 1 have the mean 3, not (1.5 + 9) / 2 = 5.25."""
    x, y = torch.zeros(5, 1), torch.tensor([[1.0], [1.0], [0.0], [2.0], [3.0]])
    mine = learner(one_weight(), DataLoaders([(x, y)], Batches((x, y), 4)))
    assert validate(mine, mine.init())["valid_loss"] == 3.0


def test_n27_batches_of_1000_and_1() -> None:
    x, y = torch.zeros(1001, 1), torch.full((1001, 1), 2.0)
    y[-1] = 5.0
    mine = learner(one_weight(), DataLoaders([(x, y)], Batches((x, y), 1000)), loss=mse_loss)
    assert validate(mine, mine.init())["valid_loss"] == pytest.approx(
        (1000 * 4 + 25) / 1001, rel=1e-12
    )


def test_n28_validation_batches_are_twice_as_large_and_never_shuffled() -> None:
    data = dataloaders(TEN, TEN, 3, drop_last=True)
    train, valid = indices(at(data.train, 0, 0)), indices(at(data.valid, 0, 0))
    assert [len(batch) for batch in train] == [3, 3, 3]
    assert valid == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]
    assert train != [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert dataloaders(TEN).valid is None


def test_n32_the_number_of_classes_is_not_a_matter_of_shapes() -> None:
    assert (
        class_count(DataLoaders(make_loader(TRAIN, 8)))
        == class_count(Batches((TRAIN.x, TRAIN.y), 8))
        == 10
    )
    with pytest.raises(
        ValueError, match="class_count: targets must be tensors of classes, got torch.float32"
    ):
        class_count([(torch.ones(2), torch.ones(2))])


def test_values_of_padding_by_partial() -> None:
    loader = make_loader(
        [torch.tensor([1, 2]), torch.tensor([3])], 2, collate=partial(padding_collate, value=9)
    )
    assert one_batch(loader)[0].tolist() == [[1, 2], [3, 9]]


def test_bools_are_not_filled_up_with_what_would_be_true() -> None:
    samples = [(torch.ones(length), torch.ones(length, dtype=torch.bool)) for length in (2, 1)]
    with pytest.raises(ValueError, match="sequences of bool cannot be filled up with -100"):
        padding_collate(samples)
    assert padding_collate(samples, target_value=0)[2].tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("batches", [[], [(torch.zeros(2), torch.tensor([-100, -1]))]])
def test_no_targets_are_of_no_number_of_classes(batches: list[Any]) -> None:
    with pytest.raises(ValueError, match="class_count: there is no target"):
        class_count(batches)


X, Y = torch.arange(6.0)[:, None], torch.arange(6)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (TensorDataset(X, Y), "got TensorDataset, which yields samples. Pass make_loader"),
        ((X, Y), "got a tuple of 2 tensors, each of which would be a batch. Pass Batches"),
        (X, "got Tensor, which yields its rows. Pass Batches"),
        (X.numpy(), "got ndarray, which yields its rows. Pass Batches"),
    ],
)
def test_data_that_are_no_batches_are_refused(data: Any, what: str) -> None:
    with pytest.raises(TypeError, match=f"DataLoaders: train must be a loader.*{what}"):
        DataLoaders(data)
    with pytest.raises(TypeError, match=f"DataLoaders: valid must be a loader.*{what}"):
        DataLoaders([(X, Y)], data)


def test_batches_without_targets_may_be_tensors() -> None:
    assert list(DataLoaders([X, X]).train) == [X, X]


def test_arrays_of_numpy_become_tensors_in_their_memory() -> None:
    array = X.numpy().copy()
    batch, y = next(iter(Batches((array, Y), 4)))  # type: ignore[arg-type]
    array[0] = 7.0
    assert (batch.tolist(), y.tolist()) == ([[7.0], [1.0], [2.0], [3.0]], [0, 1, 2, 3])


def test_batches_are_of_a_tuple() -> None:
    with pytest.raises(TypeError, match=r"must be a tuple of tensors, got Tensor\. Put them in"):
        Batches(X, Y)  # type: ignore[arg-type]


def test_batches_are_of_tensors() -> None:
    with pytest.raises(TypeError, match="must be tensors or numpy arrays, got list. Convert it"):
        Batches((X, [1, 2, 3, 4, 5, 6]))  # type: ignore[arg-type]
