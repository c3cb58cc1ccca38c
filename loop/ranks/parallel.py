"""A learner of which every rank has its part."""

from dataclasses import replace
from typing import Any

from torch import nn

from loop.callbacks.accumulation import Weight, weight_called
from loop.learner import Learner
from loop.ranks.callbacks import Ranks
from loop.ranks.cut import Cuts
from loop.ranks.group import Group, everyone, group_of
from loop.ranks.loss import GlobalLoss, LocalShare
from loop.ranks.weights import OneWeight, check_weights


def parallel(learner: Learner, mesh: Any = None, weight: str | Weight = "samples") -> Learner:
    """This rank's learner: `fit`, `validate`, `predict`, `lr_find` and all else take it, on all
    ranks at once.

    Every rank reads its part of each batch. Losses, gradients, metrics and predictions are those of
    the whole batches, so every rank holds the same state, bit for bit, and it is the state of one
    process that reads whole batches, but for the order of additions. A batch of 64 stays a batch of
    64: with more ranks, each has less of it. No world size is in a state, so a run that was stopped
    on 8 ranks can be resumed on 3, with the same samples in the same order.

    `mesh` is a DeviceMesh of one dimension, such as `mesh["data"]`, or a process group; None is all
    processes. Start them by torchrun, and call `torch.distributed.init_process_group()` first.
    `weight` says what the loss divides by: "samples"; "targets", those that are not -100; or a
    function state -> number or 0-d tensor (see GradientAccumulation, which has the same one).

    What else differs from one process:

    - Rank 0 alone reports: Progress, loggers, Checkpoint and other callbacks with `reports` are
      left out elsewhere, also those given to `fit`. All ranks read the folder of `resume`.
    - Ctrl-C and SIGTERM on any rank end the run on all, at the same batch; so does every Cancel
      that a callback raises because of what is in the state.
    - Dropout draws other numbers on each rank. Samples are augmented alike on any number of ranks
      (`make_loader`).
    - BatchNorm sees a rank's part of a batch, and its running statistics are means over ranks;
      `global_batch_norm(model)` makes it see the whole batch. Every other float buffer is a mean
      over ranks too, so a constant one may change in its last bits. Frozen params keep theirs.
    - What else a forward pass changes must not depend on the data, since a rank sees its part of
      them: params, and buffers that are no floats, are compared (params in the first batch, buffers
      after every epoch), and must be alike on all ranks. Float buffers must keep their shapes.
    - Callbacks with `order` <= CHANGE (0) see and change the loss of this rank's part, as they see
      its inputs; later ones see that of the whole batch. If there are none that can see it before
      after_backward, it comes with the gradients, and `trace` shows it from there on. What a
      callback of your own counts in `state.memory` is of this rank alone.
    - Shares are taken before callbacks change the batch. One that leaves samples out must come
      first (`order` below -50), and `weight=loop.metrics.sample_count` count what is left.
    - The model itself goes into the learner, neither in DistributedDataParallel nor in FSDP. Where
      `parallelize_module` has cut it over another dimension of the mesh, ranks with the same part
      of a batch draw the same dropout.

    Raises RuntimeError if torch.distributed has not been started; ValueError for a mesh of more
    dimensions, params that are cut over the processes of `mesh`, a loader with a
    DistributedSampler, embeddings with max_norm, a GradientAccumulation with another weight, and an
    optimizer that takes a second gradient or
    the loss elsewhere (sam, lbfgs), which would be of this rank's part.
    """
    group = group_of("parallel", mesh)
    if any(isinstance(callback, Ranks) for callback in learner.callbacks):
        raise ValueError("parallel: the learner is parallel already. Pass the one it was made of.")
    if learner.opt.perturbs or "value_fn" in learner.opt.names:
        why = "a second gradient" if learner.opt.perturbs else "the loss at other params"
        raise ValueError(
            f"parallel: {learner.opt!r} takes {why}, which would be of this rank's part of the "
            f"batch. Use an optimizer that takes one gradient."
        )
    _check_embeddings(learner.model, group)
    counted: Weight | None = weight_called("parallel", weight)
    check_weights(weight, learner.callbacks)
    if weight == "samples":
        counted = None  # every rank knows how many samples the batches of all have
    all_of_us = everyone("parallel", group, learner.model.parameters())
    ranks = Ranks(group, all_of_us, counted)
    ours = (ranks, GlobalLoss(group, all_of_us), LocalShare(), OneWeight(weight))
    train, valid = learner.data.train, learner.data.valid
    return replace(
        learner,
        data=Cuts(train, valid, group.rank, group.size, group.members),
        callbacks=(*ours, *learner.callbacks),
        salt=group.rank,
    )


def _check_embeddings(model: nn.Module, group: Group) -> None:
    """Raise ValueError for a layer that shortens the rows which a rank's samples ask for."""
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) or layer.max_norm is None:
            continue
        if group.size > 1:
            raise ValueError(
                f"parallel: {name!r} of the model, an {type(layer).__name__}, has "
                f"max_norm={layer.max_norm}: a forward pass would shorten the rows that this "
                f"rank's samples ask for, and on other ranks other rows. Leave max_norm out, and "
                f"shorten all rows in a callback with after_step."
            )
