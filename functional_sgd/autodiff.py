"""Gradients of a loss with respect to a tree of parameters, and modules as pure functions."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from functional_sgd.tracing import transformed
from functional_sgd.tree import Tree, flatten, unflatten

Tensors = dict[str, Tensor]


def value_and_grad(
    loss_fn: Callable[..., Any], has_aux: bool = False
) -> Callable[..., tuple[Any, Tree]]:
    """A function that returns the loss and its gradient: `value_and_grad(loss_fn)(params, *batch)
    -> (value, grads)`.

    `loss_fn(params, *batch)` returns a 0-d tensor; with `has_aux`, a pair (0-d tensor, anything),
    which then comes back as the value. The gradient is a tree like params, with None where the loss
    does not depend on a leaf. Value and aux are detached. Works eagerly, under torch.func
    transforms and in torch.compile.

    Raises ValueError if the loss is not a 0-d tensor.

    >>> import torch
    >>> value_and_grad(lambda params, x: (params["w"] * x).sum())({"w": torch.tensor([3.0])}, torch.tensor([2.0]))
    (tensor(6.), {'w': tensor([2.])})
    """

    def compute(params: Tree, *batch: Any) -> tuple[Any, Tree]:
        if transformed():
            grads, value = torch.func.grad_and_value(loss_fn, has_aux=has_aux)(params, *batch)
            return value, grads
        leaves, spec = flatten(params)
        tracked = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            result = loss_fn(unflatten(spec, tracked), *batch)
            loss = result[0] if has_aux else result
            _check_loss(loss)
            grads = gradients(loss, tracked)
        value = loss.detach()
        return (value, detached(result[1])) if has_aux else value, unflatten(spec, grads)

    return compute


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    """The derivative of a loss by each leaf; None where there is none."""
    if not leaves or not loss.requires_grad:
        return [None] * len(leaves)
    return list(torch.autograd.grad(loss, leaves, allow_unused=True))


def split(module: nn.Module) -> tuple[Tensors, Tensors]:
    """The tensors of a module: (params, buffers), each a dict from name to a copy that shares
    nothing with the module.

    params are what is trained; parameters with requires_grad=False go with the buffers. Together
    they are the module's state: `module.load_state_dict({**params, **buffers}, strict=False)` puts
    them back.

    >>> params, buffers = split(torch.nn.BatchNorm1d(2))
    >>> list(params), list(buffers)
    (['weight', 'bias'], ['running_mean', 'running_var', 'num_batches_tracked'])
    """
    named = {name: value.detach().clone() for name, value in module.named_parameters()}
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    params = {name: value for name, value in named.items() if name in trained}
    frozen = {name: value for name, value in named.items() if name not in trained}
    buffers = {name: value.detach().clone() for name, value in module.named_buffers()}
    return params, {**frozen, **buffers}


def apply(
    module: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], *args: Any
) -> tuple[Any, Tensors]:
    """(the module's output for these tensors, the buffers as they are afterwards); neither argument
    is touched.

    Copies the buffers if any layer is training, since layers such as BatchNorm then write to them.
    Raises RuntimeError if a tensor of the module is missing or unknown.

    >>> norm = torch.nn.BatchNorm1d(2, momentum=1.0)
    >>> _, after = apply(norm, *split(norm), torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    >>> after["running_mean"]
    tensor([2., 2.])
    """
    tensors = {**params, **buffers}
    if any(layer.training for layer in module.modules()):
        written = {name for name, _ in module.named_buffers()}
        tensors.update({name: value.clone() for name, value in buffers.items() if name in written})
    output = (_call if transformed() else _call_eagerly)(module, tensors, args)
    return output, {name: tensors[name].detach() for name in buffers}


def _call(module: nn.Module, tensors: Tensors, args: tuple[Any, ...]) -> Any:
    """The module's output for these tensors; buffers that it has set anew are in `tensors`
    afterwards.
    """
    return torch.func.functional_call(module, tensors, args, strict=True)


def _call_eagerly(module: nn.Module, tensors: Tensors, args: tuple[Any, ...]) -> Any:
    """`_call` in half the time (62 of 138 microseconds for a small network are not the network's),
    for eager mode.
    """
    places = []  # where each tensor of the module is, under the first of its names
    first_name: dict[int, str] = {}
    for prefix, layer in module.named_modules():
        for store in (layer._parameters, layer._buffers):
            for key, value in store.items():
                if value is not None:
                    name = first_name.setdefault(id(value), f"{prefix}.{key}" if prefix else key)
                    places.append((store, key, name, value))
    if tensors.keys() != set(first_name.values()):
        return _call(
            module, tensors, args
        )  # which knows other names of tied tensors, and what to say of wrong ones
    try:
        for store, key, name, _ in places:
            store[key] = tensors[name]
        output = module(*args)
        tensors.update({name: store[key] for store, key, name, _ in places})
        return output
    finally:
        for store, key, _, value in places:
            store[key] = value


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        found = (
            f"a tensor of shape {tuple(loss.shape)}"
            if isinstance(loss, Tensor)
            else type(loss).__name__
        )
        raise ValueError(
            f"value_and_grad: the loss must be a 0-d tensor, got {found}. Take its mean or sum."
        )


def detached(tree: Tree) -> Tree:
    """The tree with its tensors cut off from what computed them; whatever else is in it stays."""
    leaves, spec = flatten(tree)
    return unflatten(spec, [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves])
