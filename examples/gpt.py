"""A small GPT that learns to write Python from Python's own library: what a language model's
training needs, each a line.

bfloat16, one step for several batches, a warm-up in steps, weight decay chosen by path, samples as
it learns, TensorBoard if it is installed. Kill it and give the same command again: it goes on.
"""

from importlib.util import find_spec
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
import tyro
from gpt_model import GPT, next_token_loss
from gpt_parts import CHARACTERS, Sample, WarmUp
from gpt_speed import speeds
from library_text import library_text, windows

from functional_sgd import adamw, by_path, scheduled
from loop import (
    Checkpoint,
    GradientAccumulation,
    Learner,
    MixedPrecision,
    Progress,
    TensorBoardLogger,
    fit,
    plot_losses,
)


def main(
    length: int = 2_000_000,
    epochs: int = 3,
    window: int = 128,
    batch_size: int = 16,
    accumulate: int = 4,
    width: int = 192,
    layers: int = 4,
    lr: float = 2e-3,
    bf16: bool = True,
    seed: int = 0,
    device: str = "cpu",
    folder: Path = Path("runs/gpt"),
    pictures: Path = Path("pictures"),
    short: bool = False,
) -> None:
    """Train, or go on training; print samples, and how fast it is; save a picture.

    Args:
        length: How many characters of the library are read.
        epochs: Passes over them.
        window: Characters that the model sees at once.
        batch_size: Windows in a batch.
        accumulate: Batches for a step.
        width: Numbers for each character.
        layers: Blocks, of four heads each.
        lr: The highest learning rate.
        bf16: Compute in bfloat16 where that is safe.
        seed: Decides first weights, orders and samples.
        device: Where to train.
        folder: Where checkpoints are, and TensorBoard's files. Remove it to begin anew.
        pictures: The folder for the picture.
        short: --length 60000 --epochs 1 --window 64 --width 64 --layers 2 --accumulate 2.
    """
    if short:
        length, epochs, window, width, layers, accumulate = 60_000, 1, 64, 64, 2, 2
    torch.manual_seed(seed)
    data = windows(CHARACTERS.encode(library_text(length)), batch_size, window)
    steps = epochs * -(-length_hint(data.train) // accumulate)
    callbacks: list[Any] = [
        GradientAccumulation(batches=accumulate),
        Sample("def "),
        Checkpoint(folder, batches=200),
        Progress(),
    ]
    if bf16:
        callbacks.append(MixedPrecision(torch.bfloat16))
    if find_spec("tensorboard"):
        callbacks.append(TensorBoardLogger(folder / "tensorboard"))
    opt = scheduled(
        adamw(sqr_mom=0.99, wd=0.1), lr=WarmUp(lr, warm=max(steps // 20, 1), steps=steps)
    )
    model = GPT(len(CHARACTERS.alphabet), window, width, 4, layers)
    learner = Learner(model, data, next_token_loss, opt, callbacks=callbacks)

    start = learner.init(seed, device)
    decay = by_path(start.params, {"*norm*": 0.0, "*.bias": 0.0, "*": 0.1})
    end = fit(learner, start, epochs, resume=folder, wd=decay)
    size = sum(value.numel() for value in end.params.values())
    print(f"{size:,} parameters, {steps} steps, loss {end.history.rows[-1]['valid_loss']:.3f}")
    speeds(learner, accumulate, lr, device, bf16)
    pictures.mkdir(parents=True, exist_ok=True)
    plot_losses(end.history).savefig(pictures / "gpt.png", dpi=120)
    print(f"saved {pictures}/gpt.png")


if __name__ == "__main__":
    tyro.cli(main)
