"""Losses made of losses: sample by sample, mixed, smoothed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loop.losses import MixedLoss, per_sample, permuted, smoothed

GENERATOR = torch.Generator().manual_seed(0)
PRED = torch.randn(6, 3, generator=GENERATOR, dtype=torch.float64)
CLASSES = torch.tensor([0, 1, 2, 1, 1, 0])
REALS = torch.randn(6, 3, generator=GENERATOR, dtype=torch.float64)
SHARES = torch.rand(6, 3, generator=GENERATOR, dtype=torch.float64)
WEIGHT = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
IMAGES = torch.randn(6, 3, 2, 4, generator=GENERATOR, dtype=torch.float64)
MASKS = torch.randint(3, (6, 2, 4), generator=GENERATOR)


def own(pred: Tensor, target: Tensor) -> Tensor:
    """A loss of a user, which says nothing of reductions."""
    return (pred - target).pow(4).mean()


LOSSES: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor]] = {
    "mse": (F.mse_loss, PRED, REALS),
    "mse module": (nn.MSELoss(), PRED, REALS),
    "huber with an option": (nn.HuberLoss(delta=0.3), PRED, REALS),
    "partial of smooth l1": (partial(F.smooth_l1_loss, beta=0.3), PRED, REALS),
    "l1": (F.l1_loss, PRED, REALS),
    "bce": (F.binary_cross_entropy, PRED.sigmoid(), SHARES),
    "bce with a weight for each class": (nn.BCEWithLogitsLoss(weight=WEIGHT), PRED, SHARES),
    "bce with pos_weight": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), PRED, SHARES),
    "cross-entropy": (F.cross_entropy, PRED, CLASSES),
    "cross-entropy with weights": (nn.CrossEntropyLoss(weight=WEIGHT), PRED, CLASSES),
    "cross-entropy that ignores padding": (
        nn.CrossEntropyLoss(weight=WEIGHT),
        PRED,
        torch.tensor([0, -100, 2, 1, -100, 0]),
    ),
    "cross-entropy that ignores what is no class": (
        nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=255),
        PRED,
        torch.tensor([0, 255, 2, 1, 255, 0]),
    ),
    "cross-entropy that ignores a class": (
        nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1),
        PRED,
        CLASSES,
    ),
    "cross-entropy, smoothed": (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2),
        PRED,
        CLASSES,
    ),
    "cross-entropy of probabilities": (F.cross_entropy, PRED, SHARES),
    "cross-entropy of pixels": (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=2), IMAGES, MASKS),
    "nll with weights": (nn.NLLLoss(weight=WEIGHT), PRED, CLASSES),
    "a user's": (own, PRED, REALS),
    "soft margin": (F.soft_margin_loss, PRED, REALS.sign()),
    "partial of another": (partial(F.multilabel_soft_margin_loss, weight=WEIGHT), PRED, SHARES),
    "module of another": (nn.MultiLabelSoftMarginLoss(), PRED, SHARES),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_over_samples_is_the_loss(name: str) -> None:
    """Class weights, ignored targets and all."""
    loss, pred, target = LOSSES[name]
    values = per_sample(loss)(pred, target)
    assert values.shape == (6,)
    torch.testing.assert_close(values.mean(), loss(pred, target), rtol=1e-13, atol=0)


UNWEIGHTED = [
    name
    for name in LOSSES
    if "weights" not in name and "ignores" not in name and "smoothed" not in name
]


@pytest.mark.parametrize("name", [name for name in UNWEIGHTED if "pixels" not in name])
def test_a_sample_has_the_loss_that_it_has_alone(name: str) -> None:
    loss, pred, target = LOSSES[name]
    alone = [loss(pred[index : index + 1], target[index : index + 1]) for index in range(6)]
    torch.testing.assert_close(
        per_sample(loss)(pred, target), torch.stack(alone), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_loss(name: str) -> None:
    loss, pred, target = LOSSES[name]
    pred = pred.detach().requires_grad_()
    (found,) = torch.autograd.grad(per_sample(loss)(pred, target).mean(), pred)
    (expected,) = torch.autograd.grad(loss(pred, target), pred)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_predictions_and_targets_may_be_trees() -> None:
    def loss(pred: dict[str, Any], scale: Any, target: Tensor) -> Tensor:
        return pred["scale"] * scale * (pred["values"] - target).abs().mean()

    pred = {"values": PRED, "scale": 3.0}
    found = per_sample(loss)(pred, torch.tensor(2.0), REALS)
    torch.testing.assert_close(found, 6 * (PRED - REALS).abs().mean(dim=1), rtol=1e-13, atol=0)


def random(pred: Tensor, target: Tensor) -> Tensor:
    return F.dropout(pred - target).square().mean()


def branching(pred: Tensor, target: Tensor) -> Tensor:
    return (pred - target).square().mean() if pred.sum() > 0 else pred.mean()


def in_place(pred: Tensor, target: Tensor) -> Tensor:
    return (
        torch.zeros_like(pred[0]).add_((pred - target)[0]).mean()
        + torch.zeros(3).add_(pred[0]).mean()
    )


@pytest.mark.parametrize("loss", [random, branching, in_place])
def test_a_loss_that_cannot_be_taken_sample_by_sample(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(
        ValueError, match=rf"per_sample: {loss.__name__} cannot be .*It must be a mean over samples"
    ):
        per_sample(loss)(PRED, REALS)


def test_a_loss_that_is_no_number() -> None:
    with pytest.raises(
        ValueError, match=r"per_sample: <lambda> must return a 0-d tensor, got shape \(3,\)"
    ):
        per_sample(lambda pred, target: (pred - target)[0])(PRED, REALS)


@pytest.mark.parametrize(
    "loss", [nn.MSELoss(reduction="sum"), partial(F.cross_entropy, reduction="sum")]
)
def test_a_sum_is_no_mean(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="reduction='sum'"):
        per_sample(loss)


def test_smoothing_by_hand() -> None:
    """eps / C * (-sum log p) + (1 - eps) * nll; [[2, 1, 0], [0, 1, 3]], targets 0 and 1."""
    pred = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]], dtype=torch.float64)
    target = torch.tensor([0, 1])
    logs = pred.log_softmax(1)
    expected = (0.1 / 3 * -logs.sum(1) + 0.9 * -logs[[0, 1], target]).mean()
    found = smoothed(F.cross_entropy, 0.1)(pred, target)
    assert float(found) == pytest.approx(float(expected), abs=1e-15)
    assert float(found) == pytest.approx(1.3220592737, abs=1e-7)


@pytest.mark.parametrize(
    "loss",
    [F.cross_entropy, nn.CrossEntropyLoss(), partial(F.cross_entropy, ignore_index=5)],
    ids=["function", "module", "partial"],
)
def test_no_smoothing_is_the_loss(loss: Callable[..., Tensor]) -> None:
    assert torch.equal(smoothed(loss, 0.0)(PRED, CLASSES), loss(PRED, CLASSES))


def test_smoothing_keeps_the_other_options() -> None:
    found = smoothed(nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1), 0.3)(PRED, CLASSES)
    expected = F.cross_entropy(PRED, CLASSES, weight=WEIGHT, ignore_index=1, label_smoothing=0.3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "loss",
    [F.mse_loss, nn.NLLLoss(), own, partial(own, target=REALS)],
    ids=["mse", "nll", "own", "partial"],
)
def test_only_cross_entropy_is_smoothed(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="LabelSmoothing: the loss must be F.cross_entropy"):
        smoothed(loss, 0.1)


def test_what_is_smoothed_already() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing=0.2 already"):
        smoothed(nn.CrossEntropyLoss(label_smoothing=0.2), 0.1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_one_lambda_for_all_samples_or_the_same_for_each(name: str, value: float) -> None:
    """Taken on the whole batch or sample by sample, the mixed loss is the same; at 1 it is the loss
    itself.
    """
    loss, pred, target = LOSSES[name]
    order = torch.tensor([3, 0, 1, 2, 5, 4])
    one = MixedLoss(loss, torch.tensor(value), order)(pred, target)
    each = MixedLoss(loss, torch.full((6,), value), order)(pred, target)
    expected = value * loss(pred, target) + (1 - value) * loss(pred, target[order])
    torch.testing.assert_close(each, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(one, expected, rtol=1e-7, atol=0)


def test_what_is_no_batch_is_not_permuted() -> None:
    number = torch.tensor(3.0)
    found = permuted(
        {"x": torch.tensor([1, 2]), "number": number, "name": "y"}, torch.tensor([1, 0])
    )
    assert found["x"].tolist() == [2, 1]
    assert found["number"] is number
    assert found["name"] == "y"
