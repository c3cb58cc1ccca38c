"""Train a model that knows something already: its head first, then all of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from functional_sgd import seeded
from loop.callbacks.freezing import Freeze
from loop.layer_groups import Groups, exactly, layer_groups, matching, spread
from loop.learner import Learner
from loop.state import State
from loop.training.fit import fit_one_cycle
from loop.training.length import length_asked
from loop.training.resume import latest

MEMORY = "fine_tune"
"""Where a state within a fine_tune keeps which half it is in: "head" or "all"."""

_NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm)


def fine_tune(
    learner: Learner,
    state: State,
    epochs: int | None = None,
    lr: float = 2e-3,
    frozen_epochs: int = 1,
    lr_mult: float = 100.0,
    pct_start: float = 0.3,
    div: float = 5.0,
    head: str | None = None,
    train_norms: bool = True,
    callbacks: Sequence[object] = (),
    resume: bool | str | Path = False,
    steps: int | None = None,
    frozen_steps: int | None = None,
    **options: Any,
) -> State:
    """Train the head for `frozen_epochs`, then everything for `epochs`, both with one cycle of lr;
    or for `frozen_steps` and `steps`, in training batches.

    The groups are the model's children in their order (`layer_groups`), and the head is the last,
    or what the pattern `head` matches ("fc.*"). While the rest is frozen the maximum is lr (warm-up
    over 99 % of the way). Then it is from lr / 2 / lr_mult in the first group to lr / 2 in the
    head, by equal factors (warm-up over `pct_start`, from 1 / div of the maximum). `train_norms`
    lets normalisation layers (batch, instance, layer) learn even in frozen groups, at lr / 10, as
    their statistics change. The other arguments are those of `fit_one_cycle`.

    Each half begins with a fresh optimizer state, as in fastai. If Ctrl-C or SIGTERM ends the first
    half, the second does not begin (see `fit`); `resume` goes on in the half at hand. Both halves
    are in the history, one after the other.

    Raises ValueError if the model has one group only, `head` matches nothing or everything, or the
    state to resume is not within a fine_tune. Source: fastai's fine_tune, with its defaults.

    >>> from functional_sgd import adamw
    >>> from loop import DataLoaders
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> data = DataLoaders([(x, 3 * x + 1)] * 4)
    >>> learner = Learner(model, data, torch.nn.functional.mse_loss, adamw())
    >>> state = fine_tune(learner, learner.init(), epochs=2, lr=0.01)
    >>> [round(lr["2.bias"], 5) for lr in state.history.hypers["lr"]][::2]
    [0.0004, 0.00528, 0.001, 0.00473, 0.00406, 0.00142]
    """
    # Before the first half, which would be lost by an error in the second.
    length_asked(learner.data.train, epochs, steps, options.get("steps_per_epoch"))
    groups = with_head(_params(learner, state), head)
    norms = norm_names(learner.model) if train_norms else ()
    frozen: list[str] = []
    for group in groups[:-1]:
        frozen += [name for name in group if name not in norms]
    whole = spread(state.params, lr / 2 / lr_mult, lr / 2, groups)
    state, resume = _resumed(state, resume)
    # A half that is resumed keeps its optimizer state; one that begins gets a fresh one.
    if state.memory.get(MEMORY) != "all":
        if not resume:
            state = _afresh(learner, state, "head")
        rates = dict.fromkeys(state.params, lr / 10) | dict.fromkeys(groups[-1], lr)
        first = [Freeze(exactly(frozen)), *callbacks] if frozen else callbacks
        # fit takes epochs or steps, not both.
        first_epochs = frozen_epochs if frozen_steps is None else None
        state = fit_one_cycle(
            learner,
            state,
            first_epochs,
            rates,
            pct_start=0.99,
            callbacks=first,
            resume=resume,
            steps=frozen_steps,
            **options,
        )
        if state.stopped:
            return state
        resume = False
    if not resume:
        state = _afresh(learner, state, "all")
    state = fit_one_cycle(
        learner,
        state,
        epochs,
        whole,
        pct_start=pct_start,
        div=div,
        callbacks=callbacks,
        resume=resume,
        steps=steps,
        **options,
    )
    return state if state.stopped else state.forget(MEMORY)


def with_head(params: Mapping[str, Tensor], head: str | None = None) -> Groups:
    """The groups of `layer_groups(params)`, or these without what the pattern matches, and that as
    the last one.

    Raises ValueError if there is one group only, or the pattern matches nothing or everything.

    >>> with_head(dict.fromkeys(["head.weight", "body.weight", "body.bias"], 0), "head.*")
    [['body.weight', 'body.bias'], ['head.weight']]
    """
    # Without a pattern nothing is chosen, and the last group is the head.
    patterns = () if head is None else (head,)
    chosen = matching("fine_tune", params, patterns)
    groups: list[list[str]] = []
    for group in layer_groups(params):
        rest = [name for name in group if name not in chosen]
        if rest:
            groups.append(rest)
    last = [name for name in params if name in chosen]
    if last:
        groups.append(last)
    if len(groups) < 2:
        raise ValueError(
            f"fine_tune: nothing is left to freeze: all parameters are in the head, "
            f"{', '.join(params)}. "
            f"Say with head=... which are: a pattern such as 'fc.*'."
        )
    return groups


def norm_names(model: nn.Module) -> set[str]:
    """The names of the parameters of normalisation layers: batch, instance and layer.

    >>> sorted(norm_names(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))))
    ['1.bias', '1.weight']
    """
    prefixes = []
    for path, layer in model.named_modules():
        if path and isinstance(layer, _NORMS):
            prefixes.append(f"{path}.")
    starts = tuple(prefixes)
    return {name for name, _ in model.named_parameters() if name.startswith(starts)}


def _params(learner: Learner, state: State) -> dict[str, Tensor]:
    """The state's params in the order of the model."""
    params = {}
    for name, _ in learner.model.named_parameters():
        if name in state.params:
            params[name] = state.params[name]
    return params


def _resumed(state: State, resume: bool | str | Path) -> tuple[State, bool]:
    """The state to go on from, and whether it is within a run of `fit`."""
    found: State | None = None
    if resume is True:
        found = state
    elif resume is not False:
        found = latest(resume, state)
    if found is None:
        return state.forget(MEMORY), False
    if MEMORY not in found.memory:
        raise ValueError(
            "fine_tune: the state is not within a fine_tune, so there is nothing to resume. Leave "
            "resume out to begin."
        )
    # A run that was stopped before its first event is in no place to go on from, so it begins.
    return found, bool(found.done)


def _afresh(learner: Learner, state: State, half: str) -> State:
    """The state at the beginning of a half."""
    opt_state = seeded(learner.opt.init(state.params), state.seed)
    return state.replace(opt_state=opt_state).remember(MEMORY, half)
