"""compile_step: forward, backward and update as one compiled graph."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from functional_sgd.autodiff import value_and_grad
from functional_sgd.chain import Chain
from functional_sgd.state import State
from functional_sgd.tree import Tree, flatten, unflatten


def compile_step(loss_fn: Callable[..., Any], opt: Chain, has_aux: bool = False) -> Callable[..., Any]:
    """A training step in one graph: `step(params, state, hyper, *batch) -> (value, params, state)`.

    `loss_fn(params, *batch)` returns a 0-d tensor or, with `has_aux`, a pair (0-d tensor, anything), such as new
    buffers; so does `value`. Hypers are handed to the graph as 0-d tensors, so changing them compiles nothing again; a
    batch of another size compiles once more, then for all sizes. Nothing is overwritten. Raises TypeError if `opt` is
    not a chain (a fused optimizer has kernels of its own: compile the chain).

    >>> from functional_sgd import sgd
    >>> step = compile_step(lambda params, x: (params["w"] * x).sum(), sgd())

    The first call of `step` compiles, which takes some seconds:
    `value, params, state = step(params, state, dict(lr=0.1), x)`.
    """
    if not isinstance(opt, Chain):
        raise TypeError(f"compile_step: expected a chain such as adamw(), got {opt!r}.")

    def step(params: Tree, state: State, hyper: Mapping[str, Any], *batch: Any) -> tuple[Any, Tree, State]:
        value, grads = value_and_grad(loss_fn, has_aux=has_aux)(params, *batch)
        params, state = opt(params, grads, state, hyper)
        return value, params, state

    compiled = torch.compile(step, fullgraph=True)

    def run(params: Tree, state: State, hyper: Mapping[str, Any] | None, *batch: Any) -> Any:
        values = {name: _tensors(value) for name, value in {**opt.hyper, **(hyper or {})}.items()}
        with torch.no_grad():
            return compiled(params, state, values, *batch)

    return run


def _tensors(value: Any) -> Any:
    leaves, spec = flatten(value)
    return unflatten(
        spec, [leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, dtype=torch.float64) for leaf in leaves]
    )
