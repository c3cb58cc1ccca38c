"""optax under jax.jit, as a contender of optimizer_step.py."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from common import Tensors


class Optax:
    """An optimizer of optax, compiled, with the old parameters and state donated."""

    def __init__(self, name: str, tree: Tensors, grads: Tensors) -> None:
        opt = RECIPES[name]()
        self.params, self.grads = arrays(tree), arrays(grads)
        self.state = opt.init(self.params)

        def update(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
            updates, state = opt.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.update = jax.jit(update, donate_argnums=(0, 2))

    def step(self) -> None:
        self.params, self.state = jax.block_until_ready(
            self.update(self.params, self.grads, self.state)
        )

    def result(self) -> Tensors:
        return {name: torch.from_numpy(np.array(value)) for name, value in self.params.items()}


def arrays(tree: Tensors) -> dict[str, jax.Array]:
    """Copies for jax: what it shares with torch, it could not be given."""
    return {name: jnp.array(value.numpy(), copy=True) for name, value in tree.items()}


def four() -> optax.GradientTransformation:
    """The gradient clipped to a norm of 1, AdamW, cautious updates, and an average of the
    parameters.
    """
    clip, adam = optax.clip_by_global_norm(1.0), optax.scale_by_adam()

    def move(update: jax.Array, grad: jax.Array, param: jax.Array) -> jax.Array:
        return -1e-3 * (jnp.where(update * grad > 0, update, 0.0) + 0.01 * param)

    def init(params: Any) -> Any:
        return adam.init(params), jax.tree.map(jnp.copy, params)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        grads, _ = clip.update(grads, optax.EmptyState())
        updates, moments = adam.update(grads, state[0])
        updates = jax.tree.map(move, updates, grads, params)
        average = jax.tree.map(lambda a, p, u: a + 0.001 * (p + u - a), state[1], params, updates)
        return updates, (moments, average)

    return optax.GradientTransformation(init, update)


RECIPES = {
    "sgd": lambda: optax.sgd(1e-3, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-3, weight_decay=0.01),
    "lion": lambda: optax.lion(1e-4, b1=0.9, b2=0.99, weight_decay=0.1),
    "lamb": lambda: optax.lamb(1e-3, b2=0.99, eps=1e-5),
    "four": four,
}
