"""Leaves of one kind (device, dtypes, layout), which one kernel treats together."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_sgd.blocks import count_of
from functional_sgd.call import Leaves
from functional_sgd.fusion.kernel import SUPPORTED_DTYPES
from functional_sgd.precision import computed_in


class Needs(NamedTuple):
    """What the kernels of a program need of a leaf."""

    columns: tuple[str, ...]  # slots and given columns that they touch, besides param and grad
    order: bool  # whether the order of elements in memory must be the logical one
    writes: bool  # whether slots are overwritten where they are
    blocks: Mapping[str, str] = {}  # slots that are codes -> those with the scales of their blocks

    @property
    def in_blocks(self) -> frozenset[str]:
        """The slots of codes and of scales."""
        return frozenset((*self.blocks, *self.blocks.values()))


class Signature(NamedTuple):
    """What decides how a leaf is treated."""

    active: bool  # it has a gradient
    plain: bool  # a kernel can treat it
    shape: torch.Size
    device: torch.device
    dtypes: tuple[torch.dtype, ...]  # of param, grad and the columns that kernels touch


def signatures(leaves: Leaves, needs: Needs) -> tuple[Signature, ...]:
    """The signature of every leaf."""
    known: dict[str, Sequence[Any]] = {**leaves.given, **leaves.slots}
    columns = [known[name] for name in needs.columns]
    # 8-bit slots have dtypes and shapes of their own, which `_encoded` checks.
    usual = needs.columns
    if needs.blocks:
        in_blocks = needs.in_blocks
        usual = tuple(name for name in usual if name not in in_blocks)
    n_slots = sum(name in leaves.slots for name in usual)  # which come first
    found = []
    for param, grad, *own in zip(leaves.params, leaves.grads, *columns, strict=True):
        found.append(_signature(param, grad, own, needs, n_slots))
    if needs.order and leaves.shards is not None and leaves.shards.any_cut:
        # Random numbers belong to the places in the whole leaf, which kernels do not know.
        for index, cut in enumerate(leaves.shards.cut):
            if cut:
                found[index] = found[index]._replace(plain=False)
    return tuple(found)


def _signature(
    param: Tensor, grad: Tensor | None, own: Sequence[Tensor], needs: Needs, n_slots: int
) -> Signature:
    if grad is None:
        return _known(False, False, param.shape, param.device, ())
    columns = (param, grad, *own)
    dtypes = tuple([value.dtype for value in columns])
    in_blocks = {}
    if needs.blocks:
        in_blocks = dict(zip(needs.columns, own, strict=True))
        own = [in_blocks.pop(name) for name in needs.columns if name not in needs.in_blocks]
        columns = (param, grad, *own)
    kinds = tuple([(type(value), value.device, value.layout, value.dtype) for value in columns])
    # A tensor with the negative bit (of x.imag after conj) has other numbers in memory than it
    # shows.
    plain = _ordinary(kinds, n_slots) and not any(map(Tensor.is_neg, columns)) and _dense(param)
    # Strides of other columns are free: kernels get copies that are laid out like the param.
    plain = plain and all(value.shape == param.shape for value in own)
    # Kernels see elements in memory order; random numbers and blocks follow logical order.
    if needs.order:
        plain = plain and param.is_contiguous()
    if needs.writes:  # a slot that lies otherwise than its param would be written in a copy of it
        plain = plain and all(_alike(value, param) for value in own)
    for codes, scales in needs.blocks.items():
        plain = plain and _encoded(param, in_blocks[codes], in_blocks[scales])
    return _known(True, plain, param.shape, param.device, dtypes)


def _encoded(param: Tensor, codes: Tensor, scales: Tensor) -> bool:
    """Whether kernels know these slots of 8 bits."""
    kinds = (type(codes), type(scales), codes.dtype, scales.dtype)
    if kinds != (Tensor, Tensor, torch.uint8, torch.float32):
        return False
    if codes.device != param.device or scales.device != param.device:
        return False
    if codes.shape != param.shape or scales.shape != (count_of(param.numel()),):
        return False
    return codes.is_contiguous() and scales.is_contiguous()


def _dense(tensor: Tensor) -> bool:
    """Whether its elements fill its memory, in whatever order."""
    # Contiguous tensors are dense too, and asking for that takes a tenth of the time.
    return tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether the elements of both are in the same order in memory."""
    # Contiguous tensors may still differ in the strides of axes of length 1.
    return one.stride() == other.stride() or (one.is_contiguous() and other.is_contiguous())


_known = functools.lru_cache(maxsize=4096)(Signature)
"""Equal signatures are one: thousands of new objects would wake the garbage collector, which takes
longer than this.
"""


@functools.lru_cache(maxsize=256)
def _ordinary(
    kinds: tuple[tuple[type, torch.device, torch.layout, torch.dtype], ...], n_slots: int
) -> bool:
    """Whether kernels know such tensors, and they are all on one device.

    Rules see a slot in its own dtype, and kernels in that of the arithmetic; so they must be one,
    but for half precision, which is float32 to both. Other columns come in that of the arithmetic.
    """
    _, place, _, param = kinds[0]
    for kind, device, layout, dtype in kinds:
        # Exact types: a subclass may give its memory another meaning.
        if kind not in (Tensor, torch.nn.Parameter) or device != place:
            return False
        if layout is not torch.strided or dtype not in SUPPORTED_DTYPES:
            return False
    slots = kinds[2 : 2 + n_slots]  # after the param and its gradient
    return all(computed_in(dtype) == computed_in(param) for _, _, _, dtype in slots)


class Group:
    """Some leaves of one kind, by their numbers."""

    def __init__(
        self,
        indices: Sequence[int],
        shapes: Sequence[torch.Size],
        device: torch.device,
        dtypes: dict[str, torch.dtype],
        everything: bool,
    ) -> None:
        self.indices = list(indices)
        self.sizes = [shape.numel() for shape in shapes]
        self.device, self.dtypes = device, dtypes
        # Half precision is for keeping numbers: sums of small changes would be lost in it.
        self.working = computed_in(dtypes["param"])
        self.narrow: list[str] = []  # columns
        for name, dtype in dtypes.items():
            if dtype.itemsize < self.working.itemsize:
                self.narrow.append(name)
        self.everything = everything  # whether these are all leaves, in order
        self.alike: frozenset[str] = frozenset()  # of recognised trees: what lies as params do
        self.prepared: dict[
            object, Any
        ] = {}  # what backends keep for it: how it is cut into chunks

    @staticmethod
    def split(
        found: Sequence[Signature], names: Sequence[str], leaves: Leaves
    ) -> tuple[list["Group"], list[int]]:
        """(the groups of all leaves that kernels can treat, the other leaves with a gradient).

        Groups on a GPU come first: their kernels run while the CPU goes on.
        """
        kinds: dict[tuple[torch.device, tuple[torch.dtype, ...]], list[int]] = {}
        others = []
        for index, one in enumerate(found):
            if one.active and one.plain:
                kinds.setdefault((one.device, one.dtypes), []).append(index)
            elif one.active:
                others.append(index)
        groups = []
        for (device, dtypes), indices in sorted(kinds.items(), key=lambda k: k[0][0].type == "cpu"):
            shapes = [found[index].shape for index in indices]
            named = dict(zip(("param", "grad", *names), dtypes, strict=True))
            whole = len(indices) == len(found)
            groups.append(Group(indices, shapes, device, named, whole))
        return groups, others

    def find_alike(self, columns: Mapping[str, Sequence[Tensor]], params: Sequence[Tensor]) -> None:
        """Note which columns have their elements in the order of the params."""
        alike = set()
        for name, values in columns.items():
            pairs = zip(self.pick(list(values)), self.pick(list(params)), strict=True)
            if all(_alike(value, param) for value, param in pairs):
                alike.add(name)
        self.alike = frozenset(alike)

    def on_device(self, name: str, device: torch.device) -> Tensor:
        """Its `indices` or `sizes` as a tensor: sent once, since the host waits for that."""
        if (name, device) not in self.prepared:
            self.prepared[name, device] = torch.tensor(getattr(self, name), device=device)
        known: Tensor = self.prepared[name, device]
        return known

    def pick(self, values: list[Any]) -> list[Any]:
        """The group's part of a list over all leaves; the list itself, if that is everything."""
        return values if self.everything else [values[index] for index in self.indices]
