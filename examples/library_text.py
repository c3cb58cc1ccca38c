"""Text that every machine with Python has: the sources of its own library, as numbers."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loop import Batches, DataLoaders

FOLDER = Path(sysconfig.get_path("stdlib"))
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # what is not in here is left out


@dataclass(frozen=True)
class Characters:
    """A number for each character of the alphabet."""

    alphabet: str = ALPHABET

    def encode(self, text: str) -> Tensor:
        """The numbers of a text; int64."""
        index = {character: number for number, character in enumerate(self.alphabet)}
        return torch.tensor([index[character] for character in text if character in index])

    def decode(self, numbers: Tensor) -> str:
        """The text of such numbers."""
        return "".join(self.alphabet[number] for number in numbers.tolist())


def library_text(length: int) -> str:
    """So many characters of the library's sources, file by file in alphabetical order."""
    parts, rest = [], length
    for path in sorted(FOLDER.glob("[a-z]*.py")):
        if rest <= 0:
            break
        parts.append(path.read_text(encoding="utf-8", errors="ignore")[:rest])
        rest -= len(parts[-1])
    return "".join(parts)


def streams(numbers: Tensor, batch_size: int, window: int) -> list[tuple[Tensor, Tensor]]:
    """The text as `batch_size` texts that are read side by side: batch k + 1 goes on where batch k
    ends. Inputs (batch_size, window), and the same one character later.
    """
    each = (len(numbers) - 1) // batch_size
    x, y = (numbers[at : at + each * batch_size].view(batch_size, each) for at in (0, 1))
    starts = range(0, each - window + 1, window)
    return [(x[:, at : at + window], y[:, at : at + window]) for at in starts]


def windows(numbers: Tensor, batch_size: int, window: int) -> DataLoaders:
    """Pieces of the text in any order, the last tenth to validate on: (N, window), and the same one
    character later.
    """
    count = (len(numbers) - 1) // window
    x, y = (numbers[at : at + count * window].view(count, window) for at in (0, 1))
    kept = count - max(count // 10, 1)
    return DataLoaders(
        Batches((x[:kept], y[:kept]), batch_size, shuffle=True, drop_last=True),
        Batches((x[kept:], y[kept:]), 2 * batch_size),
    )
