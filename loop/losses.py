"""Losses made of losses: of every sample by itself, of two samples at once, of softened targets."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeGuard

import optree
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from functional_sgd.outputs import map_output
from functional_sgd.tree import Tree

Loss: TypeAlias = Callable[..., Tensor]
"""(pred, *targets) -> 0-d tensor, a mean over the batch."""

_FUNCTION_OF: Mapping[type, Loss] = {
    nn.BCELoss: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.HuberLoss: F.huber_loss,
    nn.L1Loss: F.l1_loss,
    nn.MSELoss: F.mse_loss,
    nn.NLLLoss: F.nll_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.SoftMarginLoss: F.soft_margin_loss,
}
_OF_CLASSES = (F.cross_entropy, F.nll_loss)  # means weighted by class
_OF_ELEMENTS = (  # plain means, with a weight or not
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.soft_margin_loss,
)
_OF_NUMBERS = (
    F.huber_loss,
    F.l1_loss,
    F.mse_loss,
    F.smooth_l1_loss,
)  # plain means, unless there is a weight


def per_sample(loss: Loss) -> Loss:
    """The loss of every sample by itself: a function (pred, *targets) -> tensor (N,), whose mean is
    the loss.

    The usual losses of torch.nn (functions, modules, partials of functions) are asked for unreduced
    values, so class weights and ignored targets count as much as in the mean. Any other loss is
    called on batches of one sample, all in one go (torch.vmap). That is right for every mean over
    samples, and fails with a ValueError for losses that draw random numbers, write in place, or
    branch on values. Raises ValueError for a loss with reduction="sum".

    >>> per_sample(F.mse_loss)(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.zeros(2, 2))
    tensor([5., 0.])
    >>> distance = lambda pred, target: (pred - target).abs().mean()
    >>> per_sample(distance)(torch.tensor([1.0, 3.0]), torch.zeros(2))
    tensor([1., 3.])
    """
    function, options = unwrapped(loss)
    reduction = options.pop("reduction", "mean")
    if reduction == "sum":
        raise ValueError(
            f"per_sample: {_name(function)} has reduction='sum', but a Learner's loss is a mean."
        )
    if reduction == "mean" and function in _OF_CLASSES:
        return partial(_of_classes, function, options)
    unweighted = function in _OF_NUMBERS and "weight" not in options
    if reduction == "mean" and (function in _OF_ELEMENTS or unweighted):
        return partial(_of_elements, function, options)
    return partial(_one_by_one, loss)


def smoothed(loss: Loss, eps: float) -> Loss:
    """Cross-entropy whose targets are softened: (1 - eps) * nll + eps / C * (sum over the C classes
    of -log p).

    `loss` is F.cross_entropy, a partial of it, or nn.CrossEntropyLoss; its other options stay, and
    class weights count as torch's `label_smoothing` has it. Raises ValueError for any other loss,
    and for one that is smoothed already. Source: Szegedy et al. 2016.

    >>> pred = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    >>> smoothed(F.cross_entropy, 0.1)(pred, torch.tensor([0, 1]))
    tensor(1.3221)
    """
    function, options = unwrapped(loss)
    if function is not F.cross_entropy:
        raise ValueError(
            f"LabelSmoothing: the loss must be F.cross_entropy or nn.CrossEntropyLoss, got "
            f"{_name(loss)}. "
            f"Smooth the targets in your own loss: F.cross_entropy(..., label_smoothing={eps})."
        )
    if options.get("label_smoothing"):
        raise ValueError(
            f"LabelSmoothing: the loss has label_smoothing={options['label_smoothing']} already. "
            f"Leave one of them out."
        )
    return partial(F.cross_entropy, **{**options, "label_smoothing": eps})


@dataclass(frozen=True, eq=False)
class MixedLoss:
    """The loss for samples that are mixtures: lam * loss(pred, y) + (1 - lam) * loss(pred,
    y[order]).

    `lam` is one number for the batch (0-d), which serves any loss, or one for each sample (N,),
    with the demands of `per_sample`; the mean over the samples is returned. `order` is where the
    predictions are, `lam` anywhere.

    >>> loss = MixedLoss(F.mse_loss, torch.tensor(0.75), torch.tensor([1, 0]))
    >>> target = torch.tensor([0.0, 1.0])
    >>> loss(torch.zeros(2), target), loss(target, target)
    (tensor(0.5000), tensor(0.2500))
    """

    loss: Loss
    lam: Tensor
    order: Tensor

    def __call__(self, pred: Tree, *targets: Tree) -> Tensor:
        """The mean over the batch."""
        loss = per_sample(self.loss) if self.lam.dim() else self.loss
        own, other = loss(pred, *targets), loss(pred, *permuted(targets, self.order))
        return torch.lerp(other, own, self.lam.to(own)).mean()


def permuted(tree: Tree, order: Tensor) -> Tree:
    """The tree with the samples of its tensors in another order; 0-d tensors and what is no tensor
    stay.

    >>> permuted((torch.tensor([1, 2]), "name"), torch.tensor([1, 0]))
    (tensor([2, 1]), 'name')
    """

    def moved(leaf: object) -> object:
        return leaf[order] if has_samples(leaf) else leaf

    return optree.tree_map(moved, tree)


def has_samples(leaf: object) -> TypeGuard[Tensor]:
    """Whether this is a tensor with a first axis."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def unwrapped(loss: Loss) -> tuple[Loss, dict[str, Any]]:
    """A loss as (function, options): of a loss module, its function in torch.nn.functional; of a
    partial, its own.

    >>> function, options = unwrapped(nn.HuberLoss(delta=2.0))
    >>> function is F.huber_loss, options
    (True, {'reduction': 'mean', 'delta': 2.0})
    """
    # By exact type: a subclass may compute something else.
    if type(loss) in _FUNCTION_OF:
        function = _FUNCTION_OF[type(loss)]
        names = inspect.signature(function).parameters
        options = {name: getattr(loss, name, None) for name in names}
    elif isinstance(loss, partial) and not loss.args:
        function, options = loss.func, loss.keywords
    else:
        return loss, {}
    return function, {name: value for name, value in options.items() if value is not None}


def _of_elements(
    function: Loss, options: Mapping[str, Any], pred: Tensor, target: Tensor
) -> Tensor:
    return _of_rows(function(pred, target, **options, reduction="none"))


def _of_classes(function: Loss, options: Mapping[str, Any], pred: Tensor, target: Tensor) -> Tensor:
    """Scaled so that their mean is the weighted mean."""
    values = function(pred, target, **options, reduction="none")
    if target.is_floating_point():  # probabilities of classes: a plain mean
        return _of_rows(values)
    counted, weight = target != options.get("ignore_index", -100), options.get("weight")
    shares = counted.to(values.dtype)
    if weight is not None:
        # An ignored target (-100, say) is no index. It looks up any weight, since its share is 0.
        shares = shares * weight[torch.where(counted, target, 0)]
    scale: Tensor = values.numel() / shares.sum()
    return _of_rows(values) * scale


def _of_rows(values: Tensor) -> Tensor:
    """The mean of each sample's values."""
    return values.reshape(len(values), -1).mean(dim=1)


def _one_by_one(loss: Loss, pred: Tree, *targets: Tree) -> Tensor:
    # torch.vmap does not look into dataclasses and ModelOutputs, so it gets the tensors one by one.
    columns: list[Tensor] = []

    def take(leaf: object) -> None:
        if has_samples(leaf):
            columns.append(leaf)

    map_output(take, (pred, targets))

    def of_one(*sample: Tensor) -> Tensor:
        each = iter(sample)

        def put_back(leaf: object) -> object:
            # As a batch of one sample, which is what the loss knows.
            return next(each).unsqueeze(0) if has_samples(leaf) else leaf

        pred_of_one, targets_of_one = map_output(put_back, (pred, targets))
        return loss(pred_of_one, *targets_of_one)

    try:
        values: Tensor = torch.vmap(of_one)(*columns)
    except RuntimeError as error:
        raise ValueError(
            f"per_sample: {_name(loss)} cannot be taken sample by sample: "
            f"{str(error).splitlines()[0]} "
            f"It must be a mean over samples without random numbers, writing in place, or branches "
            f"on values. "
            f"For mixing, CutMix takes any loss, and so does MixUp(mix_targets=True) of "
            f"floating-point targets."
        ) from error
    if values.dim() != 1:
        raise ValueError(
            f"per_sample: {_name(loss)} must return a 0-d tensor, got shape "
            f"{tuple(values.shape[1:])}."
        )
    return values


def _name(loss: Loss) -> str:
    return str(getattr(loss, "__name__", type(loss).__name__))
