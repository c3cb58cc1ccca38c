"""What a callback hands back: the state that it wants next, changed only where it may be."""

from collections.abc import Mapping
from operator import attrgetter

import optree
from torch import Tensor

from functional_sgd.tree import Tree
from loop.run.stages import learner_of
from loop.state import BACK, COUNTERS, PLACE, State

_OWNED = ("event", *PLACE, *COUNTERS)
_owned = attrgetter(*_OWNED)


def accepted(said: str, result: State, state: State) -> State:
    """The state that a callback wants next, at the place where the run is.

    `said` begins an error: "callback 'spy' returned from after_loss". Raises ValueError, naming the
    field, if it has changed what only the machine
    may change, or if a tree has other names, shapes or dtypes than before.
    """
    # Most states pass here, so the usual case is two comparisons.
    lent = result.resources is state.resources and result.learner is not None
    if not lent or _owned(result) != _owned(state):
        result = _at_this_place(said, result, state)
    _check_trees(said, result, state)
    return result


def _at_this_place(said: str, result: State, state: State) -> State:
    """The result, if all that differs is what `State.back_to` may have put back."""
    went_back = result.event == BACK
    fixed = PLACE if went_back else _OWNED
    for name in fixed:
        if getattr(result, name) != getattr(state, name):
            raise _written(said, name, result, state)
    if result.learner is None or result.resources is not state.resources:
        lent = "learner" if result.learner is None else "resources"
        raise ValueError(
            f"{said} a state whose {lent} is not the run's: "
            f"only brackets (around_fit, ...) open resources, and a run always has a learner. "
            f"Return state.replace(...) of other fields; to go back to an older state, return "
            f"state.back_to(older)."
        )
    return result.replace(event=state.event) if went_back else result


def _written(said: str, name: str, result: State, state: State) -> ValueError:
    return ValueError(
        f"{said} a state whose {name} is "
        f"{getattr(result, name)!r}, where the run has {getattr(state, name)!r}: {name} is changed "
        f"by the machine only. Return state.replace(...) of other fields; to go back to an older "
        f"state, return state.back_to(older)."
    )


def _check_trees(said: str, result: State, state: State) -> None:
    """Look at the trees that were replaced: names, shapes and dtypes, and no values."""
    for field in ("params", "buffers"):
        new, old = getattr(result, field), getattr(state, field)
        if new is not old:
            _check_names(said, field, new, old)
            for name, value in new.items():
                if value is not old[name]:
                    _check_leaf(said, f"{field}[{name!r}]", value, old[name])
    if result.grads is not state.grads and result.grads is not None:
        _check_names(said, "grads", result.grads, result.params)
        for name, grad in result.grads.items():
            # Gradients may be of another dtype: sums of half-precision ones are float32.
            if grad is not None:
                _check_leaf(said, f"grads[{name!r}]", grad, result.params[name], ("shape",))
    if result.opt_state is not state.opt_state and _same_optimizer(result, state):
        _check_opt_state(said, result.opt_state, state.opt_state)


def _same_optimizer(result: State, state: State) -> bool:
    """Whether the state of the optimizer must be built as it was."""
    return learner_of(result).opt is learner_of(state).opt


def _check_names(said: str, field: str, new: object, old: Mapping[str, object]) -> None:
    if not isinstance(new, Mapping):
        raise TypeError(
            f"{said} a state whose {field} is of type "
            f"{type(new).__name__}. Return a dict with the names of the params."
        )
    if new.keys() != old.keys():
        strange, missing = sorted(new.keys() - old.keys()), sorted(old.keys() - new.keys())
        differs = f"a strange {strange[0]!r}" if strange else f"no {missing[0]!r}"
        raise ValueError(
            f"{said} a state whose {field} has {differs}. Keep every name, and add none."
        )


def _check_leaf(
    said: str,
    leaf: str,
    new: object,
    old: object,
    kinds: tuple[str, ...] = ("shape", "dtype", "device"),
) -> None:
    """Raise unless both are tensors alike, or neither is a tensor."""
    if not isinstance(old, Tensor):
        return
    if not isinstance(new, Tensor):
        raise TypeError(
            f"{said} a state whose {leaf} is of type {type(new).__name__}. Return a tensor."
        )
    for kind in kinds:
        found, expected = getattr(new, kind), getattr(old, kind)
        if found != expected:
            if kind == "shape":
                found, expected = tuple(found), tuple(expected)
            raise ValueError(
                f"{said} a state whose {leaf} has {kind} {found}, "
                f"where the run has {expected}. Convert it before you return it."
            )


def _check_opt_state(said: str, new: Tree, old: Tree) -> None:
    paths, leaves, spec = optree.tree_flatten_with_path(new, none_is_leaf=True)
    expected, known = optree.tree_flatten(old, none_is_leaf=True)
    if spec != known:
        raise ValueError(
            f"{said} a state whose opt_state is built otherwise "
            f"than the optimizer's. Start with learner.opt.init(params), and keep its structure."
        )
    for path, leaf, one in zip(paths, leaves, expected, strict=True):
        if leaf is not one:
            keys = "".join(f"[{key!r}]" for key in path)
            _check_leaf(said, f"opt_state{keys}", leaf, one)
