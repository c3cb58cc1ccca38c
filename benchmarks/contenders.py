"""The contenders of optimizer_step.py: the same update, as each library does it. Each has params
and a step.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import torch
from by_hand import BY_HAND, init
from common import Tensors
from torch import Tensor

import functional_sgd as fs

OptimizerName = Literal["sgd", "adamw", "lion", "lamb", "four"]


@fs.elementwise
def cautious(update: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Stand still wherever the update and the gradient of this step disagree."""
    return dict(update=torch.where(update * grad > 0, update, 0.0))


@fs.elementwise(param_avg=torch.clone)
def average_params(param: Tensor, param_avg: Tensor, *, ema: float = 0.999) -> dict[str, Tensor]:
    """Keep a running mean of the parameters."""
    return dict(param_avg=param_avg + (1 - ema) * (param - param_avg))


adam_direction = (fs.average_grad, fs.average_sqr_grad, fs.debias, fs.scale_by_rms)
OURS: dict[OptimizerName, fs.Chain] = {
    "sgd": fs.sgd(lr=1e-3, mom=0.9),
    "adamw": fs.adamw(lr=1e-3),
    "lion": fs.lion(lr=1e-4, wd=0.1),
    "lamb": fs.lamb(lr=1e-3),
    "four": fs.chain(
        fs.clip_norm, fs.weight_decay, *adam_direction, cautious, fs.sgd_step, average_params,
        lr=1e-3, sqr_mom=0.999, max_norm=1.0,
    ),
}  # fmt: skip


class Contender(Protocol):
    """Something that updates parameters."""

    def step(self) -> object:
        """One update."""

    def result(self) -> Tensors:
        """The parameters now."""


class Ours:
    """functional_sgd: the trees of the last step go into the next, and are dropped."""

    def __init__(self, opt: fs.Optimizer, tree: Tensors, grads: Tensors) -> None:
        self.opt, self.grads = opt, grads
        self.params = _copied(tree)
        self.state = opt.init(self.params)

    def step(self) -> None:
        self.params, self.state = self.opt(self.params, self.grads, self.state)

    def result(self) -> Tensors:
        return self.params


class Torch:
    """torch.optim, in one of its forms. A compiled step has its learning rate built in: it is for
    this one only.
    """

    def __init__(
        self, make: Callable[..., Any], tree: Tensors, grads: Tensors, compiled: bool = False
    ) -> None:
        self.params = {name: value.requires_grad_() for name, value in _copied(tree).items()}
        for name, value in self.params.items():
            value.grad = grads[name]
        self.opt = make(list(self.params.values()), lr=1e-3)
        self.step = torch.compile(self.opt.step) if compiled else self.opt.step

    def result(self) -> Tensors:
        return {name: value.detach() for name, value in self.params.items()}


class ByHand:
    """A loop that somebody wrote with torch's foreach functions."""

    def __init__(self, name: str, tree: Tensors, grads: Tensors) -> None:
        self.update, self.params, self.grads = BY_HAND[name], _copied(tree), list(grads.values())
        self.state = init(list(self.params.values()))

    def step(self) -> None:
        self.update(list(self.params.values()), self.grads, self.state)

    def result(self) -> Tensors:
        return self.params


class TorchOpt:
    """TorchOpt's functional optimizers; nothing is overwritten."""

    def __init__(self, opt: Any, tree: Tensors, grads: Tensors) -> None:
        self.apply, self.opt, self.grads = (
            importlib.import_module("torchopt").apply_updates,
            opt,
            grads,
        )
        self.params = _copied(tree)
        self.state = opt.init(self.params)

    @torch.no_grad()
    def step(self) -> None:
        updates, self.state = self.opt.update(
            self.grads, self.state, params=self.params, inplace=False
        )
        self.params = self.apply(self.params, updates, inplace=False)

    def result(self) -> Tensors:
        return self.params


class HeavyBall:
    """HeavyBall's AdamW; it takes the gradients away at every step, so they are put back."""

    def __init__(self, tree: Tensors, grads: Tensors) -> None:
        heavyball = importlib.import_module("heavyball")
        make = getattr(heavyball, "AdamW", None) or heavyball.ForeachAdamW
        self.params, self.grads = (
            {name: value.requires_grad_() for name, value in _copied(tree).items()},
            grads,
        )
        self.opt = make(list(self.params.values()), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)

    def step(self) -> None:
        for value, grad in zip(self.params.values(), self.grads.values(), strict=True):
            value.grad = grad
        self.opt.step()

    def result(self) -> Tensors:
        return {name: value.detach() for name, value in self.params.items()}


def contenders(
    name: OptimizerName, tree: Tensors, grads: Tensors, compiled: bool = False, jax: bool = True
) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Everybody who can do this optimizer and is installed: a name, and how to make one."""
    yield "ours, donated", lambda: Ours(fs.fuse(OURS[name], donate=True), tree, grads)
    yield "ours, pure", lambda: Ours(fs.fuse(OURS[name]), tree, grads)
    yield "ours, leaf by leaf", lambda: Ours(OURS[name], tree, grads)
    if name in BY_HAND:
        yield "foreach by hand", lambda: ByHand(name, tree, grads)
    yield from _of_torch(name, tree, grads, compiled)
    if name in ("sgd", "adamw") and importlib.util.find_spec("torchopt"):
        torchopt = importlib.import_module("torchopt")
        opt = torchopt.sgd(1e-3, momentum=0.9) if name == "sgd" else torchopt.adamw(1e-3)
        yield "TorchOpt", lambda: TorchOpt(opt, tree, grads)
    if name == "adamw" and importlib.util.find_spec("heavyball"):
        yield "HeavyBall", lambda: HeavyBall(tree, grads)
    if jax and importlib.util.find_spec("optax") and importlib.util.find_spec("jax"):
        yield "optax, jit", lambda: importlib.import_module("with_optax").Optax(name, tree, grads)


def _of_torch(
    name: str, tree: Tensors, grads: Tensors, compiled: bool
) -> Iterator[tuple[str, Callable[[], Contender]]]:
    if name not in ("sgd", "adamw"):
        return

    def maker(**form: bool) -> Callable[..., Any]:
        if name == "sgd":
            return lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9, **form)
        return lambda params, lr: torch.optim.AdamW(params, lr, weight_decay=0.01, **form)

    yield "torch for-loop", lambda: Torch(maker(foreach=False), tree, grads)
    yield "torch foreach", lambda: Torch(maker(foreach=True), tree, grads)
    yield "torch fused", lambda: Torch(maker(fused=True), tree, grads)
    if compiled:
        yield "torch compiled", lambda: Torch(maker(foreach=True), tree, grads, compiled=True)


def _copied(tree: Tensors) -> Tensors:
    return {name: value.clone() for name, value in tree.items()}
