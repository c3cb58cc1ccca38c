"""A small GPT of which every process holds a share: params, slots and checkpoints in pieces.

torchrun --nproc-per-node 2 examples/shards.py
"""

from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from gpt_model import GPT, next_token_loss
from library_text import Characters, library_text, windows
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from functional_sgd import adamw, chain, clip_norm
from loop import (
    Checkpoint,
    Learner,
    Progress,
    State,
    fit,
    gathering,
    parallel,
    shard,
    unshard,
    validate,
)


def elements(state: State) -> int:
    """How many elements of params this process has."""
    pieces = [value.to_local() for value in state.params.values() if isinstance(value, DTensor)]
    return sum(piece.numel() for piece in pieces)


def main(
    epochs: int = 2,
    characters: int = 40_000,
    width: int = 64,
    layers: int = 2,
    lr: float = 3e-3,
    seed: int = 0,
    device: str | None = None,
    folder: Path = Path("shards"),
) -> None:
    """Train in pieces, go on from the checkpoint, and write a sample.

    Args:
        epochs: Passes over the text.
        characters: How much of Python's library is read.
        width: Of the model; `layers` blocks.
        layers: Each of them is gathered when it runs, and dropped after it.
        lr: Learning rate.
        seed: Decides the first weights and the order of the data.
        device: Such as cuda; by default a GPU for each process where there are any, else the CPU.
        folder: Where checkpoints go; the same command goes on from there, on any number of ranks.
    """
    cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
    dist.init_process_group("nccl" if cuda else "gloo")
    place = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if cuda else "cpu"
    mesh = init_device_mesh("cuda" if cuda else "cpu", (dist.get_world_size(),))

    text = Characters()
    data = windows(text.encode(library_text(characters)), 32, 64)
    torch.manual_seed(seed)
    model = GPT(len(text.alphabet), 64, width, 4, layers)
    blocks = [f"blocks.{index}" for index in range(layers)]
    opt = chain(clip_norm, adamw(lr=lr), max_norm=1.0)
    learner = parallel(Learner(gathering(model, blocks), data, next_token_loss, opt))

    start = shard(learner, learner.init(seed, place), mesh)
    end = fit(learner, start, epochs, [Progress(), Checkpoint(folder)], resume=folder, donate=True)
    loss = validate(learner, end)["valid_loss"]
    share = [0] * dist.get_world_size()
    dist.all_gather_object(share, elements(end))
    whole = unshard(end)
    if dist.get_rank() == 0:
        total = sum(value.numel() for value in whole.params.values())
        print(f"valid_loss {loss:.3f}; of {total:,} params, the ranks hold {share}")
    dist.destroy_process_group()


if __name__ == "__main__":
    tyro.cli(main)
