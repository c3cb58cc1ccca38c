"""compile_step: forward, backward and update as one compiled graph."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from functional_sgd.autodiff import value_and_grad
from functional_sgd.compile.traced import (
    MANY,
    Constants,
    Traced,
    by_name,
    check_constants,
    constants_in,
    joined,
    numbers_of,
    plain_constants,
    trace,
)
from functional_sgd.fusion.fused import Fused
from functional_sgd.hyper import Hyper, with_hypers
from functional_sgd.optimizer import Optimizer, check_optimizer
from functional_sgd.state import State
from functional_sgd.tree import Spec, Tree

_ADVICE = (
    "compile_step: this step could not be compiled. A loss or an optimizer that branches on the "
    "values of tensors "
    "cannot: write torch.where, or take the step without compile_step."
)

_CONSTANTS = (
    "compile_step: every call so far has had other arguments that are no tensors, {constants} now, "
    "and each is compiled by itself, for they are constants of a graph. Pass numbers that change "
    "as 0-d tensors."
)


def compile_step(
    loss_fn: Callable[..., Any], opt: Optimizer, has_aux: bool = False
) -> Callable[..., tuple[Any, Tree, State]]:
    """A training step in one graph: `step(params, state, hyper, *batch) -> (value, params, state)`.

    `loss_fn(params, *batch)` returns a 0-d tensor or, with `has_aux`, a pair (0-d tensor,
    anything), such as new buffers; so does `value`. Nothing is overwritten. Of `opt` (a chain, a
    wrapper, or one of them fused) the rules become part of the graph. For `sam` the gradient is
    taken a second time, where new random numbers are drawn; `value` is the first one.

    Hypers are data, so changing them compiles nothing again. Other numbers and texts in a batch are
    constants of the graph: another one is compiled for each. Objects that may change are refused,
    NumPy's arrays among them. The first batch has a graph of its
    own; those of other shapes share another, by torch.compile. What `loss_fn` reads besides its
    arguments (numbers, the mode of a module) is as it was at the first call.

    Raises TypeError if `opt` is not an optimizer, or one of torch.optim inside; `step` does for an
    object that is neither a tensor, nor a tree of them, nor a plain value.

    >>> from functional_sgd import sgd
    >>> step = compile_step(lambda params, x: (params["w"] * x).sum(), sgd())

    The first call of `step` compiles, which takes some seconds:
    `value, params, state = step(params, state, dict(lr=0.1), x)`.
    """
    check_optimizer("compile_step", opt)
    if not opt.traceable:
        raise TypeError(
            f"compile_step: {opt!r} works in place, so it cannot be compiled. A chain of rules can."
        )
    plain = without_kernels(opt)
    gradient = value_and_grad(loss_fn, has_aux=has_aux)

    def update(
        params: Tree, state: State, hyper: Mapping[str, Hyper], *batch: object
    ) -> tuple[Any, Tree, State]:
        value, grads = gradient(params, *batch)
        if plain.perturbs:
            with torch.no_grad():
                there = plain.perturb(params, grads, state, dict(hyper))
            _, grads = gradient(there, *batch)
        with torch.no_grad():
            return value, *plain(params, grads, state, dict(hyper))

    of_any_shape = torch.compile(update, fullgraph=True)
    graphs: list[Traced] = []

    def step(
        params: Tree, state: State, hyper: Mapping[str, Hyper] | None, *batch: object
    ) -> tuple[Any, Tree, State]:
        numbers = numbers_of(with_hypers(plain.hyper, hyper or {}))
        arguments: Any = (params, state, numbers, batch)
        leaves, spec = optree.tree_flatten(arguments, none_is_leaf=True)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        constants = constants_in(leaves)
        fixed = (spec, constants)
        graph = next((one for one in graphs if one.fixed == fixed), None)
        if graph is None:
            begin = len(leaves) - spec.children()[-1].num_leaves  # of the batch
            found = [one for one in constants if one.place >= begin]
            check_constants("compile_step", found)
            if len(graphs) == MANY:  # not more, so that it is said once
                odd = plain_constants(constants)
                warnings.warn(_CONSTANTS.format(constants=odd), stacklevel=2)
            graph = trace(_of_tensors(update, spec, constants), tensors, fixed, _ADVICE)
            graphs.append(graph)
        if graph.guard.holds(tensors):
            result: tuple[Any, Tree, State] = graph(tensors)[0]
            return result
        with torch.no_grad():
            return of_any_shape(params, state, by_name(numbers), *batch)

    return step


def _of_tensors(
    update: Callable[..., Tree], spec: Spec, constants: Constants
) -> Callable[..., Tree]:
    """The step as a function of the tensors among its arguments."""

    def step(*tensors: Tensor) -> Tree:
        arguments: Any = spec.unflatten(joined(constants, spec, iter(tensors)))
        params, state, hyper, batch = arguments
        return update(params, state, by_name(hyper), *batch)

    return step


def without_kernels(opt: Optimizer) -> Optimizer:
    """The optimizer that a fused one was made of, also inside wrappers: one that can be traced."""
    if isinstance(opt, Fused):
        return opt.opt
    return opt.with_inner(tuple(map(without_kernels, opt.inner)))
