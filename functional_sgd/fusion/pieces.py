"""Pieces of leaves that are cut over processes, lying in memory as kernels want them."""

import itertools

import torch
from torch import Tensor

from functional_sgd.call import Leaves
from functional_sgd.fusion.column import laid_out
from functional_sgd.sharded import distributed


def lay_out(leaves: Leaves) -> list[tuple[Tensor, Tensor]]:
    """Copy the pieces that kernels could not treat as they lie: (copy, original) of each.

    Whether a kernel treats a leaf must not depend on how its piece lies on one process, or
    processes would not come to the same collectives.
    """
    shards = leaves.shards
    columns = [leaves.params, *leaves.slots.values()]
    if shards is None or all(map(Tensor.is_contiguous, itertools.chain(*columns))):
        return []
    copies = []
    for index, cut in enumerate(shards.cut):
        if not cut:
            continue
        # Params come first, so that slots are laid out like the copy of their param.
        for own in columns:
            piece, param = own[index], leaves.params[index]
            if own is leaves.params:
                dense = torch.ops.aten.is_non_overlapping_and_dense(piece)
                own[index] = piece if dense else piece.contiguous()
            elif not distributed(piece) and piece.shape == param.shape:
                (own[index],) = laid_out([piece], [param])
            if own[index] is not piece:
                copies.append((own[index], piece))
    return copies
