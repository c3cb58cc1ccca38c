"""TorchMetric: metrics of torchmetrics as pure functions; with a stand-in, and with the package if
it is installed.
"""

import importlib
import warnings
from copy import deepcopy
from math import isnan, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from functional_sgd import sgd
from loop import DataLoaders, Learner, fit, validate
from loop.metrics import RMSE, Mergeable, Spearman, TorchMetric, mse
from loop.metrics.outside import as_mergeables
from tests.comparing import Untouched
from tests.loop.helpers import one_weight


class RootMeanSquare:
    """What torchmetrics' metrics look like from outside: an object that changes, with sums, and a
    list of pieces.
    """

    def __init__(self) -> None:
        self.squares, self.count = torch.tensor(0.0), torch.tensor(0)
        self.pieces: list[Tensor] = []
        self._update_count = 0

    @property
    def metric_state(self) -> dict[str, Any]:
        """Not copied."""
        return {"squares": self.squares, "count": self.count, "pieces": self.pieces}

    def update(self, pred: Tensor, target: Tensor) -> None:
        """In place, as theirs do."""
        self.squares += (pred - target).square().sum()
        self.count += pred.numel()
        self.pieces.append(pred)
        self._update_count += 1

    def merge_state(self, other: dict[str, Any]) -> None:
        """In place."""
        self.squares += other["squares"]
        self.count += other["count"]
        self.pieces.extend(other["pieces"])

    def compute(self) -> Tensor:
        """Warns before the first update."""
        if not self._update_count:
            warnings.warn("compute before update", UserWarning, stacklevel=1)
        assert sum(len(piece) for piece in self.pieces) == int(self.count)
        return (self.squares / self.count).sqrt()

    def reset(self) -> None:
        """As if new."""
        self.__init__()  # type: ignore[misc]


class Collection:
    """Like a collection of torchmetrics, but without its items."""

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Of all."""

    def compute(self) -> dict[str, Tensor]:
        """Of all."""
        return {}

    __call__ = update


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Uneven ones."""
    generator = torch.Generator().manual_seed(0)
    sizes = [5, 1, 8][:count]
    return [
        (torch.randn(size, generator=generator), torch.randn(size, generator=generator))
        for size in sizes
    ]


def torchmetrics_metric(name: str) -> Any:
    """A function that makes it, or a skip."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it imports
            module = importlib.import_module("torchmetrics")
    except ImportError:
        pytest.skip("torchmetrics is not installed")
    return getattr(module, name)


MAKES = {
    "stand-in": (lambda: RootMeanSquare, RMSE()),
    "sums": (lambda: lambda: torchmetrics_metric("MeanSquaredError")(squared=False), RMSE()),
    "list": (lambda: torchmetrics_metric("SpearmanCorrCoef"), Spearman()),
}


@pytest.fixture(params=MAKES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """One of theirs, and ours of the same meaning."""
    make, ours = MAKES[request.param]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory, when it is made; not again for every batch
        return TorchMetric(make()), ours


def fold(metric: Any, data: list[tuple[Tensor, Tensor]]) -> Any:
    """All counted."""
    counted = metric.start()
    for pred, target in data:
        counted = metric.add(counted, pred, target)
    return counted


def test_the_value_is_that_of_all_data(pair: tuple[Any, Any]) -> None:
    metric, ours = pair
    assert metric.value(fold(metric, batches())) == pytest.approx(
        ours.value(fold(ours, batches())), abs=1e-6
    )


def test_accumulators_are_values(pair: tuple[Any, Any]) -> None:
    """One can be kept, and gone on from twice."""
    metric, _ = pair
    data = batches()
    one = fold(metric, data[:1])
    kept, before = Untouched(one), deepcopy(one)
    two, again = metric.add(one, *data[1]), metric.add(one, *data[1])
    assert metric.value(two) == metric.value(again)
    assert metric.value(one) == metric.value(before)
    kept.check()


def test_merging_is_counting_both() -> None:
    metric = TorchMetric(RootMeanSquare)
    parts = [fold(metric, [batch]) for batch in batches()]
    kept = Untouched(parts)
    merged = metric.merge(parts[2], metric.merge(metric.start(), metric.merge(parts[0], parts[1])))
    assert metric.value(merged) == pytest.approx(metric.value(fold(metric, batches())))
    assert merged["updates"] == 3
    kept.check()


def test_it_is_a_mergeable_with_the_name_of_the_class() -> None:
    metric = TorchMetric(RootMeanSquare)
    assert isinstance(metric, Mergeable)
    assert (metric.name, TorchMetric(RootMeanSquare, "rms").name) == ("root_mean_square", "rms")
    assert isnan(metric.value(metric.start()))
    assert metric(torch.zeros(4), torch.full((4,), 3.0)) == 3.0


def test_a_run_records_it() -> None:
    data = [(pred[:, None], target[:, None]) for pred, target in batches()]
    mine = Learner(
        one_weight(),
        DataLoaders(data, data),
        mse,
        sgd(lr=0.0),
        [TorchMetric(RootMeanSquare), RMSE()],
    )
    measured = validate(mine, mine.init())
    assert measured["root_mean_square"] == pytest.approx(measured["rmse"])
    assert measured["rmse"] == pytest.approx(sqrt(measured["valid_loss"]))
    assert len(set(fit(mine, mine.init(), 3).history.column("root_mean_square"))) == 1


@pytest.mark.parametrize("make", [lambda: RootMeanSquare, lambda: mse, dict])
def test_what_is_no_metric_is_an_error(make: Any) -> None:
    with pytest.raises(TypeError, match="TorchMetric: make must return a metric of torchmetrics"):
        TorchMetric(make)


def test_pieces_are_not_copied_for_every_batch() -> None:
    """They are shared by the accumulators; so a batch costs as much late as early."""
    metric = TorchMetric(RootMeanSquare)
    one = fold(metric, batches()[:1])
    two = metric.add(one, *batches()[1])
    assert two["state"]["pieces"][0] is one["state"]["pieces"][0]
    assert len(one["state"]["pieces"]) == 1


class Placed:
    """A metric with something that is no state, on the device that it was moved to."""

    def __init__(self) -> None:
        self.total, self.scale = torch.zeros(()), torch.ones(())

    def to(self, device: torch.device) -> "Placed":
        """Moved."""
        self.total, self.scale = self.total.to(device), self.scale.to(device)
        return self

    @property
    def metric_state(self) -> dict[str, Any]:
        """Not copied."""
        return {"total": self.total}

    def update(self, pred: Tensor) -> None:
        """One more batch."""
        self.total = self.total + pred.sum()

    def compute(self) -> float:
        """Works on one device only."""
        assert self.total.device == self.scale.device
        return 1.0


def test_the_value_is_computed_where_the_state_is() -> None:
    metric = TorchMetric(Placed)
    assert metric.value(metric.add(metric.start(), torch.zeros(2, device="meta"))) == 1.0


def test_an_object_in_metrics_counts_over_all_batches_and_is_not_changed() -> None:
    metric = RootMeanSquare()
    metric.update(torch.ones(2), torch.zeros(2))  # what it has seen before does not count
    untouched = Untouched([metric.squares, metric.count])
    data = DataLoaders(batches(), batches())
    mine = Learner(
        one_weight(),
        DataLoaders([(x[:, None], y[:, None]) for x, y in data.train]),
        mse,
        sgd(lr=0.1),
        [metric],
    )
    valid = [(x[:, None], y[:, None]) for x, y in batches()]
    found = validate(mine, mine.init(), valid)
    other = Learner(mine.model, mine.data, mse, sgd(lr=0.1), [RMSE()])
    assert found["root_mean_square"] == pytest.approx(validate(other, mine.init(), valid)["rmse"])
    untouched.check()


def test_an_object_that_cannot_be_taken_apart_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"Collection in metrics.*Wrap it in an object with start"):
        Learner(one_weight(), DataLoaders(batches()), mse, sgd(), [Collection()])


def test_a_prediction_that_is_no_tensor_is_refused() -> None:
    metric = TorchMetric(RootMeanSquare)
    with pytest.raises(TypeError, match="TorchMetric: root_mean_square expected a tensor .* tuple"):
        metric((torch.zeros(2), None), torch.zeros(2))  # type: ignore[arg-type]


def made_of_others() -> dict[str, Any]:
    """Metrics of torchmetrics that have metrics in them, by what they are."""
    mean_error = torchmetrics_metric("MeanAbsoluteError")
    wrappers = importlib.import_module("torchmetrics.wrappers")
    shared = mean_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory
        correlation = torchmetrics_metric("SpearmanCorrCoef")()
    return {
        "composed": 1 - mean_error(),
        "of two": mean_error() + torchmetrics_metric("MeanSquaredError")(),
        "of one twice": shared + shared,
        "nested": 2 * (1 - mean_error()),
        "running": wrappers.Running(mean_error(), 2),
        "transformed": wrappers.LambdaInputTransformer(mean_error(), lambda pred: 2 * pred),
        "several": wrappers.MultioutputWrapper(mean_error(), 1),
        "list": 1 - correlation,
    }


@pytest.mark.parametrize(
    "name",
    ["composed", "of two", "of one twice", "nested", "running", "transformed", "several", "list"],
)
def test_a_metric_made_of_others_counts_as_it_does_by_itself(name: str) -> None:
    own = made_of_others()[name]
    (metric,) = as_mergeables(own)
    data = batches()
    if name == "several":
        data = [(pred[:, None], target[:, None]) for pred, target in data]
    counted = fold(metric, data)
    for pred, target in data:
        own.update(pred, target)
    assert isinstance(metric, TorchMetric)
    assert metric.value(counted) == pytest.approx(float(own.compute()), rel=1e-6)


def test_a_metric_made_of_others_is_merged_part_by_part() -> None:
    (metric,) = as_mergeables(made_of_others()["of two"])
    assert isinstance(metric, TorchMetric)
    parts = [fold(metric, [batch]) for batch in batches()]
    kept = Untouched(parts)
    merged = metric.merge(metric.merge(parts[0], parts[1]), parts[2])
    assert metric.value(merged) == pytest.approx(metric.value(fold(metric, batches())))
    kept.check()


def test_numbers_beside_the_states_that_differ_are_not_merged() -> None:
    (metric,) = as_mergeables(made_of_others()["running"])
    assert isinstance(metric, TorchMetric)
    one, two = fold(metric, batches()[:1]), fold(metric, batches()[:2])
    with pytest.raises(RuntimeError, match=r"running was to be merged, .*_num_vals_seen': 1"):
        metric.merge(one, two)


class Forgetful(RootMeanSquare):
    """With a list that is no state."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Beside the states."""
        super().update(pred, target)
        self.seen.append(pred)


class Hidden(RootMeanSquare):
    """With metrics that no one finds."""

    def __init__(self) -> None:
        super().__init__()
        self.others = [RootMeanSquare()]


class Counting(RootMeanSquare):
    """With a number that is no state."""

    batches = 0

    def update(self, pred: Tensor, target: Tensor) -> None:
        """One batch."""
        super().update(pred, target)
        self.batches += 1

    def compute(self) -> Tensor:
        """The number."""
        return torch.tensor(self.batches)


def test_a_list_that_is_no_state_is_refused_at_the_first_batch() -> None:
    with pytest.raises(TypeError, match=r"forgetful expected .* changes of seen, .*add_state"):
        fold(TorchMetric(Forgetful), batches()[:1])


def test_metrics_in_a_list_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Hidden expected .* submodules, got others of type list"):
        TorchMetric(Hidden)


def test_a_number_that_is_no_state_goes_along() -> None:
    metric = TorchMetric(Counting)
    assert metric.value(fold(metric, batches())) == 3.0


def test_a_metric_of_several_numbers_is_refused_by_name() -> None:
    class Pair(RootMeanSquare):
        def compute(self) -> Tensor:
            return torch.zeros(2)

    metric = TorchMetric(Pair)
    with pytest.raises(TypeError, match=r"TorchMetric: pair must measure one number.*\(2,\)"):
        metric.value(fold(metric, batches()))
