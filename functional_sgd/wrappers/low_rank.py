"""Gradients in a space of low rank, and a state that is as small."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from functional_sgd.decompositions import renewed, singular_vectors
from functional_sgd.hyper import Hyper, Scalar
from functional_sgd.optimizer import Optimizer
from functional_sgd.ranges import Range
from functional_sgd.rules import sgd_step
from functional_sgd.rules.matrices import as_matrix, is_matrix, projected
from functional_sgd.sharded import full, placed
from functional_sgd.signature import STEP
from functional_sgd.state import State, check_state, in_order_of, working_dtype
from functional_sgd.tree import Tree, flatten, flatten_like, unflatten
from functional_sgd.wiring import CALLS
from functional_sgd.wrappers.wrapper import INNER, Wrapper, no_calls, take_grads, wide

BASIS = "basis"
"""The entry with the directions that are kept of each matrix, as columns."""


@dataclass(frozen=True, repr=False)
class LowRank(Wrapper):
    """An optimizer that sees matrices in few dimensions; `low_rank` makes one."""

    rank: int = 128
    basis_every: float = 200
    update_scale: float = 0.25

    name: ClassVar[str] = "low_rank"
    own_hypers: ClassVar[Mapping[str, Range]] = {
        "basis_every": Range(1, whole=True),
        "update_scale": Range(0),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank not in Range(1, whole=True):
            raise ValueError(
                f"low_rank: rank must be {Range(1, whole=True)!r}, got {self.rank!r}. It is the "
                f"number of directions that are kept of each matrix: 128, say."
            )

    def init(self, params: Tree) -> State:
        """A fresh state: no direction is known yet."""
        leaves, spec = flatten(params)
        basis = unflatten(spec, list(map(self._no_basis, leaves)))
        return {CALLS: no_calls(params), BASIS: basis, INNER: self.opt.init(self.inside(params))}

    def inside(self, params: Tree) -> Tree:
        """Zeros of low rank in the place of matrices, which a step is added to."""
        leaves, spec = flatten(params)
        return unflatten(spec, list(map(self._small, leaves)))

    def __call__(
        self,
        params: Tree,
        grads: Tree,
        state: State,
        hyper: Mapping[str, Hyper] | None = None,
        **extras: Any,
    ) -> tuple[Tree, State]:
        """One step: (new params, new state)."""
        check_state(self.name, state, (CALLS, BASIS, INNER))
        own, others, extras = self.take_own(hyper, extras)
        leaves, given, spec = take_grads(self.name, params, grads).dense()
        bases = flatten_like(spec, state[BASIS], params, self.name, "state['basis']")
        taken = in_order_of(spec, state[INNER][STEP], state[BASIS])
        due = taken % own["basis_every"] == 0  # before this step
        seen: list[Tensor | None] = []
        for place, (leaf, grad) in enumerate(zip(leaves, given, strict=True)):
            if grad is None or not self._projects(leaf):
                seen.append(grad)
                continue
            # All of a gradient that is cut over processes: a piece has other singular vectors.
            matrix = as_matrix(wide(full(grad)))
            renew = functools.partial(_first_directions, matrix, self.rank)
            bases[place] = renewed(due[place].to(matrix.device), bases[place], renew)
            seen.append(projected(matrix, bases[place]))
        small = self.inside(params)
        moved, inner = self.opt(small, unflatten(spec, seen), state[INNER], others, **extras)
        results = []
        for leaf, grad, basis, new in zip(leaves, given, bases, flatten(moved)[0], strict=True):
            if not self._projects(leaf):
                results.append(new)
            elif grad is None:
                # Without a gradient, new is the zeros that went in.
                results.append(leaf)
            else:
                result = self._moved(leaf, basis, new, own)
                if self.donates:  # the memory of the params is handed back, as by `fuse`
                    leaf.detach().copy_(result)
                    result = leaf
                results.append(result)
        kept = {CALLS: state[CALLS] + 1, BASIS: unflatten(spec, bases), INNER: inner}
        return unflatten(spec, results), kept

    def _projects(self, leaf: Tensor) -> bool:
        """Whether fewer directions are kept of a leaf than it has."""
        if leaf.is_complex() or not is_matrix(leaf):
            return False
        return min(_sides(leaf)) > self.rank

    def _small(self, leaf: Tensor) -> Tensor:
        if not self._projects(leaf):
            return leaf
        rows, columns = _sides(leaf)
        if rows >= columns:
            return _zeros(leaf, rows, self.rank)
        return _zeros(leaf, self.rank, columns)

    def _no_basis(self, leaf: Tensor) -> Tensor:
        if not self._projects(leaf):
            return _zeros(leaf)
        return _zeros(leaf, min(_sides(leaf)), self.rank)

    def _moved(
        self, leaf: Tensor, basis: Tensor, step: Tensor, own: Mapping[str, Scalar]
    ) -> Tensor:
        """A leaf after a step that was made in few dimensions."""
        rows, columns = _sides(leaf)
        whole = step @ basis.mT if rows >= columns else basis @ step
        scale = own["update_scale"]
        if isinstance(scale, Tensor):
            scale = scale.to(whole.device, whole.dtype)
        change: Tensor = placed((scale * whole).reshape(leaf.shape), leaf)
        return (wide(leaf) + change).to(leaf.dtype)


def low_rank(
    opt: Optimizer, rank: int = 128, basis_every: float = 200, update_scale: float = 0.25
) -> LowRank:
    """The optimizer on gradients of low rank: its slots have rank numbers for each row (or column)
    of a matrix, in place of all.

    B = the first `rank` right singular vectors of grad, every so many steps (left ones, if it is
    wider than high);  param = param + update_scale * (what opt makes of grad B) B'

    Matrices are what `muon` takes for such: leaves of two axes and more, the first against all
    others. Vectors, complex leaves, and matrices whose shorter side is at most `rank` are trained
    in full, without `update_scale`. Hypers: basis_every >= 1, counted by each leaf, and
    update_scale >= 0, besides those of opt; the rank belongs to the shapes of the state.

    opt is a chain that ends with sgd_step, and reads the params nowhere else, since there are none
    in so few dimensions. Weight decay goes outside, as in `galore`: `chain(low_rank(adam()),
    weight_decay)`. Where a step is compiled, mapped or on a GPU, singular vectors are taken in
    every step, and thrown away where they are not due. Half-precision params are computed in
    float32.

    Raises ValueError for a number out of its range or a rule that reads param, TypeError if opt is
    no chain. Source: GaLore (Zhao et al. 2024); the authors' projection "std".

    >>> import torch
    >>> from functional_sgd import adam
    >>> opt, params = low_rank(adam(lr=1.0), rank=1, update_scale=1.0), torch.ones(2, 2)
    >>> state = opt.init(params)
    >>> state["inner"]["grad_avg"].shape, state["basis"].shape
    (torch.Size([2, 1]), torch.Size([2, 1]))
    >>> params, state = opt(params, torch.tensor([[0.0, 3.0], [0.0, 0.0]]), state)
    >>> params
    tensor([[1., 0.],
            [1., 1.]])
    """
    _check_reads_no_param(opt)
    return LowRank(opt, rank, basis_every, update_scale)


def _check_reads_no_param(opt: Optimizer) -> None:
    """Raise an error unless an optimizer is a chain of which only sgd_step sees the params."""
    rules = getattr(getattr(opt, "opt", opt), "rules", None)  # of what is fused, those of the chain
    if rules is None or opt.inner:
        raise TypeError(
            f"low_rank: expected a chain that ends with sgd_step, got {opt!r}. Other optimizers go "
            f"outside: partition({{'a': low_rank(adam()), ...}}, labels)."
        )
    for rule in rules:
        reads = map(rule.outer, rule.signature.columns)
        if rule.function is not sgd_step.function and "param" in reads:
            raise ValueError(
                f"low_rank: rule {rule.name} reads param, which has no place in so few dimensions. "
                f"Put it after: chain(low_rank(...), {rule.name}), or in front."
            )


def _sides(leaf: Tensor) -> tuple[int, int]:
    """Rows and columns of a leaf as a matrix."""
    rows = leaf.shape[0]
    return rows, leaf.numel() // max(rows, 1)


def _zeros(leaf: Tensor, *shape: int) -> Tensor:
    """Zeros of which this process has all, in the dtype in which a leaf is computed."""
    dtype = leaf.dtype if leaf.is_complex() else working_dtype(leaf)
    return torch.zeros(shape, dtype=dtype, device=leaf.device)


def _first_directions(matrix: Tensor, rank: int) -> Tensor:
    return singular_vectors(matrix)[:, :rank].contiguous()
