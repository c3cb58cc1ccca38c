"""The columns of a group: their tensors, and where they lie."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sgd.fusion.group import Group
from functional_sgd.memory import Addresses, addresses_of


class Column:
    """The tensors of a group's leaves under one name.

    A kernel sees memory, not tensors: `addresses` are good for as long as the column lives, since
    it holds the tensors that they belong to. Whoever launches a kernel holds its columns until
    then.
    """

    __slots__ = ("_addresses", "_like", "dtype", "kept", "tensors", "writable")

    def __init__(
        self,
        dtype: torch.dtype,
        tensors: list[Tensor],
        writable: bool = False,
        kept: bool = True,
        like: Sequence[Tensor] | None = None,
        addresses: Addresses | None = None,
    ) -> None:
        self.dtype, self.tensors = dtype, tensors
        self.writable = writable  # whether it may be overwritten
        self.kept = kept  # whether it has the shapes and dtype in which results are handed back
        self._like = like  # if its tensors may lie otherwise than these do in memory
        self._addresses = addresses  # if they are known

    @property
    def addresses(self) -> Addresses:
        """Where each tensor begins; its elements follow one another as those of its param do."""
        # Lazy: backends that work on tensors never ask, and are spared the copies.
        if self._addresses is None:
            if self._like is not None:
                self.tensors = laid_out(self.tensors, self._like)
                self._like = None
            self._addresses = addresses_of(self.tensors)
        return self._addresses


class Table(NamedTuple):
    """A group, and what its leaves have under each name as the program goes on."""

    number: int  # of the group, in this call
    group: Group
    columns: dict[str, Column]


def laid_out(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, copied where their elements are in another order in memory."""
    found = []
    for tensor, other in zip(tensors, like, strict=True):
        if tensor.stride() == other.stride() or tensor.numel() <= 1:
            found.append(tensor)
        elif tensor.is_contiguous() and other.is_contiguous():
            found.append(tensor)  # strides of axes of length 1 do not matter
        else:
            copy = torch.empty_strided(
                other.shape, other.stride(), dtype=tensor.dtype, device=tensor.device
            )
            found.append(copy.copy_(tensor))
    return found
