"""A model while a run has it: no other thread has it, and its modes are put back."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn


class LentModels:
    """The models that callbacks have put in place of a run's own, and the training flags that each
    of their layers is to have again.
    """

    def __init__(self) -> None:
        self.flags: dict[nn.Module, list[tuple[nn.Module, bool]]] = {}

    def note(self, model: nn.Module) -> None:
        """Before the run sets its mode."""
        if model not in self.flags:
            self.flags[model] = [(layer, layer.training) for layer in model.modules()]

    def put_back(self, but: nn.Module | None = None) -> None:
        """All but one, which is still in place."""
        for model in [one for one in self.flags if one is not but]:
            for layer, training in self.flags.pop(model):
                layer.training = training


_RUNNING: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()
_LOCK = threading.Lock()


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """While this is open, no other thread may run these layers; this one may, once more. Then every
    layer gets its training flag back.

    Raises RuntimeError if another thread is running one of them.
    """
    thread, layers = threading.get_ident(), list(model.modules())
    with _LOCK:
        # Layer by layer, since two models may share some.
        for layer in layers:
            if any(other != thread for other in _RUNNING.get(layer, ())):
                raise RuntimeError(
                    f"Learner: another thread is running its {type(model).__name__}, and a model "
                    f"can have the tensors of one run only. Give each thread a learner of its own: "
                    f"dataclasses.replace(learner, model=copy.deepcopy(learner.model))."
                )
        # In a loop of its own: after an error, no layer counts as run by this thread.
        for layer in layers:
            _RUNNING.setdefault(layer, []).append(thread)
    flags = [layer.training for layer in layers]
    try:
        yield
    finally:
        for layer, training in zip(layers, flags, strict=True):
            layer.training = training
        with _LOCK:
            # A trace that nobody has closed may end with its model, whose layers are gone then.
            for layer in layers:
                if layer in _RUNNING:
                    _RUNNING[layer].remove(thread)
