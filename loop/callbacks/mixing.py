"""Train on mixtures: of two samples (MixUp, CutMix), or of the target and all classes
(LabelSmoothing).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, TypeGuard

import optree
import torch
from torch import Tensor

from functional_sgd.tree import Tree, flatten
from loop.callback import Callback
from loop.losses import MixedLoss, has_samples, smoothed
from loop.metrics import sample_count
from loop.run.chance import key
from loop.run.stages import device_of, learner_of
from loop.state import State

_MIXUP, _CUTMIX = 101, 102  # what a random number is for


class Box(NamedTuple):
    """A part of an image: rows top to bottom - 1, columns left to right - 1."""

    top: int
    bottom: int
    left: int
    right: int


@dataclass(frozen=True)
class MixUp(Callback):
    """Blend every sample of a training batch with another one of it, and ask for both targets.

    x' = lam * x + (1 - lam) * x[order], with a random order and, for each sample, lam ~ Beta(alpha,
    alpha), or 1 - lam if that is more. Every floating-point input is blended. The loss is lam *
    loss(pred, y) + (1 - lam) * loss(pred, y[order]), sample by sample (`loop.losses.per_sample`
    says for which losses). With `mix_targets` the targets are blended like the inputs, and the loss
    stays as it is; None does so where all targets are floating-point.

    What is drawn is a function of the state's seed and train_iter. Validation is untouched. Raises
    ValueError if alpha is not above 0 and finite, no input is floating-point, or targets to be
    mixed are not; and if another callback has mixed the loss of the batch already: use one of MixUp
    and CutMix. Source: Zhang et al. 2018, in fastai's form.
    """

    alpha: float = 0.4
    mix_targets: bool | None = None

    def __post_init__(self) -> None:
        _check_alpha("MixUp", self.alpha)

    def before_batch(self, state: State) -> State | None:
        """Mix a training batch."""
        if not state.training:
            return None
        _check_inputs("MixUp", state, _is_floating, "floating-point. Convert it to float")
        count, generator = sample_count(state), generator_of(state, _MIXUP)
        lam = beta(self.alpha, count, generator)
        # At least 1/2: else two samples mixed with each other could give the same mixture twice.
        lam = torch.maximum(lam, 1 - lam)
        order = torch.randperm(count, generator=generator).to(device_of(state))
        state = state.replace(xb=mixup_batch(state.xb, lam, order))
        return _mix_targets("MixUp", state, lam, order, self.mix_targets)


@dataclass(frozen=True)
class CutMix(Callback):
    """Paste a box of another image into every image of a training batch, and ask for both targets.

    Height and width of the box are those of the image times sqrt(1 - lam), with one lam ~
    Beta(alpha, alpha) for the batch; its centre is anywhere, and what sticks out is cut off. Images
    are floating-point inputs (N, ..., H, W) of at least four axes; other inputs stay. The loss is
    share * loss(pred, y) + (1 - share) * loss(pred, y[order]), where share is what is left of the
    image's area; any loss will do. `mix_targets` and chance are as for MixUp.

    Raises ValueError if alpha is not above 0 and finite, no input is an image, images differ in
    size, targets to be mixed are not floating-point, or the batch is mixed already. Source: Yun et
    al. 2019, in fastai's form.
    """

    alpha: float = 1.0
    mix_targets: bool | None = None

    def __post_init__(self) -> None:
        _check_alpha("CutMix", self.alpha)

    def before_batch(self, state: State) -> State | None:
        """Mix a training batch."""
        if not state.training:
            return None
        _check_inputs(
            "CutMix", state, _is_image, "an image, floating-point of shape (N, ..., H, W)"
        )
        height, width = _image_size(state.xb)
        count, generator = sample_count(state), generator_of(state, _CUTMIX)
        lam = float(beta(self.alpha, 1, generator))
        order = torch.randperm(count, generator=generator).to(device_of(state))
        row = int(torch.randint(height, (), generator=generator))
        column = int(torch.randint(width, (), generator=generator))
        box = cutmix_box(height, width, lam, row, column)
        share = torch.tensor(1 - box_area(box) / (height * width), dtype=torch.float64)
        state = state.replace(xb=cutmix_batch(state.xb, order, box))
        return _mix_targets("CutMix", state, share, order, self.mix_targets)


@dataclass(frozen=True)
class LabelSmoothing(Callback):
    """Soften the targets in training: a share eps in [0, 1] of each goes to all classes alike.

    The learner's loss, which must be cross-entropy, becomes `loop.losses.smoothed(loss, eps)` for
    training batches; the validation loss stays what it was. Goes together with MixUp and CutMix.

    Raises ValueError if eps is not in [0, 1], and when the run starts if the loss is not
    F.cross_entropy or nn.CrossEntropyLoss, or is smoothed already.
    """

    eps: float = 0.1
    # `smoothed` needs a cross-entropy, not the MixedLoss that these two make of it.
    run_before: ClassVar[tuple[type, ...]] = (MixUp, CutMix)

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 1:
            raise ValueError(f"LabelSmoothing: eps must be in [0, 1], got {self.eps}.")

    def before_fit(self, state: State) -> None:
        """Check the loss."""
        smoothed(learner_of(state).loss, self.eps)

    def before_batch(self, state: State) -> State | None:
        """Replace the loss of a training batch."""
        learner = learner_of(state)
        if not state.training:
            return None
        return state.replace(learner=replace(learner, loss=smoothed(learner.loss, self.eps)))


def beta(alpha: float, count: int, generator: torch.Generator) -> Tensor:
    """`count` numbers drawn from Beta(alpha, alpha), in float64 on the CPU.

    x / (x + y) of two gamma variates, by their logarithms, so that no alpha above 0 is too small:
    Gamma(alpha) is Gamma(alpha + 1) * U**(1 / alpha).

    >>> draws = beta(1e-6, 4, torch.Generator().manual_seed(0))
    >>> bool(((draws == 0) | (draws == 1)).all())
    True
    """
    shape = torch.full((2, count), alpha + 1, dtype=torch.float64)
    log_uniform = -torch.empty_like(shape).exponential_(generator=generator)
    logs = torch._standard_gamma(shape, generator=generator).log() + log_uniform / alpha
    return torch.sigmoid(logs[0] - logs[1])


def mixup_batch(batch: Tree, lam: Tensor, order: Tensor) -> Tree:
    """lam * x + (1 - lam) * x[order] for every floating-point tensor x (N, ...); lam is one number,
    or one a sample.

    >>> x, lam = torch.tensor([[0.0], [1.0]]), torch.tensor([0.5, 0.75])
    >>> mixup_batch((x,), lam, torch.tensor([1, 0]))
    (tensor([[0.5000],
            [0.7500]]),)
    """

    def mix(leaf: object) -> object:
        if not _is_floating(leaf):
            return leaf
        weight = lam.to(leaf).reshape(-1, *(1,) * (leaf.dim() - 1))
        return torch.lerp(leaf[order], leaf, weight)

    return optree.tree_map(mix, batch)


def cutmix_box(height: int, width: int, lam: float, row: int, column: int) -> Box:
    """The box that covers 1 - lam of an image around a centre; what sticks out is cut off.

    >>> cutmix_box(10, 20, 0.75, row=5, column=2)
    Box(top=3, bottom=7, left=0, right=7)
    """
    side = math.sqrt(1 - lam)
    half_height, half_width = round(height * side) // 2, round(width * side) // 2
    return Box(
        top=max(row - half_height, 0),
        bottom=min(row + half_height, height),
        left=max(column - half_width, 0),
        right=min(column + half_width, width),
    )


def box_area(box: Box) -> int:
    """The number of pixels in a box.

    >>> box_area(Box(3, 7, 0, 7))
    28
    """
    top, bottom, left, right = box
    return (bottom - top) * (right - left)


def cutmix_batch(batch: Tree, order: Tensor, box: Box) -> Tree:
    """The images with a box of image order[i] in image i, in new tensors; other tensors as they
    are.

    >>> x = torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 1, 1, 3)
    >>> cutmix_batch(x, torch.tensor([1, 0]), Box(0, 1, 2, 3))[:, 0, 0]
    tensor([[0., 0., 1.],
            [1., 1., 0.]])
    """
    top, bottom, left, right = box

    def mix(leaf: object) -> object:
        if not _is_image(leaf):
            return leaf
        # The batch may be a view of the user's data, or an expanded tensor.
        mixed = leaf.clone()
        mixed[..., top:bottom, left:right] = leaf[..., top:bottom, left:right][order]
        return mixed

    return optree.tree_map(mix, batch)


def generator_of(state: State, purpose: int) -> torch.Generator:
    """A generator on the CPU whose numbers are a function of the state's seed and train_iter, and
    of what for.
    """
    # Draw on the CPU, so that the numbers are the same on every device.
    return torch.Generator().manual_seed(key(state.seed, state.train_iter, purpose))


def _mix_targets(who: str, state: State, lam: Tensor, order: Tensor, mix: bool | None) -> State:
    """Blend the targets, or let the loss ask for both."""
    leaves = _leaves(state.yb)
    floating = all(_is_floating(leaf) for leaf in leaves if has_samples(leaf))
    if mix and not floating:
        raise ValueError(
            f"{who}: mix_targets=True needs floating-point targets. Leave it out to mix the losses."
        )
    if mix or (mix is None and floating):
        return state.replace(yb=mixup_batch(state.yb, lam, order))
    learner = learner_of(state)
    if isinstance(learner.loss, MixedLoss):
        raise ValueError(
            f"{who}: this batch is mixed already, by another callback. Use one of MixUp and CutMix."
        )
    # The machine puts the learner back at the end of the batch, however it ends.
    return state.replace(learner=replace(learner, loss=MixedLoss(learner.loss, lam, order)))


def _leaves(batch: Tree) -> list[object]:
    return flatten(batch)[0]


def _is_floating(leaf: object) -> TypeGuard[Tensor]:
    return has_samples(leaf) and bool(leaf.is_floating_point())


def _is_image(leaf: object) -> TypeGuard[Tensor]:
    return _is_floating(leaf) and leaf.dim() >= 4


def _image_size(batch: Tree) -> tuple[int, int]:
    sizes = {(leaf.shape[-2], leaf.shape[-1]) for leaf in _leaves(batch) if _is_image(leaf)}
    if len(sizes) != 1:
        raise ValueError(f"CutMix: images must be of one size, got {sorted(sizes)}. Resize them.")
    return sizes.pop()


def _check_inputs(who: str, state: State, fits: Callable[[object], bool], wanted: str) -> None:
    leaves = _leaves(state.xb)
    if not any(fits(leaf) for leaf in leaves):
        kinds = ", ".join(map(_described, leaves))
        raise ValueError(f"{who}: no input is {wanted}. Got {kinds}.")


def _described(leaf: object) -> str:
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype} {tuple(leaf.shape)}"
    return repr(leaf)


def _check_alpha(who: str, alpha: float) -> None:
    if not 0 < alpha < math.inf:
        raise ValueError(f"{who}: alpha must be above 0 and finite, got {alpha}.")
