"""Leave the rows of a leaf that have no gradient as they are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from functional_sgd.eight_bit import CODES, SCALES
from functional_sgd.hyper import Hyper
from functional_sgd.optimizer import Optimizer, check_names
from functional_sgd.state import State, check_state
from functional_sgd.tree import Tree, flatten, unflatten
from functional_sgd.wiring import CALLS
from functional_sgd.wrappers.wrapper import INNER, Wrapper, choose_leaf, dense, no_calls, take_grads

PROBES = {"vector": (7,), "wide": (7, 11), "tall": (11, 7), "block": (7, 11, 3)}
"""Shapes of leaves whose slots show by their shapes what they have an entry for."""

MOST = 3
"""Leaves with more axes than this have slots as those with so many."""


@dataclass(frozen=True, repr=False)
class LazyRows(Wrapper):
    """An optimizer that leaves rows without a gradient alone; `lazy_rows` makes one."""

    # The slots of each leaf -> for leaves of how many axes they have an entry for each row.
    by_row: Mapping[str, frozenset[int]] = field(init=False, repr=False, compare=False)

    name: ClassVar[str] = "lazy_rows"
    needs_old: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.opt.inner:
            raise TypeError(
                f"lazy_rows: expected a chain of rules, got {self.opt!r}, which keeps the state of "
                f"others. Put it outside: accumulate(lazy_rows(opt), every=4)."
            )
        object.__setattr__(self, "by_row", _slots_by_row(self.opt))

    def init(self, params: Tree) -> State:
        """A fresh state of the optimizer."""
        return {CALLS: no_calls(params), INNER: self.opt.init(params)}

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Hyper] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step of the rows that have a gradient: (new params, new state)."""
        check_state(self.name, state, (CALLS, INNER))
        hyper = check_names(self.name, hyper, extras, self.names)
        leaves, given, spec = take_grads(self.name, params, grads)
        touched: list[Tensor | None] = []
        whole: list[Tensor | None] = []
        for grad in given:
            if grad is None:
                touched.append(None)
                whole.append(None)
            else:
                touched.append(rows_with_gradient(grad))
                whole.append(dense(grad))
        old = state[INNER]
        moved, inner = self.opt(params, unflatten(spec, whole), old, hyper, **extras)
        kept = {}
        for name, entry in inner.items():
            if name not in self.by_row:
                kept[name] = entry
                continue
            rows: list[Tensor | None] = []
            for one, leaf in zip(touched, leaves, strict=True):
                if min(leaf.dim(), MOST) in self.by_row[name]:
                    rows.append(one)
                else:
                    rows.append(None)
            kept[name] = _by_row(rows, entry, old[name])
        return _by_row(touched, moved, params), {CALLS: state[CALLS] + 1, INNER: kept}

    def __repr__(self) -> str:
        return f"lazy_rows({self.opt!r})"


def lazy_rows(opt: Optimizer) -> LazyRows:
    """The optimizer, leaving rows without a gradient as they are, their slots included.

    A row is an entry of the first axis, such as the vector of a word: its momentum does not move
    it, and its averages do not fade, in steps that it has no part in. The number of steps belongs
    to the whole leaf. Of a dense gradient, rows that are not all zero count; of a sparse one those
    that it names, zero or not. Slots that have no entry for each row are kept as ever. `opt` is a
    chain of rules: partitions and other wrappers go outside. Only numbers are spared, not work: the
    step is taken for all rows, and then chosen from.

    Raises TypeError if `opt` is an optimizer around others, and ValueError if it overwrites its
    arguments, keeps slots in 8 bits, or has slots in which rows are mixed, as soap, shampoo, kron
    and dion do. Source: torch.optim.SparseAdam, for any chain.

    >>> import torch
    >>> from functional_sgd import momentum
    >>> opt, params = lazy_rows(momentum(lr=1.0, mom=0.5)), torch.tensor([[4.0], [4.0]])
    >>> params, state = opt(params, torch.tensor([[2.0], [2.0]]), opt.init(params))
    >>> params, state = opt(params, torch.tensor([[2.0], [0.0]]), state)
    >>> params, state["inner"]["grad_avg"]
    (tensor([[1.5000],
            [3.0000]]), tensor([[1.5000],
            [1.0000]]))
    """
    return LazyRows(opt)


def rows_with_gradient(grad: Tensor) -> Tensor:
    """Which rows have a gradient, along the first axis; of a sparse one, along its sparse axes.

    >>> rows_with_gradient(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    tensor([ True, False])
    """
    if grad.layout == torch.sparse_coo:
        axes = tuple(grad.shape[: grad.sparse_dim()])
        named = torch.zeros(axes, dtype=torch.bool, device=grad.device)
        places = tuple(grad.coalesce().indices().unbind())
        return named.index_put(places, named.new_ones(()))
    there = dense(grad) != 0
    return there.flatten(1).any(1) if there.dim() > 1 else there


def _slots_by_row(opt: Optimizer) -> dict[str, frozenset[int]]:
    """The slots of each leaf, and for leaves of how many axes they have an entry for each row.

    Raises ValueError for slots that cannot be chosen from row by row.
    """
    probes = {name: torch.zeros(shape, device="cpu") for name, shape in PROBES.items()}
    fresh = opt.init(probes)
    slots = {name: entry for name, entry in fresh.items() if not isinstance(entry, Tensor)}
    found = {}
    for name in sorted(slots):
        plain = name.removesuffix(CODES)
        if plain != name and plain + SCALES in slots:
            raise ValueError(
                f"lazy_rows: {plain!r} is kept in 8 bits, with a scale for each block; rows "
                f"of one block may be left alone while its scale changes. Leave out eight_bit."
            )
        follows = {}
        again = False
        axes = {0}  # a leaf without axes is a row
        for probe, shape in PROBES.items():
            own = slots[name][probe].shape
            follows[probe] = own[:1] == shape[:1]
            if follows[probe]:
                axes.add(len(shape))
            # As in a factor that has a row and a column for each row of the leaf.
            again = again or shape[0] in own[1:]
        # As in a factor of the shorter side: in one of these two leaves that is not the rows' side.
        follows_one_side = follows["wide"] != follows["tall"]
        if again or follows_one_side:
            raise ValueError(
                f"lazy_rows: expected rules that treat each row by itself, but {name!r} of {opt!r} "
                f"mixes rows. Give the leaves with rows an optimizer like adamw, by partition."
            )
        found[name] = frozenset(axes)
    return found


def _by_row(touched: list[Tensor | None], new: Tree, old: Tree) -> Tree:
    """The new rows where there was a gradient, else the old ones, for each leaf."""
    found, spec = flatten(new)
    before: list[Any] = spec.flatten_up_to(old)
    columns = zip(touched, found, before, strict=True)
    return unflatten(spec, [_choose_rows(rows, one, other) for rows, one, other in columns])


def _choose_rows(rows: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    if rows is None or new.shape[: rows.dim()] != rows.shape:
        return new
    axes_of_length_1 = (1,) * (new.dim() - rows.dim())
    return choose_leaf(rows.reshape(rows.shape + axes_of_length_1), new, old)
