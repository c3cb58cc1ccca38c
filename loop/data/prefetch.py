"""Let the next batch travel to the device while the present one is at work."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from functional_sgd.tree import Tree
from loop.data.samples import map_tensors

Item = TypeVar("Item")
Sent = TypeVar("Sent")
Received = TypeVar("Received")


class Prefetch:
    """A loader whose batches are on a device already: each is copied there while the one before it
    is at work.

    On CUDA the copies come from pinned memory and run on a stream of their own; elsewhere the
    loader's batches pass unchanged. One batch is read ahead, so a loader without `set_position`
    draws random numbers one batch earlier. All other attributes (`set_position`, `dataset`, ...)
    and the length are the loader's.

    >>> [batch.tolist() for batch in Prefetch([torch.tensor([1]), torch.tensor([2])], "cpu")]
    [[1], [2]]
    """

    def __init__(self, loader: Iterable[Tree], device: torch.device | str) -> None:
        self.loader, self.device = loader, torch.device(device)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # a TypeError, if it has none, is right

    def __getattr__(self, name: str) -> Any:
        # copy and pickle ask for special methods before there is a `loader`, and looking that up
        # here would never end.
        if name.startswith("__") or name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Tree]:
        if self.device.type != "cuda":
            return iter(self.loader)
        copies = _Copies(self.device)
        return one_ahead(iter(self.loader), copies.send, copies.receive)


def one_ahead(
    items: Iterator[Item], send: Callable[[Item], Sent], receive: Callable[[Sent], Received]
) -> Iterator[Received]:
    """receive(send(item)) of every item; each is sent before the one in front of it is received.

    >>> list(one_ahead(iter("ab"), lambda item: print("send", item) or item, str.upper))
    send a
    send b
    ['A', 'B']
    """
    # The inner loop uses up the iterator, so this one runs at most once.
    for first in items:
        under_way = send(first)
        for item in items:
            arrived, under_way = under_way, send(item)
            yield receive(arrived)
        yield receive(under_way)


class _Copies:
    """Copies to one CUDA device, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        # torch.device("cuda") does not equal "cuda:0", the device of a tensor.
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def send(self, batch: Tree) -> tuple[Tree, torch.cuda.Event]:
        """Begin to copy; the event says when it is done."""
        with torch.cuda.stream(self.stream):
            copied = map_tensors(self._send, batch)
            return copied, self.stream.record_event()

    def receive(self, sent: tuple[Tree, torch.cuda.Event]) -> Tree:
        """The copies, for the present stream, which waits for them; the caller does not."""
        copied, done = sent
        present = torch.cuda.current_stream(self.device)
        present.wait_event(done)

        def arrived(leaf: Tensor) -> Tensor:
            if leaf.is_cuda:
                # Or its memory could be used again before this stream has read it.
                leaf.record_stream(present)
            return leaf

        return map_tensors(arrived, copied)

    def _send(self, leaf: Tensor) -> Tensor:
        if leaf.device == self.device:
            return leaf
        if leaf.device.type == "cpu" and not leaf.is_pinned():
            # torch keeps the pinned memory until the copy is done, so nothing here has to hold it.
            leaf = leaf.pin_memory()
        return leaf.to(self.device, non_blocking=True)
