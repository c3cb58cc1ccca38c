"""Look at the samples of an evaluation one by one."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

from torch import Tensor

from functional_sgd.outputs import map_output
from functional_sgd.tree import Tree
from loop.learner import Learner
from loop.losses import per_sample
from loop.run.stages import learner_of
from loop.state import State
from loop.training.collecting import Collector, joined
from loop.training.fit import evaluate


class SampleLosses(NamedTuple):
    """All samples of an evaluation: inputs, targets, preds, losses. A single input, or target, is
    the tensor itself, several are a tuple.
    """

    inputs: Tree
    targets: Tree
    preds: Tree
    losses: Tensor  # (N,)

    def __repr__(self) -> str:
        if not len(self.losses):
            return "SampleLosses(0 samples)"
        low, high = float(self.losses.min()), float(self.losses.max())
        return f"SampleLosses({len(self.losses):,} samples, losses from {low:g} to {high:g})"


def sample_losses(
    learner: Learner, state: State, data: Iterable[object] | None = None
) -> SampleLosses:
    """Every sample of the validation data (or of other data) with the model's prediction and the
    loss of it alone: a tuple (inputs, targets, preds, losses), by these names too.

    The samples are in the order of the data, all in memory; the model is in evaluation mode, and
    the state is not touched. What the loss of a sample is, and which losses have one, see
    `loop.losses.per_sample`; the mean of these is the valid_loss. `plot_top_losses` shows the
    worst. Raises ValueError if there is no data, it has no targets, a callback of the learner
    leaves a batch out, or batches cannot be joined (see `predict`).

    >>> from functional_sgd import sgd
    >>> from loop import DataLoaders
    >>> import torch
    >>> model, data = torch.nn.Identity(), [(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))]
    >>> learner = Learner(model, DataLoaders(data, data), torch.nn.functional.mse_loss, sgd())
    >>> sample_losses(learner, learner.init()).losses
    tensor([1., 4.])
    """
    collector = CollectSamples()
    after = evaluate("sample_losses", learner, state, data, collector)
    batches = after.memory.get(collector.name, ())
    if not batches:
        raise ValueError(
            "sample_losses: the data has no targets, so there are no losses. Use predict."
        )
    inputs, targets, preds, losses = map_output(partial(joined, "sample_losses"), *batches)
    return SampleLosses(_single(inputs), _single(targets), preds, losses)


@dataclass(frozen=True)
class CollectSamples(Collector):
    """Remember every batch of a validation: inputs, targets, prediction and losses."""

    who: ClassVar[str] = "sample_losses"

    def after_loss(self, state: State) -> State | None:
        """Keep one batch's."""
        if state.xb is None or not state.yb:
            return None
        losses = per_sample(learner_of(state).loss)(state.pred, *state.yb)
        kept = (state.xb, state.yb, state.pred, losses)
        return state.remember(self.name, (*state.memory.get(self.name, ()), kept))


def _single(values: tuple[Tree, ...]) -> Tree:
    return values[0] if len(values) == 1 else values
