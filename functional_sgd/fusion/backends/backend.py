"""What a backend is: who compiles a pass, and runs it on the leaves of a group."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from functional_sgd.fusion.buffers import Pool
from functional_sgd.fusion.column import Column
from functional_sgd.fusion.group import Group
from functional_sgd.fusion.kernel import Dtypes
from functional_sgd.fusion.passes import Pass
from functional_sgd.fusion.scalars import Scalars

Totals: TypeAlias = Tensor
"""What a pass has reduced columns to: float64, a row for each leaf, a column for each take."""

Runner: TypeAlias = Callable[[Group, Sequence[Column], Sequence[Column], Scalars], Totals | None]
"""Runs a compiled pass: (group, columns read, columns written, scalars) -> totals, if it takes any.

The columns written have been allocated; some may be among those read. It may return before the
device is done: whoever looks at the results waits.
"""


class Unavailable(RuntimeError):
    """A backend cannot work here; the message says why."""

    def __init__(
        self, message: str, backend: "Backend", cure: str, retry_at: float = math.inf
    ) -> None:
        super().__init__(message)
        self.backend, self.cure = backend, cure
        self.retry_at = retry_at  # when another try is worth its time, a time.monotonic


class Backend(ABC):
    """Compiles passes for the devices that it treats, and runs them. It keeps no results."""

    name: str = "backend"

    @abstractmethod
    def treats(self, device: torch.device) -> bool:
        """Whether it works for leaves on this device."""

    def probe(self) -> None:  # noqa: B027, by default nothing is known
        """Raise Unavailable if it is known already that it cannot work here."""

    @abstractmethod
    def compile(self, work: Pass, dtypes: Dtypes, scalars: Scalars, group: Group) -> Runner:
        """The pass for columns of these dtypes. Raises Unavailable if it cannot be compiled.

        The same runner is used for every group and every call with the same dtypes, and scalars of
        the same `kinds`.
        """

    def kinds(self, work: Pass, scalars: Scalars, group: Group) -> object:
        """What about the scalars of a call decides which code is compiled; nothing by default."""
        return None

    def allocate(
        self, pool: Pool, name: str, like: Sequence[Tensor], dtype: torch.dtype
    ) -> list[Tensor]:
        """Tensors laid out like these, to write into; what is in them is left over."""
        return [torch.empty_like(one, dtype=dtype) for one in like]

    def source(self, work: Pass, dtypes: Dtypes) -> str:
        """The text of the kernel, for people."""
        return f"# {self.name}: {work.title}\n"


def treating(backends: Sequence[Backend], device: torch.device) -> Backend:
    """The first that works for leaves on a device. Raises RuntimeError if none does."""
    for one in backends:
        if one.treats(device):
            return one
    names = ", ".join(one.name for one in backends) or "none is left"
    raise RuntimeError(
        f"fuse: no backend works for leaves on {device} ({names}). End backends=[...] with "
        f"ForeachBackend(), which treats every device."
    )
