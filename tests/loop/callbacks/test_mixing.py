"""MixUp, CutMix and LabelSmoothing: training batches that are mixtures (B30: Mixup as a
before_batch callback).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from functional_sgd import sgd
from loop import CancelEpoch, DataLoaders, Learner, State, fit, trace
from loop.callbacks.mixing import CutMix, LabelSmoothing, MixUp, beta, generator_of
from loop.losses import MixedLoss, smoothed
from tests.comparing import Untouched, assert_close, assert_same
from tests.loop.helpers import Kept, assert_same_run, learned, learner, loaders, on, raiser

BOTH = [MixUp, CutMix]


def images(count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Batches of five images, 1 x 6 x 8, of three classes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(5, 1, 6, 8, generator=generator), torch.randint(3, (5,), generator=generator))
        for _ in range(count)
    ]


def classifier(**rest: Any) -> Learner:
    """A linear classifier of such images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    return Learner(
        model, DataLoaders(images(3), images(2, seed=2)), cross_entropy, sgd(lr=0.1), **rest
    )


def seen(mine: Learner, event: str, *callbacks: Any, epochs: int = 1) -> list[State]:
    """The states at an event."""
    return [state for name, state in trace(mine, mine.init(), epochs, callbacks) if name == event]


def test_b30_mixup_in_a_run() -> None:
    """The batch is mixed, the targets stay, and the loss asks for both, each sample with its own
    lambda.
    """
    mine = classifier()
    for state, (x, y) in zip(seen(mine, "after_loss", MixUp())[:3], images(3), strict=True):
        generator = generator_of(state, 101)
        lam = beta(0.4, 5, generator)
        lam, order = torch.maximum(lam, 1 - lam).float(), torch.randperm(5, generator=generator)
        assert len(set(lam.tolist())) == 5
        assert_close(
            state.x,
            lam[:, None, None, None] * x + (1 - lam)[:, None, None, None] * x[order],
            atol=1e-6,
        )
        assert state.y is y or torch.equal(state.y, y)
        each = lam * cross_entropy(state.pred, y, reduction="none")
        each += (1 - lam) * cross_entropy(state.pred, y[order], reduction="none")
        assert_close(state.loss, each.mean(), rtol=1e-6)


def test_cutmix_in_a_run() -> None:
    mine = classifier()
    cut = 0
    for state, (x, y) in zip(seen(mine, "after_loss", CutMix())[:3], images(3), strict=True):
        mixed = state.learner.loss if state.learner else None
        assert isinstance(mixed, MixedLoss)
        share, other = float(mixed.lam), x[mixed.order]
        pasted = (state.x != x).any(dim=(0, 1))
        assert torch.equal(torch.where(pasted, other, x), state.x)
        assert float(pasted.float().mean()) == pytest.approx(1 - share, abs=1e-6)
        losses = cross_entropy(state.pred, y), cross_entropy(state.pred, y[mixed.order])
        assert_close(state.loss, share * losses[0] + (1 - share) * losses[1], rtol=1e-6)
        cut += int(pasted.any())
    assert cut == 3


@pytest.mark.parametrize("make", BOTH)
def test_validation_is_untouched(make: Callable[[], Any]) -> None:
    mine = classifier()
    for state, (x, y) in zip(seen(mine, "after_loss", make())[3:], images(2, seed=2), strict=True):
        assert not state.training
        assert torch.equal(state.x, x)
        assert_same(state.loss, cross_entropy(state.pred, y))


@pytest.mark.parametrize("make", BOTH)
def test_nothing_is_written_to(make: Callable[[], Any]) -> None:
    mine = classifier()
    start = mine.init()
    kept, data = Kept(start), Untouched(mine.data.train)
    fit(mine, start, 2, [make()])
    kept.check()
    data.check()


@pytest.mark.parametrize("make", [*BOTH, LabelSmoothing])
@pytest.mark.parametrize("event", ["before_batch", "after_loss", "before_step", "after_batch"])
@pytest.mark.parametrize("end", [CancelEpoch, ValueError], ids=str)
def test_the_loss_comes_back_whatever_happens(
    make: Callable[[], Any], event: str, end: Any
) -> None:
    """After CancelEpoch and after an error: the next epoch, and the next run, measure by the
    learner's own loss.
    """
    mine = classifier()
    found: list[Any] = []
    spy = on("spy", 100, before_epoch=lambda state: found.append(state.learner.loss))
    try:
        state = fit(mine, mine.init(), 2, [make(), spy, on("end", 90, **{event: raiser(end)})])
    except ValueError as error:
        state = error.state  # type: ignore[attr-defined]
    fit(mine, state, 1, [spy])
    assert all(loss is cross_entropy for loss in found)
    assert len(found) == (3 if end is CancelEpoch else 2)


@pytest.mark.parametrize("make", BOTH)
def test_two_runs_are_one(make: Callable[[], Any]) -> None:
    """Chance is a function of the state."""
    mine = classifier(callbacks=[make()])
    twice = fit(mine, fit(mine, mine.init(), 1), 1)
    once = fit(mine, mine.init(), 2)
    assert_same(learned(twice), learned(once))
    assert twice.history.losses == once.history.losses
    assert_same_run(fit(mine, mine.init(), 2), once)
    assert fit(mine, mine.init(seed=1), 2).history.losses != once.history.losses


@pytest.mark.parametrize("mix_targets", [None, True])
def test_floating_targets_are_mixed(mix_targets: bool | None) -> None:
    mine = learner()
    for state, (x, y) in zip(
        seen(mine, "after_loss", MixUp(mix_targets=mix_targets))[:3], mine.data.train, strict=True
    ):
        generator = generator_of(state, 101)
        lam = beta(0.4, 4, generator)
        lam, order = (
            torch.maximum(lam, 1 - lam).float()[:, None],
            torch.randperm(4, generator=generator),
        )
        assert_close(state.x, torch.lerp(x[order], x, lam))
        assert_close(state.y, torch.lerp(y[order], y, lam))
        assert state.learner is not None
        assert state.learner.loss is mse_loss


def test_losses_of_floating_targets_can_be_mixed_too() -> None:
    states = seen(learner(), "after_loss", MixUp(mix_targets=False))
    assert isinstance(states[0].learner.loss, MixedLoss)  # type: ignore[union-attr]


def test_a_loss_of_a_users_own() -> None:
    mine = classifier()
    own = replace(mine, loss=lambda pred, target: cross_entropy(pred, target))
    assert_close(
        fit(own, own.init(), 1, [MixUp()]).params,
        fit(mine, mine.init(), 1, [MixUp()]).params,
        rtol=1e-5,
    )


@pytest.mark.parametrize("make", BOTH)
def test_smoothing_goes_together_with_mixing(make: Callable[[], Any]) -> None:
    """The smoothed loss is what is mixed, whatever the order of the list."""
    mine = classifier()
    ready = replace(mine, loss=smoothed(cross_entropy, 0.2))
    expected = fit(ready, ready.init(), 1, [make()])
    for callbacks in ([make(), LabelSmoothing(0.2)], [LabelSmoothing(0.2), make()]):
        end = fit(mine, mine.init(), 1, callbacks)
        assert_same(end.params, expected.params)
        assert end.history.losses == expected.history.losses


def test_smoothing_is_for_training_only() -> None:
    mine = classifier()
    smooth, plain = (
        fit(mine, mine.init(), 1, [LabelSmoothing()], lr=0.0),
        fit(mine, mine.init(), 1, lr=0.0),
    )
    assert smooth.history.losses[0] != plain.history.losses[0]
    assert smooth.history.rows[0]["valid_loss"] == plain.history.rows[0]["valid_loss"]


def test_smoothing_of_another_loss() -> None:
    mine = learner()
    with pytest.raises(ValueError, match="LabelSmoothing: the loss must be"):
        fit(mine, mine.init(), 1, [LabelSmoothing()])


@pytest.mark.parametrize("callbacks", [[MixUp(), CutMix()], [CutMix(), MixUp()]])
def test_a_batch_is_mixed_once(callbacks: list[Any]) -> None:
    mine = classifier()
    with pytest.raises(ValueError, match="mixed already"):
        fit(mine, mine.init(), 1, callbacks)


def test_inputs_that_cannot_be_mixed() -> None:
    mine = classifier()
    whole = replace(mine, data=DataLoaders([(x.long(), y) for x, y in images(1)]))
    for callback in (MixUp(), CutMix()):
        with pytest.raises(ValueError, match=r"no input is .*Got torch.int64 \(5, 1, 6, 8\)"):
            fit(whole, whole.init(), 1, [callback])
    with pytest.raises(
        ValueError, match=r"CutMix: no input is an image, .*Got torch.float32 \(4, 2\)"
    ):
        fit(learner(), learner().init(), 1, [CutMix()])


def test_images_of_two_sizes() -> None:
    mine = classifier(n_inputs=2)
    two = replace(mine, data=DataLoaders([(x, x[..., :4], y) for x, y in images(1)]))
    with pytest.raises(
        ValueError, match=r"CutMix: images must be of one size, got \[\(6, 4\), \(6, 8\)\]"
    ):
        fit(two, two.init(), 1, [CutMix()])


@pytest.mark.parametrize("make", BOTH)
def test_classes_cannot_be_blended(make: Callable[..., Any]) -> None:
    mine = classifier()
    with pytest.raises(ValueError, match="mix_targets=True needs floating-point targets"):
        fit(mine, mine.init(), 1, [make(mix_targets=True)])


@pytest.mark.parametrize("make", [*BOTH, LabelSmoothing])
@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_shares_out_of_range(make: Callable[..., Any], value: float) -> None:
    with pytest.raises(ValueError, match=f"{make.__name__}: (alpha|eps) must be .*got {value}"):
        make(value)


def test_a_batch_without_targets() -> None:
    mine = replace(
        learner(),
        loss=lambda pred: pred.square().mean(),
        data=DataLoaders([x for x, _ in loaders().train]),
    )
    assert fit(mine, mine.init(), 1, [MixUp()]).train_iter == 3
