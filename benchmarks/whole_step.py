"""How long does a whole training step take, with forward and backward? Plain PyTorch, compiled,
ours, and jax.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import tyro
from common import race, save, say, show
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import functional_sgd as fs
from functional_sgd.compile.step import compile_step

Step = Callable[[], object]
ModelName = Literal["small", "mlp", "cnn"]


def network(name: ModelName) -> nn.Module:
    """64-64-10, 784-64-10, or four convolutions with BatchNorm."""
    torch.manual_seed(0)
    if name != "cnn":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(_side(name) ** 2, 64), nn.ReLU(), nn.Linear(64, 10)
        )
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 16), (16, 32), (32, 64)):
        conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def batch(name: ModelName) -> tuple[Tensor, Tensor]:
    """64 pictures of noise, and labels."""
    generator, side = torch.Generator().manual_seed(1), _side(name)
    return torch.randn(64, 1, side, side, generator=generator), torch.randint(
        10, (64,), generator=generator
    )


def _side(name: ModelName) -> int:
    return 8 if name == "small" else 28


def plain(name: ModelName, compiled: bool = False, **form: bool) -> Step:
    """PyTorch as everybody writes it, or with the model and its loss compiled."""
    model, (x, y) = network(name), batch(name)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, **form)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x), y)

    forward = torch.compile(loss_of) if compiled else loss_of

    def step() -> None:
        opt.zero_grad()
        forward(x, y).backward()
        opt.step()

    return step


class Ours:
    """The same with functional_sgd: eager and fused, or all in one graph."""

    def __init__(self, name: ModelName, compiled: bool) -> None:
        model, self.batch = network(name), batch(name)
        self.params, self.buffers = fs.split(model)

        def loss_fn(params: Any, buffers: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
            pred, buffers = fs.apply(model, params, buffers, x)
            return cross_entropy(pred, y), buffers

        self.gradient, self.opt = (
            fs.value_and_grad(loss_fn, has_aux=True),
            fs.fuse(fs.adamw(lr=1e-3), donate=True),
        )
        self.compiled = compile_step(loss_fn, fs.adamw(lr=1e-3), has_aux=True) if compiled else None
        self.state = self.opt.init(self.params)

    def step(self) -> None:
        (_, self.buffers), grads = self.gradient(self.params, self.buffers, *self.batch)
        self.params, self.state = self.opt(self.params, grads, self.state)

    def step_compiled(self) -> None:
        result = self.compiled(self.params, self.state, None, self.buffers, *self.batch)
        (_, self.buffers), self.params, self.state = result


def jax_mlp(name: ModelName) -> Step:
    """The MLP in jax and optax, its whole step under jit, with params and state donated."""
    import jax
    import jax.numpy as jnp
    import optax

    x, y = (jnp.array(part.numpy()) for part in batch(name))
    weights = {
        key: jnp.array(value.detach().numpy(), copy=True)
        for key, value in network(name).named_parameters()
    }
    opt = optax.adamw(1e-3, weight_decay=0.01)

    def loss_fn(params: Any, x: Any, y: Any) -> Any:
        hidden = jax.nn.relu(x.reshape(len(x), -1) @ params["1.weight"].T + params["1.bias"])
        scores = hidden @ params["3.weight"].T + params["3.bias"]
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

    def update(params: Any, state: Any, x: Any, y: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    compiled, now = jax.jit(update, donate_argnums=(0, 1)), [weights, opt.init(weights)]

    def step() -> None:
        now[0], now[1], _ = jax.block_until_ready(compiled(*now, x, y))

    return step


def contenders(name: ModelName, compiled: bool) -> Iterator[tuple[str, Step]]:
    """Everybody who can train this network."""
    yield "PyTorch", plain(name)
    yield "PyTorch, fused AdamW", plain(name, fused=True)
    yield "ours, eager", Ours(name, compiled=False).step
    if compiled:
        yield "PyTorch, compiled model, fused AdamW", plain(name, compiled=True, fused=True)
        yield "ours, compile_step", Ours(name, compiled=True).step_compiled
    if name != "cnn" and importlib.util.find_spec("optax"):
        yield "jax and optax, jit", jax_mlp(name)


def table(name: ModelName, rounds: int, compiled: bool) -> str:
    """Microseconds of each, and how many times plain PyTorch's."""
    times = race(dict(contenders(name, compiled)), rounds, warmup=5)
    rows = [
        [
            who,
            *(f"{1e6 * value:,.0f}" for value in time),
            f"{time.median / times['PyTorch'].median:.2f}",
        ]
        for who, time in times.items()
    ]
    return show(
        f"{name}, batch of 64", ["microseconds", "10 %", "median", "90 %", "times PyTorch"], rows
    )


def main(
    models: tuple[ModelName, ...] = ("small", "mlp", "cnn"),
    rounds: int = 200,
    compiled: bool = True,
    save_results: bool = False,
) -> None:
    """Race whole training steps with AdamW.

    Args:
        models: The networks.
        rounds: How often each contender is timed.
        compiled: Enter those that need torch.compile as well; they take a minute to compile.
        save_results: Write the tables into results/.
    """
    text = say("One training step: gradients of the cross-entropy of one batch, and AdamW.")
    for name in models:
        text += "\n" + table(name, rounds, compiled)
    if save_results:
        save("whole_step", text)


if __name__ == "__main__":
    tyro.cli(main)
