"""The state: everything about a run that changes, as one frozen value."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import optree
from torch import Tensor

from functional_sgd.errors import did_you_mean, elsewhere
from functional_sgd.notebook import html_facts
from functional_sgd.tree import Tree
from loop.history import History

if TYPE_CHECKING:
    from loop.learner import Learner

Tensors = dict[str, Tensor]


# eq=False: to compare dicts of tensors is an error in torch, so a state equals itself only.
@dataclass(frozen=True, eq=False, repr=False)
class State:
    """Everything about a run that changes. A state is a checkpoint, a fork and an undo: keep it and
    use it again.

    `state.replace(name=value)` gives the next one.
    """

    # Learned: what training is for. Changed by [predict] (buffers), [update], and callbacks.
    # Between [predict] and [gradients] of a training batch, params are tracked: a penalty on them,
    # added to the loss, has a gradient.
    params: Tensors
    buffers: Tensors
    opt_state: dict[str, Tree]
    hyper: Mapping[str, Tree]  # overrides the optimizer's defaults; schedules write here

    # Chance: all randomness is a function of this and of the counters below.
    seed: int = 0

    # Progress. Changed by the machine only: a callback that returns another value gets an error.
    epoch: int = 0  # the epoch of this run, from 0
    n_epoch: int = 0  # how many epochs this run has
    n_step: int | None = None  # how many training batches this run has, None if it counts epochs
    steps_per_epoch: int = 0  # how many of these an epoch has; the last may have fewer
    iter: int = 0  # the batch of this phase, from 0
    n_iter: int | None = None  # how many batches this phase has, None if the loader cannot tell
    train_iter: int = 0  # training batches since the state was made, over all runs
    epochs_seen: int = 0  # epochs since the state was made, over all runs
    position: tuple[int, int] = (0, 0)  # in the training data: passes done, and batches of the next
    pct_train: float = 0.0  # the share of this run's training that is done, 0 to 1
    training: bool = False  # True in the training phase
    event: str = ""  # the event being handled
    done: tuple[int, ...] = ()  # (epochs, parts of the epoch, batches): where to resume
    stopped: str = ""  # "SIGINT" or "SIGTERM" if that signal ended the last run early
    # What the run was begun with (hypers, optimizer, data, ...): compared when it goes on.
    begun_with: Mapping[str, Any] = field(default_factory=dict)

    # Said by callbacks in before_fit: the params that this run does not train.
    frozen: tuple[str, ...] = ()

    # Kept: what happened, and what callbacks remember (by their names).
    history: History = field(default_factory=History)
    memory: Mapping[str, Any] = field(default_factory=dict)

    # Transient: only while a batch is at work, None outside it.
    xb: tuple[Tree, ...] | None = None
    yb: tuple[Tree, ...] | None = None
    pred: Tree = None
    loss: Tensor | None = None
    grads: dict[str, Tensor | None] | None = None

    # Lent: only during a run. A learner replaced inside a scope is put back at its end; resources
    # are what the brackets of callbacks have opened, by name, and only brackets add to them.
    learner: "Learner | None" = None
    resources: Mapping[str, Any] = field(default_factory=dict)
    donated: bool = False  # whether the next step overwrites params and opt_state: see `keep`

    def replace(self, **changes: Any) -> "State":
        """The same state but for these fields. Raises TypeError for a name that is not a field.

        >>> State({}, {}, {}, {}).replace(epoch=3).epoch
        3
        """
        # Not dataclasses.replace, which passes every field to __init__: 3 microseconds instead of
        # 14, several times a batch.
        values = {**self.__dict__, **changes}
        if len(values) != len(_NAMES):
            unknown = next(name for name in changes if name not in _NAMES)
            raise TypeError(f"State has no field {unknown!r}. {did_you_mean(unknown, _NAMES)}")
        new: State = object.__new__(State)
        object.__setattr__(new, "__dict__", values)
        return new

    def remember(self, name: str, value: object) -> "State":
        """The state in which the callback of this name remembers this value.

        >>> State({}, {}, {}, {}).remember("counter", 1).memory
        {'counter': 1}
        """
        return self.replace(memory={**self.memory, name: value})

    def forget(self, name: str) -> "State":
        """The state in which the callback of this name remembers nothing.

        >>> State({}, {}, {}, {}, memory={"counter": 1}).forget("counter").memory
        {}
        """
        others = dict(self.memory)
        others.pop(name, None)
        return self.replace(memory=others)

    def back_to(self, earlier: "State") -> "State":
        """Undo: what `earlier` has learned, kept and counted, at the place where this run is now.

        For callbacks that want to go on from an older state: `return state.back_to(older)`. The
        older state itself is in another place of the run, or in none, so it cannot be returned.

        >>> now = State({}, {}, {}, {}, epoch=3, train_iter=30)
        >>> before = now.replace(epoch=1, train_iter=10)
        >>> now.back_to(before).epoch, now.back_to(before).train_iter
        (3, 10)
        """
        here = {name: getattr(self, name) for name in _OF_THIS_PLACE}
        return earlier.replace(**here, event=BACK)

    def keep(self) -> "State":
        """The state, to be kept beyond this event: itself, since states do not change; but where
        the run overwrites it (`fit(..., donate=True)`), with copies of params and opt_state.

        >>> state = State({"w": torch.ones(1)}, {}, {}, {})
        >>> donated = state.replace(donated=True)
        >>> state.keep() is state, donated.keep().params["w"] is donated.params["w"]
        (True, False)
        """
        if not self.donated:
            return self
        # Buffers are never overwritten: in training, a forward pass writes to copies of them.
        return self.replace(params=self.kept(self.params), opt_state=self.kept(self.opt_state))

    def kept(self, tensors: Tree) -> Tree:
        """Tensors of this state, to be kept beyond this event: copies where the run overwrites it.

        >>> state = State({"w": torch.ones(1)}, {}, {}, {})
        >>> state.kept(state.params) is state.params
        True
        """
        if not self.donated:
            return tensors
        return optree.tree_map(_copied, tensors)

    def without_batch(self) -> "State":
        """The state as it is between batches: no transient field, and params that nothing
        tracks.
        """
        params = self.params
        # A batch that ended before [gradients] leaves them tracked: what is computed of them next
        # would be recorded.
        if any(map(_TRACKED, params.values())):
            params = {name: value.detach() for name, value in params.items()}
        return self.replace(params=params, xb=None, yb=None, pred=None, loss=None, grads=None)

    def at_rest(self) -> "State":
        """The state as it is between runs."""
        return self.without_batch().replace(
            learner=None, resources={}, donated=False, event="", training=False
        )

    @property
    def x(self) -> Tree:
        """The input, if there is just one; else the tuple of inputs."""
        if self.xb is not None and len(self.xb) == 1:
            return self.xb[0]
        return self.xb

    @property
    def y(self) -> Tree:
        """The target, if there is just one; else the tuple of targets."""
        if self.yb is not None and len(self.yb) == 1:
            return self.yb[0]
        return self.yb

    # Hidden from type checkers, which would otherwise accept every misspelt name.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Called for a name that is not there: what is it called here?"""
            return elsewhere(self, name, _ELSEWHERE)

    def __repr__(self) -> str:
        size = sum(value.numel() for value in self.params.values())
        hyper = ", ".join(f"{name!r}: {_shown(value)}" for name, value in self.hyper.items())
        return (
            f"State(epoch {self.epoch} of {self.n_epoch}, train_iter {self.train_iter}, "
            f"seed {self.seed}, {len(self.params)} params of {size:,} elements, "
            f"hyper {{{hyper}}}, {len(self.history.rows)} rows of history)"
        )

    def _repr_html_(self) -> str:
        """How far it is trained, what it is made of, and the table of its history."""
        hypers = [f"{name}={_shown(value)}" for name, value in self.hyper.items()]
        facts = {
            "epochs": f"{self.epochs_seen:,}",
            "training batches": f"{self.train_iter:,}",
            "seed": f"{self.seed}",
            "params": _size(self.params),
            "buffers": _size(self.buffers),
            "optimizer": ", ".join(self.opt_state) or "-",
            "hypers": ", ".join(hypers) or "-",
            "memory": ", ".join(self.memory) or "-",
        }
        rows = self.history._repr_html_() if self.history.rows else ""
        return html_facts(facts, "State") + rows


_ELSEWHERE = {
    "learn": "the state itself: read state.pred; to write, return state.replace(pred=...)",
    "model": "state.learner.model",
    "opt": "state.learner.opt",
    "optimizer": "state.learner.opt",
    "lr": "state.hyper['lr']",
    "dls": "state.learner.data",
    "inputs": "state.xb",
    "targets": "state.yb",
    "losses": "state.history.losses",
    "hypers": "state.history.hypers",
    "rows": "state.history.rows",
    "smooth_loss": "state.history.smooth_losses()",
    "recorder": "state.history",
    "n_epochs": "state.n_epoch",
    "global_step": "state.train_iter",
    "current_epoch": "state.epoch",
    "state_dict": "learner.load(state).state_dict()",
}
"""What a state has, under names that others have for it."""


def _copied(leaf: object) -> object:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _size(tensors: Tensors) -> str:
    """How many tensors these are, and how many elements they have."""
    if not tensors:
        return "-"
    return f"{len(tensors)} tensors, {sum(value.numel() for value in tensors.values()):,} elements"


def _shown(hyper: Tree) -> str:
    """A hyper for a line of text: of a tree, how many values it has, and between what they are."""
    leaves = optree.tree_leaves(hyper)
    if isinstance(hyper, Tensor):
        with suppress(RuntimeError):  # within a transform, or of more elements, it has no one value
            return f"{hyper.item():g}"
        return f"tensor of shape {tuple(hyper.shape)}"
    if optree.tree_is_leaf(hyper):
        return repr(hyper)
    if not leaves or not all(isinstance(leaf, (int, float)) for leaf in leaves):
        return f"{len(leaves)} values"
    return f"{len(leaves)} values from {min(leaves):g} to {max(leaves):g}"


BACK = "back_to"
"""The event of a state that `back_to` made; only such a state may have other counters."""

COUNTERS = ("train_iter", "epochs_seen")
"""What the machine counts over the life of a state."""

PLACE = (
    *("epoch", "n_epoch", "n_step", "steps_per_epoch", "iter", "n_iter", "position", "pct_train"),
    *("training", "done", "stopped", "donated"),
)
"""Where a run is."""

# The batch is among these: an older state has none, and a callback may go back within a batch.
_OF_THIS_PLACE = (
    *PLACE,
    *("frozen", "learner", "resources"),
    *("xb", "yb", "pred", "loss", "grads"),
)
_TRACKED = attrgetter("requires_grad")
_NAMES = frozenset(entry.name for entry in fields(State))
