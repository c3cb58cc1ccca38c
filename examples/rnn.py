"""A recurrent network that writes Python, character by character, after reading Python's library.

Its memory goes on from batch to batch, in buffers; ModelResetter clears it where the text does not
go on, and RNNRegularizer keeps its activations small and slow.
"""

from pathlib import Path

import torch
import tyro
from library_text import Characters, library_text, streams
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from functional_sgd import adamw, apply
from loop import (
    DataLoaders,
    Learner,
    ModelResetter,
    Progress,
    RNNRegularizer,
    State,
    accuracy,
    fit_one_cycle,
    plot_losses,
)

CHARACTERS = Characters()
COUNT = len(CHARACTERS.alphabet)


class Writer(nn.Module):
    """An LSTM: scores (N, time, characters), and what it computes before and after dropout."""

    hidden: Tensor
    cell: Tensor

    def __init__(self, batch_size: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(COUNT, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, COUNT)
        self.register_buffer("hidden", torch.zeros(1, batch_size, width))
        self.register_buffer("cell", torch.zeros(1, batch_size, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raw, (hidden, cell) = self.lstm(self.embed(x), (self.hidden, self.cell))
        self.hidden, self.cell = hidden.detach(), cell.detach()
        dropped = self.drop(raw)
        return self.head(dropped), raw, dropped

    def reset(self) -> None:
        """Forget what was read."""
        self.hidden.zero_()
        self.cell.zero_()


def loss(pred: Tensor, target: Tensor) -> Tensor:
    """Of every character."""
    return nn.functional.cross_entropy(pred.flatten(0, 1), target.flatten())


@torch.no_grad()
def write(learner: Learner, state: State, begin: str, length: int) -> str:
    """What the model goes on with."""
    numbers, text = CHARACTERS.encode(begin)[None].to(state.params["head.weight"].device), begin
    buffers = {name: value[:, :1].clone() for name, value in state.buffers.items()}
    learner.model.eval()
    for _ in range(length):
        (pred, _, _), buffers = apply(learner.model, state.params, buffers, numbers)
        numbers = torch.multinomial((pred[:, -1] / 0.5).softmax(-1), 1)
        text += CHARACTERS.decode(numbers[0])
    return text


def main(
    length: int = 400_000,
    epochs: int = 3,
    width: int = 128,
    seed: int = 0,
    device: str = "cpu",
    pictures: Path = Path("pictures"),
    short: bool = False,
) -> None:
    """Train with and without the two callbacks, let the model write, and save a picture.

    Args:
        length: How many characters of the library are read.
        epochs: Passes over them.
        width: Numbers in the memory of the model.
        seed: Decides first weights, dropout and what is written.
        device: Where to train.
        pictures: The folder for the picture.
        short: --length 150000 --epochs 1 --width 64.
    """
    if short:
        length, epochs, width = 150_000, 1, 64
    numbers, held_out = CHARACTERS.encode(library_text(length)), length // 10
    train, valid = streams(numbers[held_out:], 32, 50), streams(numbers[:held_out], 32, 50)
    data = DataLoaders(train, valid)
    table = Table("callbacks", "loss", "accuracy")
    for regularize in (RNNRegularizer(0.0, 0.0), RNNRegularizer(2.0, 1.0)):
        torch.manual_seed(seed)
        callbacks = [ModelResetter(), regularize, Progress()]
        learner = Learner(Writer(32, width), data, loss, adamw(), [accuracy], callbacks)
        end = fit_one_cycle(learner, learner.init(seed, device), epochs, lr=1e-2)
        row = end.history.rows[-1]
        table.add_row(repr(regularize), f"{row['valid_loss']:.3f}", f"{row['accuracy']:.3f}")
    Console().print(table)
    print(write(learner, end, "def ", 300))
    pictures.mkdir(parents=True, exist_ok=True)
    plot_losses(end.history).savefig(pictures / "rnn.png", dpi=120)
    print(f"saved {pictures}/rnn.png")


if __name__ == "__main__":
    tyro.cli(main)
