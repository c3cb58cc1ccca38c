"""A module run on other tensors: they are put into the places of its own, and taken out again.

They can stay there until the gradient is taken, for some modules run code of theirs once more then:
activation checkpointing, backward hooks. Tensors that are given are never written to: the first
call works on copies and finds out which of them a forward pass writes to (an embedding with
max_norm, a running statistic); later calls copy only those.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from functional_sgd.places import Place, inside
from functional_sgd.tracing import recorded


class Placed:
    """A module with other tensors in the places of its own, until `put_back()`.

    `tensors` are those in place, by name; `changed`, after `call`, the names of those that it has
    written to or replaced.

    Tensors named in `spendable` may be written to, so no call works on copies of them. `originals`
    are what they are copies of, where they are: so a write through `.data`, which is not counted,
    is found by comparing.

    Raises RuntimeError if names are missing or unknown, or if another thread has put its tensors
    into one of these layers.
    """

    def __init__(
        self,
        module: nn.Module,
        given: Mapping[str, Tensor],
        spendable: Collection[str] = (),
        originals: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.module, self.given = module, given
        self.spendable, self.originals = spendable, originals
        self.thread = threading.get_ident()
        self.misled = False  # whether a graph of the same gradient has been made with others
        self.changed: set[str] = set()
        self.moved: set[str] = set()  # those whose `.data` a first call has replaced
        # Looking for others and joining the list must be one step to other threads.
        with _LOCK:
            self.places, self.found, self.training = inside(module, given)
            # Layers, not modules, are compared: two models may share one.
            below = [one for one in _ACTIVE if self.over(one)] if _ACTIVE else []
            if any(one.thread != self.thread for one in below):
                raise RuntimeError(
                    f"{type(module).__name__} is at work in another thread, which has put its own "
                    f"tensors into it. Give each thread a model of its own: copy.deepcopy(model)."
                )
            self.known = _WRITTEN.setdefault(module, {})
            self.copied = self._to_be_copied()
            self.tensors = dict(given)
            for name in self.copied:
                # clone() stays on the graph, so gradients reach the tensor that was given.
                self.tensors[name] = given[name].clone()
            self.begins = self._begins()
            self.shared = [given[name] for name in given if name not in self.copied]
            self.versions = _versions(self.shared)
            for store, key, name, _ in self.places:
                store[key] = self.tensors[name]
            # Only now that all are in place: what raises above leaves nothing to put back.
            _ACTIVE.append(self)

    def call(self, args: Sequence[object], kwargs: Mapping[str, object]) -> Any:
        """The module's output. Raises RuntimeError if it has written to a tensor that was given."""
        output = self.module(*args, **kwargs)
        first = self.training not in self.known
        written = self._written_shared()
        if written:
            # A first call may find out that spendable tensors are written to; a later one may not.
            allowed = {*self.spendable}
            if not first:
                allowed &= self.known[self.training]
            if not written <= allowed:
                self._refuse_late(written - allowed)
        # Inference mode does not count writes, so a call in it tells nothing.
        if first and not torch.is_inference_mode_enabled():
            self.known[self.training] = {*self._written(), *written, *self._written_in_secret()}
            # A first call works on copies. Only what it has written to counts as changed, so
            # `after` returns the rest as it was given.
            self.copied = self._to_be_copied()
        writes = self.known.get(self.training, set())
        self.changed = self.copied | writes.intersection(self.spendable)
        self.look()
        return output

    def look(self) -> set[str]:
        """The names of what the module has replaced since the last look, as it may its buffers."""
        replaced: set[str] = set()
        if any(one.over(self) for one in later_than(self)):
            return replaced  # what is in these places is theirs
        for store, key, name, _ in self.places:
            if store[key] is not self.tensors[name]:
                self.tensors[name] = store[key]
                replaced.add(name)
        self.changed = self.changed | replaced
        return replaced

    def after(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors as the call has left them: those that were given, where it has."""
        found = {}
        for name in names:
            tensors = self.tensors if name in self.changed else self.given
            found[name] = tensors[name].detach()
        return found

    def put_back(self) -> None:
        """Put back what was found, also if others have put tensors in since."""
        with _LOCK:
            above = [one for one in later_than(self) if one.over(self)]
            _ACTIVE.remove(self)
            if not above:
                for (store, key, _, _), value in zip(self.places, self.found, strict=True):
                    store[key] = value
                return
            # Tensors that others have put over these must stay until the others take them out.
            for place, value in zip(self.places, self.found, strict=True):
                over = next((one for one in above if one.index(place) is not None), None)
                if over is None:
                    place[0][place[1]] = value
                else:  # that one will put it back
                    over.found[over.index(place)] = value

    @cached_property
    def keys(self) -> dict[tuple[int, str], int]:
        """The number of each place, by what tells it from others."""
        return {(id(place[0]), place[1]): number for number, place in enumerate(self.places)}

    def over(self, other: "Placed") -> bool:
        """Whether both have put a tensor into one place."""
        return not self.keys.keys().isdisjoint(other.keys)

    def index(self, place: Place) -> Any:
        """Which of these places this is, None if it is none of them."""
        return self.keys.get((id(place[0]), place[1]))

    def _to_be_copied(self) -> set[str]:
        """The names of what a forward pass writes to; all, as long as that is not known."""
        known = self.known.get(self.training)
        if known is None or torch.is_inference_mode_enabled():  # which keeps no versions
            return {*self.given}.difference(self.spendable)
        # In training F.batch_norm writes to buffers, without raising their version, in every call.
        written = set(known)
        if self.training:
            for _, _, name, is_buffer in self.places:
                if is_buffer:
                    written.add(name)
        return written.difference(self.spendable)

    def _begins(self) -> dict[str, int]:
        """Where tensors begin in a first call: what is put into their `.data` lies elsewhere."""
        if self.training in self.known or recorded():
            return {}
        every = self.tensors.items()
        return {name: tensor.data_ptr() for name, tensor in every if _is_plain(tensor)}

    def _written(self) -> Iterator[str]:
        """The names of copies that a first call has written to."""
        for name in self.copied:
            # A fresh copy has version 0, so any other means a write.
            if self.tensors[name]._version:
                yield name

    def _written_in_secret(self) -> Iterator[str]:
        """What a first call has written to without being counted: through `.data`, or as
        F.batch_norm does.
        """
        for name, begin in self.begins.items():
            now, before = self.tensors[name], self.originals.get(name)
            if name in self.copied:
                before = self.given[name]
            if now.data_ptr() != begin:
                self.moved.add(name)
                yield name
            elif before is not None and not _same(now, before):
                yield name

    def _written_shared(self) -> set[str]:
        """The names of those given that the call has written to, which are no copies."""
        if self.versions == _versions(self.shared):
            return set()
        changed = set()
        for tensor, version in zip(self.shared, self.versions, strict=True):
            if tensor._version != version:
                changed.add(id(tensor))
        return {name for name in self.given if id(self.given[name]) in changed}

    def _refuse_late(self, written: set[str]) -> None:
        """Raise RuntimeError for writing to a tensor that is not a copy."""
        names = sorted(written)
        # The next call will then work on copies of these.
        self.known.setdefault(self.training, set()).update(names)
        raise RuntimeError(
            f"{type(self.module).__name__} has written to {names} in this forward pass, and not in "
            f"its first one, so the tensors that were given are changed. Load them again, and let "
            f"the layer write in every pass, or not in place (self.x = new)."
        )

    def misleads(self, below: "Placed") -> bool:
        """Whether a layer that runs once more in a backward pass could find the wrong tensors."""
        for place in self.places:
            number = below.index(place)
            if number is not None:
                mine, theirs = self.given[place[2]], below.given[below.places[number][2]]
                if mine is not theirs and (mine.requires_grad or theirs.requires_grad):
                    return True
        return False


@contextmanager
def holding() -> Iterator[list[Placed]]:
    """What `hold` is given in here stays in place until this closes; the list of it."""
    outer = getattr(_HERE, "held", None)
    held: list[Placed] = []
    _HERE.held = held
    try:
        yield held
    finally:
        _HERE.held = outer
        for placed in reversed(held):
            placed.put_back()


def hold(placed: Placed) -> bool:
    """Whether this stays in place for a gradient that will be taken; one of each module does.

    Those that are there for the same gradient, or for one of a run, learn that a graph has been
    made with other tensors.
    """
    # Without a graph there is no backward pass in which a layer could run again.
    if not torch.is_grad_enabled():
        return False
    held: list[Placed] | None = getattr(_HERE, "held", None)
    for one in _ACTIVE if held is None else held:
        if one is not placed and one.over(placed):
            one.misled = one.misled or placed.misleads(one)
    if held is None or any(one.module is placed.module for one in held):
        return False
    held.append(placed)
    return True


def made_ready(held: Sequence[Placed], again: bool = False) -> list[Callable[[], object]]:
    """Prepare for taking a gradient: the tensors are in place, and hooks on parameters are heard.
    What comes back are the functions that end it.

    A layer that is called once more would find the wrong tensors if a graph was made with others in
    the same places, or if it is to be called `again` when this has ended. Then that is an error.
    """
    undo: list[Callable[[], object]] = []
    try:
        for one in held:
            if any(other.over(one) for other in later_than(one)):
                # Other tensors lie over these by now, so they are put on top once more.
                undo.append(Placed(one.module, one.tensors).put_back)
            if one.misled or again:
                undo.append(_refuse_calls(one.module))
            if any(own._backward_hooks for own in one.found):
                undo.extend(_hooked(one))
    except BaseException:
        # A hook on all modules would stay.
        for function in reversed(undo):
            function()
        raise
    return undo


def _hooked(placed: Placed) -> Iterator[Callable[[], object]]:
    """Register the hooks of a module's parameters on the tensors in their places, once each."""
    seen: set[int] = set()
    for place, own in zip(placed.places, placed.found, strict=True):
        tensor = placed.given[place[2]]
        if own._backward_hooks and tensor.requires_grad and id(tensor) not in seen:
            seen.add(id(tensor))
            for hook in own._backward_hooks.values():
                handle: Any = tensor.register_hook(hook)  # type: ignore[no-untyped-call]
                yield handle.remove


def is_at_work(module: nn.Module) -> bool:
    """Whether others have put tensors into it, or into a layer that it shares."""
    stores: set[int] = set()
    for layer in module.modules():
        stores |= {id(layer._parameters), id(layer._buffers)}
    for one in [*_ACTIVE]:  # a copy, since other threads may be at work
        for store, _ in one.keys:
            if store in stores:
                return True
    return False


def later_than(placed: Placed) -> list["Placed"]:
    """Those put in place since then that are still there."""
    if _ACTIVE[-1] is placed:
        return []
    return _ACTIVE[_ACTIVE.index(placed) + 1 :]


_HERE = threading.local()
_LOCK = threading.Lock()
_ACTIVE: list[Placed] = []  # the latest last
_WRITTEN: WeakKeyDictionary[nn.Module, dict[bool, set[str]]] = WeakKeyDictionary()
"""What a forward pass of a module writes to in place, in training and not, once that is known."""


def try_out(
    module: nn.Module,
    given: Mapping[str, Tensor],
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> None:
    """Find out what the module writes to while make_fx is at work, which would write down copies
    of everything.
    """
    training = any(layer.training for layer in module.modules())
    if training in _WRITTEN.get(module, ()):
        return
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    # The random numbers of the trial must not be missing from the run.
    with disable_proxy_modes_tracing(), torch.no_grad(), torch.random.fork_rng():
        placed = Placed(module, given)
        try:
            placed.call(args, kwargs)
        finally:
            placed.put_back()


def written_by(module: nn.Module) -> Collection[str] | None:
    """What a forward pass in training writes to in place; None while that is not known."""
    return _WRITTEN.get(module, {}).get(True)


def look_again(module: nn.Module) -> None:
    """Let the next call find out again what the module writes to."""
    _WRITTEN.pop(module, None)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has memory of its own that can be looked at."""
    usual = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return usual and tensor.device.type != "meta"


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same numbers, NaN among them."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    nans = one.isnan()
    same = torch.equal(nans, other.isnan())
    return same and torch.equal(one.masked_fill(nans, 0), other.masked_fill(nans, 0))


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written to; nothing for those of torch.inference_mode, which does not
    count, and lets nobody write to them later.
    """
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return []


def _refuse_calls(module: nn.Module) -> Callable[[], None]:
    """Let calls of its layers be errors, until the function that comes back is called."""
    layers = {id(layer) for layer in module.modules()}

    def refuse(layer: nn.Module, args: object) -> None:
        if id(layer) in layers:
            raise RuntimeError(
                f"{type(module).__name__} runs its layers once more for the gradient (activation "
                f"checkpointing), but was called with different params for it, or the gradient is "
                f"to be differentiated again: its layers would find the wrong ones. Call a copy "
                f"of the module (copy.deepcopy) in one place, or leave the checkpointing out."
            )

    # For all modules, since checkpointing calls single layers again and not the module itself.
    return register_module_forward_pre_hook(refuse).remove
