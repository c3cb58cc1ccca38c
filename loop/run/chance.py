"""Randomness as a function of where the run is: (seed, epoch) for the data order, (seed,
train_iter) for a batch.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_MASK = 2**64 - 1


def key(*parts: int) -> int:
    """A 63-bit seed that depends on every part (splitmix64).

    >>> key(0, 1) == key(0, 1), key(0, 1) == key(1, 0)
    (True, False)
    """
    mixed = 0
    for part in parts:
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        mixed ^= mixed >> 31
    return mixed >> 1


def seed_torch(seed: int, device: torch.device) -> None:
    """Set torch's global generators, for the CPU and for this device (about 1 microsecond on the
    CPU).
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def seed_loader(loader: object, seed: int) -> None:
    """Let a loader's own generators, and its sampler's epoch, be a function of the seed too."""
    for owner in (loader, getattr(loader, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        set_epoch = getattr(owner, "set_epoch", None)  # of a DistributedSampler
        if set_epoch is not None:
            set_epoch(seed % 2**31)


@contextmanager
def global_generators_kept(device: torch.device) -> Iterator[None]:
    """Give torch's global generators back as they were.

    They belong to the whole process. So while other threads have runs too, nothing is given back:
    it would be taken from a batch of theirs. The last run of all gives back what the first found.
    Such runs draw from one stream, each seeding it again: what chance does in them can differ from
    time to time. So a run warns if one of another thread is open.
    """
    thread, found = threading.get_ident(), _states(device)
    with _LOCK:
        if not _RUNNING:
            _OUTSIDE.clear()
        # A device that no open run has used was in its outside state until now.
        for generator, state in found.items():
            _OUTSIDE.setdefault(generator, state)
        elsewhere = any(other != thread for other in _RUNNING)
        _RUNNING.append(thread)
    try:
        if elsewhere:
            warnings.warn(_SHARED, stacklevel=3)
        yield
    finally:
        with _LOCK:
            _RUNNING.remove(thread)
            if not _RUNNING:
                _restore(_OUTSIDE)
            elif set(_RUNNING) == {thread}:  # a run within a run
                _restore(found)


_SHARED = (
    "loop: a run begins while one of another thread is open. Both draw from torch's global "
    "generators, so dropout and whatever else is random within a batch may differ from time to "
    "time, in both of them. Run them one after the other, or in processes of their own. If nothing "
    "in them draws from these generators, the numbers are right: then ignore this warning."
)

_LOCK = threading.Lock()
_RUNNING: list[int] = []  # the thread of every run that is open
_OUTSIDE: dict[torch.device, Tensor] = {}  # the states of the generators before the first of them


def _states(device: torch.device) -> dict[torch.device, Tensor]:
    found = {torch.device("cpu"): torch.get_rng_state()}
    if device.type == "cuda":
        found[device] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        found[device] = torch.mps.get_rng_state()
    return found


def _restore(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        elif device.type == "mps":
            torch.mps.set_rng_state(state)
        else:
            torch.set_rng_state(state)
