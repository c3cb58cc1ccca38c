"""Gradients of a loss with respect to a tree of parameters, and modules as pure functions."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from functional_sgd.outputs import map_output
from functional_sgd.placing import Placed, hold, holding, made_ready, try_out
from functional_sgd.tracing import transformed
from functional_sgd.tree import Tree, flatten, paths, unflatten

Tensors = dict[str, Tensor]

_NOTHING = nullcontext()


def value_and_grad(
    loss_fn: Callable[..., Any], has_aux: bool = False
) -> Callable[..., tuple[Any, Tree]]:
    """A function that returns the loss and its gradient: `value_and_grad(loss_fn)(params, *batch)
    -> (value, grads)`.

    `loss_fn(params, *batch)` returns a 0-d tensor; with `has_aux`, a pair (0-d tensor, anything),
    which then comes back as the value. The gradient is a tree like params, with None where the loss
    does not depend on a leaf. Works eagerly, under torch.func transforms and in torch.compile; in
    these two torch has zeros in the place of None, so that weight decay moves such a leaf and its
    steps are counted. `freeze` it, or pass it beside params, where that matters.

    Value, aux and gradient are detached, unless params are tracked: if any leaf has requires_grad
    and is no nn.Parameter, as after a step with a tracked lr, then derivatives of all three can be
    taken again. What else the loss depends on is not looked at; under torch.no_grad() nothing is
    tracked.

    A module that `apply` calls in `loss_fn` keeps these params until the gradient is taken. So
    activation checkpointing (`use_reentrant=False`) and backward hooks see the right ones, and
    hooks on the module's own parameters are called with the gradients of these.

    Raises ValueError if the loss is not a 0-d tensor, and TypeError for a leaf that is no floating
    or complex tensor, and if `has_aux` finds no pair.

    >>> import torch
    >>> compute = value_and_grad(lambda params, x: (params["w"] * x).sum())
    >>> compute({"w": torch.tensor([3.0])}, torch.tensor([2.0]))
    (tensor(6.), {'w': tensor([2.])})
    """

    def checked(params: Tree, *batch: object) -> Any:
        result = loss_fn(params, *batch)
        if has_aux and not (isinstance(result, (tuple, list)) and len(result) == 2):
            raise TypeError(
                f"value_and_grad: with has_aux the function must return a pair (0-d tensor, "
                f"anything), got {type(result).__name__}. Return both, or leave out has_aux."
            )
        loss = result[0] if has_aux else result
        _check_loss(loss)
        return result

    def compute(params: Tree, *batch: object) -> tuple[Any, Tree]:
        if transformed():
            _check_leaves(params)
            # requires_grad_() fails inside a transform, so the gradient must be a transform too.
            grads, value = torch.func.grad_and_value(checked, has_aux=has_aux)(params, *batch)
            return value, grads
        leaves, spec = flatten(params)
        followed = torch.is_grad_enabled() and any(map(_is_followed, leaves))
        # An alias, so that the derivative is by what the loss is given, and by nothing behind it.
        tracked: list[Tensor] = []
        try:
            for leaf in leaves:
                if followed and leaf.requires_grad:
                    tracked.append(leaf.view_as(leaf))
                else:
                    tracked.append(leaf.detach().requires_grad_())
        except (RuntimeError, AttributeError):
            _check_leaves(params)
            raise
        # Under a caller's no_grad the results are not tracked, but the gradient still needs a
        # graph.
        with holding() as held, torch.enable_grad():
            result = checked(unflatten(spec, tracked), *batch)
            loss = result[0] if has_aux else result
            grads = gradients(loss, tracked, held, create_graph=followed)
        if followed:
            return result, unflatten(spec, grads)
        if has_aux:
            return (loss.detach(), detached(result[1])), unflatten(spec, grads)
        return loss.detach(), unflatten(spec, grads)

    return compute


def gradients(
    loss: Tensor, leaves: list[Tensor], held: Sequence[Placed] = (), create_graph: bool = False
) -> list[Tensor | None]:
    """The derivative of a loss by each leaf; None where there is none.

    `held` are the modules that have the leaves in place, of which code may run once more.
    """
    # autograd.grad raises an error in both cases.
    if not leaves or not loss.requires_grad:
        return [None] * len(leaves)
    undo = made_ready(held, again=create_graph)
    no_chance: Any = _NoChance  # torch has no types for it
    try:
        mode = no_chance() if _is_written_down() else _NOTHING
        with mode:
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, create_graph=create_graph)
    finally:
        for function in reversed(undo):
            function()
    return list(grads)


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
    params: Tensors = {}
    frozen: Tensors = {}
    for name, value in module.named_parameters():
        own = params if value.requires_grad else frozen
        own[name] = value.detach().clone()
    buffers = {name: value.detach().clone() for name, value in module.named_buffers()}
    return params, {**frozen, **buffers}


def apply(
    module: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    *args: object,
    **kwargs: object,
) -> tuple[Any, Tensors]:
    """(the module's output for these tensors, the buffers as they are afterwards); neither argument
    is touched.

    Copies what the module writes to in place: the buffers if any layer is training, and what else
    the first call has found. Under torch.func transforms and in torch.compile, where this cannot be
    found, these are all buffers, and the weights of embeddings with a max_norm; a layer of your own
    must not write to its parameters there.

    A gradient of the output is best taken by `value_and_grad`: taken in another way, layers that
    are called once more for it (activation checkpointing) find the module's own tensors.

    Raises RuntimeError if a tensor of the module is missing or unknown, if another thread has the
    module at work, or if a later call writes where the first one has not.

    >>> norm = torch.nn.BatchNorm1d(2, momentum=1.0)
    >>> _, after = apply(norm, *split(norm), torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    >>> after["running_mean"]
    tensor([2., 2.])
    """
    tensors = {**params, **buffers}
    if transformed():
        return _apply_transformed(module, tensors, buffers, args, kwargs)
    if _is_written_down():
        try_out(module, tensors, args, kwargs)
    # If it is held, `holding` puts it back once the gradient is taken; otherwise it is put back
    # here.
    placed, held = Placed(module, tensors), False
    try:
        output = placed.call(args, kwargs)
        held = hold(placed)
    finally:
        if not held:
            placed.put_back()
    return output, placed.after(buffers)


def _apply_transformed(
    module: nn.Module,
    tensors: Tensors,
    buffers: Mapping[str, Tensor],
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> tuple[Any, Tensors]:
    """`apply` to stand-ins for tensors, of which torch can tell more."""
    # Copied whether in training or not: versions of stand-ins do not tell who has written.
    written = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    limited = [one.weight for one in module.modules() if getattr(one, "max_norm", None) is not None]
    if limited:  # embeddings, which write to their weight in every pass
        for name, own in module.named_parameters(remove_duplicate=False):
            if any(own is weight for weight in limited):
                written.add(name)
    tensors |= {name: value.clone() for name, value in tensors.items() if name in written}
    output = torch.func.functional_call(module, tensors, args, kwargs, strict=True)
    return output, {name: tensors[name].detach() for name in buffers}


class _NoChance(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Let operations that draw random numbers be errors."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(
                f"the gradient draws random numbers ({func}), as activation checkpointing does for "
                f"dropout: compiled, they would be others than those of the forward pass. Leave "
                f"out the checkpointing, the dropout inside it, or the compiling."
            )
        return func(*args, **(kwargs or {}))


def _is_written_down() -> bool:
    """Whether make_fx is at work."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    # Looked up, not imported: if make_fx is running, it has been loaded.
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return proxies is not None and proxies.get_proxy_mode() is not None


def _is_followed(leaf: object) -> bool:
    """Whether derivatives by this are meant to be tracked; a module's own parameter always is."""
    return isinstance(leaf, Tensor) and leaf.requires_grad and not isinstance(leaf, nn.Parameter)


def _check_leaves(params: Tree) -> None:
    """Raise TypeError, with the path, for a leaf that has no derivative."""
    leaves = flatten(params)[0]
    for place, leaf in enumerate(leaves):
        if not (isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())):
            found = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(
                f"value_and_grad: {paths(params)[place]!r} must be a floating or complex tensor, "
                f"got {found}. Pass it as an argument of its own."
            )


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        found = type(loss).__name__
        if isinstance(loss, Tensor):
            found = f"a tensor of shape {tuple(loss.shape)}"
        raise ValueError(
            f"value_and_grad: the loss must be a 0-d tensor, got {found}. Take its mean or sum."
        )


def detached(output: Any) -> Any:
    """The same with its tensors cut off from what computed them; whatever else is in it stays."""
    return map_output(_detached, output)


def _detached(leaf: object) -> object:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
