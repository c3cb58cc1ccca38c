"""Leaves of one kind (device, dtypes, dense), which one kernel treats together."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sgd.call import Leaves
from functional_sgd.fusion.buffers import LARGE
from functional_sgd.fusion.device import Chunks
from functional_sgd.fusion.launch import Shape
from functional_sgd.fusion.source import SUPPORTED_DTYPES


class Signature(NamedTuple):
    """What decides how a leaf is treated."""

    active: bool  # it has a gradient
    plain: bool  # a kernel can treat it
    shape: torch.Size
    device: torch.device
    dtypes: tuple[torch.dtype, ...]  # of param, grad, slots


def signatures(leaves: Leaves) -> tuple[Signature, ...]:
    """The signature of every leaf."""
    return tuple(map(_signature, leaves.params, leaves.grads, *leaves.slots.values()))


def _signature(param: Tensor, grad: Tensor | None, *slots: Tensor) -> Signature:
    if grad is None:
        return _known(False, False, param.shape, param.device, ())
    shape, columns = param.shape, (param, grad, *slots)
    kinds = tuple([(type(value), value.device, value.layout, value.dtype) for value in columns])
    plain = _ordinary(kinds) and param.is_contiguous() and not any(map(Tensor.is_neg, columns))
    plain = plain and all(slot.shape == shape and slot.is_contiguous() for slot in slots)
    return _known(True, plain, shape, param.device, tuple([kind[3] for kind in kinds]))


_known = functools.lru_cache(maxsize=4096)(Signature)
"""Equal signatures are one: thousands of new objects would wake the garbage collector, which takes
longer than this.
"""


@functools.lru_cache(maxsize=256)
def _ordinary(kinds: tuple[tuple[type, torch.device, torch.layout, torch.dtype], ...]) -> bool:
    """Whether kernels know such tensors, and they are all on one device."""
    return all(
        issubclass(kind, (Tensor if kind is Tensor else torch.nn.Parameter))
        and device.type in ("cpu", "cuda")
        and device == kinds[0][1]
        and layout is torch.strided
        and dtype in SUPPORTED_DTYPES
        for kind, device, layout, dtype in kinds
    )


class Group:
    """Some leaves of one kind, by their numbers, and how they are cut into chunks."""

    def __init__(
        self,
        indices: Sequence[int],
        shapes: Sequence[torch.Size],
        device: torch.device,
        dtypes: dict[str, torch.dtype],
    ) -> None:
        self.indices = list(indices)
        self.shapes = list(shapes)
        self.device, self.dtypes = device, dtypes
        self.everything = False  # whether these are all leaves, in order
        self.large = any(shape.numel() >= LARGE for shape in shapes)
        self.dense_grads = (
            False  # whether the gradients of trees that are recognised are contiguous
        )

    @functools.cached_property
    def shape(self) -> Shape:
        """The chunks of a compiled kernel."""
        return Shape([shape.numel() for shape in self.shapes])

    @functools.cached_property
    def chunks(self) -> Chunks:
        """The chunks of a Triton kernel."""
        return Chunks([shape.numel() for shape in self.shapes])

    @staticmethod
    def split(signatures: Sequence[Signature], leaves: Leaves) -> list["Group"]:
        """The groups of all leaves that a kernel can treat; those of GPUs first, since their
        kernels take no time.
        """
        kinds: dict[tuple[torch.device, tuple[torch.dtype, ...]], list[int]] = {}
        for index, one in enumerate(signatures):
            if one.active and one.plain:
                kinds.setdefault((one.device, one.dtypes), []).append(index)
        names = ("param", "grad", *leaves.slots)
        groups = [
            Group(
                indices,
                [signatures[i].shape for i in indices],
                device,
                dict(zip(names, dtypes, strict=True)),
            )
            for (device, dtypes), indices in sorted(
                kinds.items(), key=lambda item: item[0][0].type == "cpu"
            )
        ]
        for group in groups:
            group.everything = len(group.indices) == len(signatures)
        return groups

    def pick(self, values: list[Any]) -> list[Any]:
        """The group's part of a list over all leaves; the list itself, if that is everything."""
        return values if self.everything else [values[index] for index in self.indices]


def dense(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, copied where they are not contiguous."""
    if all(map(Tensor.is_contiguous, tensors)):
        return tensors
    return [tensor.contiguous() for tensor in tensors]
