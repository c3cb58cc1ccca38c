"""What do params in bfloat16 and slots of 8 bits cost, and save: bytes, CPU time, and loss?

Every recipe is the same AdamW, so its arithmetic; what differs is how params and slots are kept.
Bytes are those of params, gradients and state, and those that a donated step moves. Time is the
least CPU time of a step, of all cores, over interleaved rounds: on a machine that others use, the
minimum is what a step takes when it is left alone. Loss is that of a small GPT which learns to
write Python from Python's own library, on text that it has not seen, after 300 steps; in bfloat16
the whole model is computed in bfloat16.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from common import Tensors, TreeName, gradients, save, say, show, trees
from torch.func import functional_call

from functional_sgd import (
    Chain,
    adamw,
    chain,
    compensate_rounding,
    eight_bit,
    fuse,
    round_stochastically,
)

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from gpt_model import GPT, next_token_loss
from library_text import Characters, library_text


@dataclass(frozen=True)
class Kept:
    """How params and slots are kept."""

    dtype: torch.dtype
    make: Callable[..., Chain]


RECIPES = {
    "float32": Kept(torch.float32, adamw),
    "float32, slots of 8 bits": Kept(torch.float32, lambda **hyper: eight_bit(adamw(**hyper))),
    "bfloat16, to nearest": Kept(torch.bfloat16, adamw),
    "bfloat16, Kahan": Kept(
        torch.bfloat16, lambda **hyper: chain(adamw(**hyper), compensate_rounding)
    ),
    "bfloat16, stochastic": Kept(
        torch.bfloat16, lambda **hyper: chain(adamw(**hyper), round_stochastically)
    ),
    "bfloat16, stochastic, slots of 8 bits": Kept(
        torch.bfloat16, lambda **hyper: chain(eight_bit(adamw(**hyper)), round_stochastically)
    ),
}

FIRST = "float32"
"""What the others are compared with."""


class Stepper:
    """An optimizer with a tree of its own, which it overwrites."""

    def __init__(self, kept: Kept, tree: Tensors) -> None:
        self.opt = fuse(kept.make(lr=1e-3, wd=0.01), donate=True)
        self.params = {name: leaf.to(kept.dtype, copy=True) for name, leaf in tree.items()}
        self.grads = {name: leaf.to(kept.dtype) for name, leaf in gradients(tree).items()}
        self.state = self.opt.init(self.params)

    def step(self) -> None:
        """One update."""
        self.params, self.state = self.opt(self.params, self.grads, self.state)

    def bytes(self) -> tuple[int, int]:
        """(held in params and state, moved by a step: gradients are read, the others are also
        written).
        """
        trees = [one for one in self.state.values() if isinstance(one, dict)]
        leaves = [leaf for one in (self.params, *trees) for leaf in one.values()]
        held = sum(leaf.nbytes for leaf in leaves)
        return held, 2 * held + sum(leaf.nbytes for leaf in self.grads.values())


def times(steppers: dict[str, Stepper], rounds: int) -> dict[str, float]:
    """The least CPU seconds of a step."""
    least = dict.fromkeys(steppers, float("inf"))
    for number in range(rounds + 1):
        for name, stepper in steppers.items():
            start = time.process_time()
            stepper.step()
            if number:  # the first one compiles
                least[name] = min(least[name], time.process_time() - start)
    return least


def table_of_steps(tree_name: TreeName, rounds: int) -> str:
    """Bytes and time for each parameter."""
    tree = trees(tree_name)
    count = sum(leaf.numel() for leaf in tree.values())
    steppers = {name: Stepper(kept, tree) for name, kept in RECIPES.items()}
    least = times(steppers, rounds)
    rows = []
    for name, stepper in steppers.items():
        held, moved = stepper.bytes()
        seconds = least[name]
        rows.append(
            [
                name,
                f"{held / count:.2f}",
                f"{moved / count:.2f}",
                f"{1e9 * seconds / count:.2f}",
                f"{seconds / least[FIRST]:.2f}x",
            ]
        )
    title = f"{tree_name}: one AdamW update of {count:,} parameters"
    return show(title, ["kept as", "bytes held", "bytes moved", "CPU ns", "times float32"], rows)


def loss_after(kept: Kept, seed: int, steps: int) -> float:
    """The loss on text that was not seen, of a small GPT after some steps."""
    batch, window, characters = 16, 64, Characters()
    numbers = characters.encode(library_text(600_000))
    seen, unseen = numbers[:-60_000], numbers[-60_000:]
    torch.manual_seed(seed)
    model = GPT(len(characters.alphabet), window, width=96, heads=4, layers=3)
    params = {name: leaf.detach().to(kept.dtype) for name, leaf in model.named_parameters()}
    opt = fuse(kept.make(lr=2e-3, sqr_mom=0.99, wd=0.1), donate=True)
    state = opt.init(params)
    chance = torch.Generator().manual_seed(seed)

    def loss_of(params: Tensors, text: torch.Tensor, begins: torch.Tensor) -> torch.Tensor:
        pieces = torch.stack([text[at : at + window + 1] for at in begins.tolist()])
        scores: Any = functional_call(model, params, (pieces[:, :-1],))
        return next_token_loss(scores.float(), pieces[:, 1:])

    for _ in range(steps):
        begins = torch.randint(len(seen) - window - 1, (batch,), generator=chance)
        tracked = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
        loss = loss_of(tracked, seen, begins)
        found = torch.autograd.grad(loss, list(tracked.values()))
        params, state = opt(params, dict(zip(params, found, strict=True)), state)
    with torch.no_grad():
        begins = torch.arange(0, len(unseen) - window - 1, window)
        parts = [loss_of(params, unseen, part).item() for part in begins.split(64)[:-1]]
    return sum(parts) / len(parts)


def table_of_losses(steps: int, seeds: int) -> str:
    """The loss of each recipe, and how far it is from float32's."""
    found = {
        name: [loss_after(kept, seed, steps) for seed in range(seeds)]
        for name, kept in RECIPES.items()
    }
    middle = {name: sum(losses) / seeds for name, losses in found.items()}
    rows = [
        [
            name,
            ", ".join(f"{loss:.4f}" for loss in losses),
            f"{middle[name]:.4f}",
            f"{100 * (middle[name] / middle[FIRST] - 1):+.2f} %",
        ]
        for name, losses in found.items()
    ]
    header = ["kept as", f"loss with {seeds} seeds", "mean", "to float32"]
    return show(f"A small GPT after {steps} steps", header, rows)


def main(
    tree: tuple[TreeName, ...] = ("gpt10", "resnet34"),
    rounds: int = 60,
    steps: int = 300,
    seeds: int = 3,
    save_results: bool = False,
) -> None:
    """Measure, and print tables.

    Args:
        tree: Whose parameters are stepped.
        rounds: Interleaved turns; the least time counts.
        steps: Steps of the GPT.
        seeds: As many runs of it, each with its own first weights and batches.
        save_results: Write them to results/.
    """
    parts = [table_of_steps(name, rounds) for name in tree]
    parts.append(table_of_losses(steps, seeds))
    parts.append(say("The machine was shared with other work while this was measured."))
    if save_results:
        save("low-precision", "\n".join(parts))


if __name__ == "__main__":
    tyro.cli(main)
