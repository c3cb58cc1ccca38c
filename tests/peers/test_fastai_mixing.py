"""The same arithmetic as fastai's MixUp, CutMix, RNNRegularizer, label smoothing and fine_tune."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from functional_sgd import adam, by_path, sgd
from loop import Batches, DataLoaders, Learner, fit
from loop.callbacks.mixing import cutmix_batch, cutmix_box, mixup_batch
from loop.callbacks.regularize import RNNRegularizer
from loop.layer_groups import spread
from loop.losses import MixedLoss, smoothed
from loop.training.fine_tune import fine_tune
from tests.comparing import assert_close
from tests.peers.peers import fastai_module

basics, mixup, rnn = (
    fastai_module(f"fastai.{name}") for name in ("basics", "callback.mixup", "callback.rnn")
)
fastai_module("fastai.callback.schedule")  # gives its learner fine_tune
pytestmark = pytest.mark.filterwarnings("ignore")  # of what fastai does

GENERATOR = torch.Generator().manual_seed(0)
ORDER = torch.tensor([2, 0, 1, 4, 3])
IMAGES = torch.randn(5, 3, 9, 14, generator=GENERATOR)
CLASSES = torch.tensor([0, 3, 2, 2, 1])
REALS = torch.randn(5, 4, generator=GENERATOR)
PRED = torch.randn(5, 4, generator=GENERATOR)


def mixed_by(callback: Any, lam: Tensor, target: Tensor, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for fastai's learner, after the callback has mixed its batch with this lambda and
    ORDER.
    """
    loss = basics.CrossEntropyLossFlat() if target.dtype == torch.long else basics.MSELossFlat()
    x = IMAGES.clone()
    learner = SimpleNamespace(xb=(x,), yb=(target,), x=x, y=target, loss_func=loss, training=True)
    callback.learn = learner
    callback.distrib = SimpleNamespace(sample=lambda size: lam)
    monkeypatch.setattr(torch, "randperm", lambda count: ORDER)
    callback.before_train()
    callback.before_batch()
    return learner


LAMS = torch.tensor([0.9, 0.2, 0.5, 0.0, 0.61])


def test_mixup_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = mixed_by(mixup.MixUp(0.4), LAMS, CLASSES, monkeypatch)
    lam = torch.maximum(LAMS, 1 - LAMS)
    assert_close(mixup_batch((IMAGES,), lam, ORDER)[0], theirs.xb[0], atol=1e-6)
    found = MixedLoss(cross_entropy, lam, ORDER)(PRED, CLASSES)
    assert_close(found, theirs.loss_func(PRED, CLASSES), rtol=1e-6, atol=1e-6)


def test_mixup_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = mixed_by(mixup.MixUp(0.4), LAMS, REALS, monkeypatch)
    lam = torch.maximum(LAMS, 1 - LAMS)
    assert_close(mixup_batch((IMAGES,), lam, ORDER)[0], theirs.xb[0], atol=1e-6)
    assert_close(mixup_batch((REALS,), lam, ORDER)[0], theirs.yb[0], atol=1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_cutmix(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)
    lam = torch.rand(1, generator=generator)
    row, column = (int(torch.randint(size, (), generator=generator)) for size in (9, 14))
    centres = iter([torch.tensor([column]), torch.tensor([row])])
    monkeypatch.setattr(torch, "randint", lambda *_: next(centres))
    theirs = mixed_by(mixup.CutMix(), lam, CLASSES, monkeypatch)
    box = cutmix_box(9, 14, float(lam), row, column)
    top, bottom, left, right = box
    assert_close(cutmix_batch((IMAGES,), ORDER, box)[0], theirs.xb[0])
    share = torch.tensor(1 - (bottom - top) * (right - left) / (9 * 14))
    assert_close(
        MixedLoss(cross_entropy, share, ORDER)(PRED, CLASSES),
        theirs.loss_func(PRED, CLASSES),
        atol=1e-6,
    )


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.5, 1.0])
def test_label_smoothing(eps: float) -> None:
    theirs = basics.LabelSmoothingCrossEntropy(eps=eps)(PRED, CLASSES)
    assert_close(smoothed(cross_entropy, eps)(PRED, CLASSES), theirs, rtol=1e-6, atol=1e-6)


class Recurrent(nn.Module):
    """(output, raw, dropped), the latter two as lists."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        raw = self.rnn(x)[0]
        dropped = 0.5 * raw
        return self.head(dropped[:, -1]), [raw], [dropped]


def their_learner(model: nn.Module, x: Tensor, y: Tensor, **rest: Any) -> Any:
    """fastai's learner on these data, four samples a batch."""
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    data = basics.DataLoaders(loader, loader)
    return basics.Learner(data, model, loss_func=mse_loss, train_bn=True, **rest)


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1.0), (0.0, 1.0), (3.0, 0.0)])
def test_rnn_regularizer(alpha: float, beta: float) -> None:
    """Parameters and recorded losses."""
    torch.manual_seed(0)
    x, y, model = torch.randn(12, 5, 2), torch.randn(12, 2), Recurrent()
    mine = Learner(
        model,
        DataLoaders(Batches((x, y), 4)),
        mse_loss,
        sgd(lr=0.1),
        [],
        [RNNRegularizer(alpha, beta)],
    )
    end = fit(mine, mine.init(), 2)
    callbacks = [rnn.RNNCallback(), rnn.RNNRegularizer(alpha, beta)]
    theirs = their_learner(model, x, y, opt_func=basics.SGD, wd=0.0, cbs=callbacks)
    recorded: list[Tensor] = []
    with theirs.no_bar(), theirs.no_logging():
        theirs.fit(2, lr=0.1, cbs=basics.Callback(after_batch=lambda _: _append(theirs, recorded)))
    assert_close(
        end.params,
        {name: value.detach() for name, value in model.named_parameters()},
        rtol=1e-6,
        atol=1e-6,
    )
    assert [float(loss) for loss in end.history.losses] == pytest.approx(
        [float(loss) for loss in recorded], rel=1e-6
    )


def _append(learner: Any, recorded: list[Tensor]) -> None:
    if learner.training:
        recorded.append(learner.loss.detach())


@pytest.mark.parametrize(("epochs", "frozen_epochs"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("mult", [100, 7.0])
def test_fine_tune(epochs: int, frozen_epochs: int, mult: float) -> None:
    """The learning rates of both groups, batch by batch; and the parameters, batch norm in the
    frozen body included.
    """
    torch.manual_seed(0)
    x, y = torch.randn(40, 2), torch.randn(40, 2)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh()), nn.Linear(4, 2)
    )
    mine = Learner(model, DataLoaders(Batches((x, y), 4)), mse_loss, adam(sqr_mom=0.99, eps=1e-5))
    end = fine_tune(mine, mine.init(), epochs, lr=0.02, frozen_epochs=frozen_epochs, lr_mult=mult)

    theirs = their_learner(
        model,
        x,
        y,
        splitter=lambda model: [list(part.parameters()) for part in model],
        wd=0.0,
        opt_func=basics.Adam,
    )
    rates: list[tuple[float, ...]] = []
    spy = basics.Callback(before_batch=lambda _: _rates(theirs, rates))
    spy.order = 61
    with theirs.no_bar(), theirs.no_logging():
        theirs.fine_tune(epochs, 0.02, freeze_epochs=frozen_epochs, lr_mult=mult, cbs=spy)
    assert len(rates) == 10 * (epochs + frozen_epochs)
    ours = [(lr["0.0.weight"], lr["1.bias"]) for lr in end.history.hypers["lr"]]
    for found, expected in zip(ours, rates, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
    assert_close(
        end.params,
        {name: value.detach() for name, value in model.named_parameters()},
        rtol=1e-4,
        atol=1e-5,
    )


def _rates(learner: Any, rates: list[tuple[float, ...]]) -> None:
    if learner.training:
        rates.append(tuple(float(hyper["lr"]) for hyper in learner.opt.hypers))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_rates_are_even_mults(count: int) -> None:
    params = nn.Sequential(*(nn.Linear(1, 1) for _ in range(count))).state_dict()
    expected = dict(enumerate(basics.even_mults(1e-6, 3e-3, count) if count > 1 else [3e-3]))
    wanted = by_path(params, {f"{index}.*": float(rate) for index, rate in expected.items()})
    assert spread(params, 1e-6, 3e-3) == pytest.approx(wanted, rel=1e-12)
