"""What one rank cannot write, all ranks are told of: nobody waits for it."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist
from safetensors import SafetensorError

import loop.callbacks.checkpoint
import loop.ranks.checkpoint
from loop import Checkpoint, fit
from tests.loop.ranks.runs import started_as
from tests.ranks import Ranks

FAILURES = {
    "scratch": OSError(28, "No space left on device"),
    "write_pieces": SafetensorError("a header of another size"),
    "as_stored": TypeError("no such dtype"),
    "write": ValueError("state.json would have too many bytes"),
    "probe": OSError(30, "Read-only file system"),
}


def failing(folder: str, kind: str, what: str, rank: int) -> tuple[str, str]:
    """What the ranks raise where one of them fails."""
    mine, start = started_as(kind)
    where = loop.callbacks.checkpoint if kind == "whole" else loop.ranks.checkpoint
    error = FAILURES[what] if dist.get_rank() == rank else None
    with patch.object(
        where, what, side_effect=error, wraps=None if error else getattr(where, what)
    ):
        try:
            fit(mine, start, 1, [Checkpoint(folder)])
        except Exception as raised:
            return type(raised).__name__, str(raised)
    return "", ""


@pytest.mark.parametrize(
    ("kind", "what", "rank"),
    [
        ("pieces", "scratch", 0),
        ("pieces", "write_pieces", 1),
        ("pieces", "as_stored", 1),
        ("pieces", "write", 0),
        ("pieces", "probe", 0),
        ("pieces", "probe", 1),
        ("whole", "probe", 0),
    ],
)
def test_what_fails_on_one_rank_is_an_error_on_all(
    ranks: Ranks, tmp_path: Path, kind: str, what: str, rank: int
) -> None:
    found = ranks(failing, str(tmp_path / "run"), kind, what, rank)
    error = FAILURES[what]
    assert found[rank] == (type(error).__name__, str(error))
    told = f"Checkpoint: rank {rank} could not write its part: {type(error).__name__}: {error}"
    assert found[1 - rank] == ("OSError", told)
