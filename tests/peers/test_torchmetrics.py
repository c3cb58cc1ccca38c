"""torchmetrics: its metrics and collections in the metrics of a learner."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from functional_sgd import sgd
from loop import DataLoaders, Learner, fit, validate
from loop.metrics import TorchMetric
from tests.peers.peers import peer

tm = peer("torchmetrics")


def batches() -> list[tuple[Tensor, Tensor]]:
    """Uneven ones, of three classes."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator))
        for n in (5, 1, 8)
    ]


def learner(*metrics: Any) -> Learner:
    torch.manual_seed(0)
    data = DataLoaders(batches(), batches())
    loss = nn.functional.cross_entropy
    return Learner(nn.Linear(4, 3), data, loss, sgd(lr=0.1), metrics)


def of_all(mine: Learner, state: Any, metric: Any) -> Any:
    """What the metric says of all data at once."""
    xs, ys = zip(*batches(), strict=True)
    model = mine.load(state)
    with torch.no_grad():
        metric.update(model(torch.cat(xs)), torch.cat(ys))
    return metric.compute()


def accuracy() -> Any:
    return tm.classification.MulticlassAccuracy(num_classes=3, average="micro")


def auroc() -> Any:
    """It keeps all predictions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory
        return tm.classification.MulticlassAUROC(num_classes=3)


@pytest.mark.parametrize("make", [accuracy, auroc])
def test_a_metric_in_fit_and_validate(make: Any) -> None:
    """Of all batches; the object that was given has counted nothing."""
    given = make()
    mine = learner(given)
    name = mine.metrics[0].name
    end = fit(mine, mine.init(), epochs=2)
    expected = float(of_all(mine, end, make()))
    assert validate(mine, end)[name] == pytest.approx(expected, abs=1e-6)
    assert end.history.column(name)[-1] == pytest.approx(expected, abs=1e-6)
    assert given._update_count == 0


def test_a_collection_is_its_metrics() -> None:
    """Under the names that it has for them."""

    def collection() -> Any:
        every = {"acc": accuracy(), "macro": tm.classification.MulticlassAccuracy(num_classes=3)}
        return tm.MetricCollection(every, prefix="test_")

    mine = learner(collection(), accuracy())
    end = fit(mine, mine.init(), epochs=1)
    found = validate(mine, end)
    expected = of_all(mine, end, collection())
    assert found.keys() >= {"test_acc", "test_macro", "multiclass_accuracy"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=1e-6)
        assert end.history.column(name)[-1] == found[name]


def test_a_collection_made_of_a_list_has_columns_named_after_classes() -> None:
    mine = learner(tm.MetricCollection([accuracy(), tm.classification.MulticlassF1Score(3)]))
    assert [metric.name for metric in mine.metrics] == [
        "multiclass_accuracy",
        "multiclass_f1_score",
    ]


def test_a_collection_as_one_metric_is_an_error() -> None:
    with pytest.raises(TypeError, match="got a collection of acc. Put the collection itself"):
        TorchMetric(lambda: tm.MetricCollection({"acc": accuracy()}))
