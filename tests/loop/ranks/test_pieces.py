"""States in pieces (FSDP): the numbers of one process, a share of the memory."""

import shutil
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from functional_sgd import sgd
from functional_sgd.fusion import spent
from functional_sgd.sharded import distributed
from loop import (
    Batches,
    Checkpoint,
    DataLoaders,
    Learner,
    MixedPrecision,
    SaveModel,
    differences,
    fit,
    gathering,
    load,
    load_latest,
    parallel,
    predict,
    save,
    save_in,
    shard,
    unshard,
    validate,
)
from loop.disk import store
from loop.disk.store import DamagedStateError
from tests.loop.ranks.learners import numbers
from tests.loop.ranks.runs import StopAt
from tests.loop.ranks.test_two_ranks import check_equal, check_near
from tests.loop.ranks.towers import EACH, started_in_pieces, tower
from tests.ranks import Ranks


def sparing() -> bool:
    """Whether a run that spends its gradients ends with the bits of one that does not."""
    ends, large, spent.LARGE = [], spent.LARGE, 1
    try:
        for donate in (False, "grads"):
            mine, start = started_in_pieces(tower("adamw", "none"), EACH, False)
            ends.append(numbers(unshard(fit(mine, start, 2, donate=donate))))  # type: ignore[arg-type]
    finally:
        spent.LARGE = large
    return all(map(torch.equal, *ends))


def compared() -> str:
    """What is said of states in pieces, and whether they are the same once they are joined."""
    _, start = started_in_pieces(tower("adamw", "none"), EACH, False)
    assert differences(unshard(start), unshard(start)) == {}
    with pytest.raises(TypeError) as caught:
        differences(start, start)
    return str(caught.value)


def test_states_in_pieces_are_compared_when_they_are_joined(ranks: Ranks) -> None:
    assert all("Compare unshard(state)" in said for said in ranks(compared))


def joined(folder: str, callbacks: str) -> tuple[dict[str, str], list[Tensor]]:
    """Where a state that was in pieces differs from itself once it is saved and loaded; and the end
    of the run that goes on from it, cut again.
    """
    mine, start = started_in_pieces(tower("adamw", callbacks), EACH, False)
    stopped = fit(mine, start, 2, [StopAt(2)], stop="return")
    whole = unshard(stopped)
    path = Path(folder) / f"{dist.get_rank()}"
    save(whole, path)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    again = shard(mine, load(path), mesh)
    assert differences(unshard(again), whole) == {}
    end = fit(mine, again, 2, resume=True)
    return differences(load(path), whole), numbers(unshard(end))


@pytest.mark.parametrize("callbacks", ["average", "accumulation"])
def test_what_callbacks_remember_is_joined_and_cut_too(
    ranks: Ranks, tmp_path: Path, callbacks: str
) -> None:
    one = tower("adamw", callbacks)
    end = fit(one, one.init(seed=3), 2)
    for found, after in ranks(joined, str(tmp_path), callbacks):
        assert found == {}
        check_near(after, numbers(end))


def test_pieces_of_gradients_can_be_spent(ranks: Ranks) -> None:
    assert ranks(sparing) == [True, True]


def in_pieces(
    opt: str, callbacks: str, blocks: tuple[str, ...], again: bool, donate: bool
) -> tuple[list[Tensor], dict[str, Any]]:
    mine, start = started_in_pieces(tower(opt, callbacks), blocks, again)
    before = {name: value.to_local().clone() for name, value in start.params.items()}
    end = fit(mine, start, 3, donate=donate)
    facts = {
        "untouched": donate
        or all(torch.equal(before[name], start.params[name].to_local()) for name in before),
        "elements": sum(value.to_local().numel() for value in end.params.values()),
        "placements": all(
            end.params[name].placements == ((Shard(0),) if value.dim() else (Replicate(),))
            for name, value in end.params.items()
        ),
        "slots": all(
            distributed(value)
            for tree in end.opt_state.values()
            if isinstance(tree, dict)
            for value in tree.values()
        ),
        "predictions": predict(mine, end),
        "validated": validate(mine, end),
    }
    return numbers(unshard(end)), facts


@pytest.mark.parametrize(
    ("opt", "callbacks", "blocks", "again", "donate"),
    [
        ("adamw", "none", (), True, False),
        ("adamw", "none", EACH, False, False),
        ("adamw", "none", EACH, True, False),
        ("adamw", "none", EACH, True, True),
        ("adamw", "average", EACH, True, False),
        ("adamw", "accumulation", EACH, True, False),
        ("adamw", "best", EACH, True, True),
        ("lamb", "none", EACH, True, False),
        ("schedule free", "none", EACH, True, False),
    ],
)
def test_pieces_end_where_one_process_ends(
    ranks: Ranks, opt: str, callbacks: str, blocks: tuple[str, ...], again: bool, donate: bool
) -> None:
    one = tower(opt, callbacks)
    end = fit(one, one.init(seed=3), 3)
    (first, facts), (second, _) = ranks(in_pieces, opt, callbacks, blocks, again, donate)
    check_equal([first, second])
    check_near(first, numbers(end))
    total = sum(value.numel() for value in end.params.values())
    assert facts["untouched"]
    assert facts["placements"]
    assert facts["slots"]
    assert facts["elements"] <= total / 2 + 13 * 7 + len(end.params)
    torch.testing.assert_close(facts["predictions"], predict(one, end), rtol=1e-10, atol=1e-10)
    assert facts["validated"] == pytest.approx(validate(one, end), rel=1e-10)


# Checkpoints.


def run_in_pieces(
    folder: str, stop: int | None, callbacks: str = "average", background: bool = False
) -> list[Tensor]:
    mine, start = started_in_pieces(tower("adamw", callbacks), EACH, True)
    keep = Checkpoint(folder, batches=2, background=background)
    more = [keep, *([] if stop is None else [StopAt(stop)])]
    end = fit(mine, start, 3, more, resume=folder, stop="return")
    return numbers(unshard(end))


def run_whole(folder: str, stop: int | None, callbacks: str = "average") -> list[Tensor]:
    mine = parallel(tower("adamw", callbacks))
    keep = Checkpoint(folder, batches=2, background=True)
    more = [keep, *([] if stop is None else [StopAt(stop)])]
    return numbers(fit(mine, mine.init(seed=3), 3, more, resume=folder, stop="return"))


@pytest.mark.parametrize("callbacks", ["average", "accumulation"])
def test_a_run_in_pieces_goes_on_on_any_number_of_ranks(
    ranks: Ranks, three: Ranks, tmp_path: Path, callbacks: str
) -> None:
    one, folder = tower("adamw", callbacks), str(tmp_path / "run")
    end = fit(one, one.init(seed=3), 3)
    ranks(run_in_pieces, folder, 3, callbacks)
    three(run_in_pieces, folder, 5, callbacks, True)
    three(run_whole, folder, 6, callbacks)
    more = [Checkpoint(folder), StopAt(9)]
    stopped = fit(one, one.init(seed=3), 3, more, resume=folder, stop="return")
    assert stopped.train_iter == 9
    every = ranks(run_in_pieces, folder, None, callbacks)
    check_equal(every)
    check_near(every[0], numbers(end))


def saved(folder: str) -> None:
    mine, start = started_in_pieces(tower(), EACH, True)
    fit(mine, start, 1, [Checkpoint(folder)])


def loaded(folder: str) -> list[Tensor]:
    _, start = started_in_pieces(tower(), EACH, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return numbers(unshard(load_latest(folder, start)))


def test_a_checkpoint_in_pieces_can_be_read_whole_or_cut(
    ranks: Ranks, three: Ranks, tmp_path: Path
) -> None:
    ranks(saved, str(tmp_path))
    (directory,) = tmp_path.iterdir()
    names = {path.name for path in directory.iterdir()}
    assert names == {
        *("SHA256SUMS", "state.json", "tensors.safetensors"),
        *("pieces-00000.safetensors", "pieces-00001.safetensors"),
    }
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=directory, check=True)
    whole = numbers(load(directory))
    one = tower()
    check_near(whole, numbers(fit(one, one.init(seed=3), 1)))
    check_equal([whole, *ranks(loaded, str(tmp_path)), *three(loaded, str(tmp_path))])


def test_every_rank_finds_out_that_a_piece_is_damaged(ranks: Ranks, tmp_path: Path) -> None:
    for _ in range(2):
        ranks(saved, str(tmp_path))
    older, newer = sorted(tmp_path.iterdir())
    whole = numbers(load(older))
    for name in ("pieces-00000.safetensors", "pieces-00001.safetensors", "state.json"):
        path = newer / name
        content = path.read_bytes()
        for place in range(0, len(content), len(content) // 5):
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 8
            path.write_bytes(bytes(flipped))
            check_equal([whole, *ranks(loaded, str(tmp_path))])
            with pytest.raises(DamagedStateError):
                load(newer)
        path.write_bytes(content)
    (newer / "pieces-00001.safetensors").unlink()
    check_equal([whole, *ranks(loaded, str(tmp_path))])


def loaded_while_removed(folder: str) -> int:
    """Rank 1 comes to the newest checkpoint when rank 0 has read it and it is gone."""
    _, start = started_in_pieces(tower(), EACH, True)
    read, turns = store.load, iter([True])

    def load_in_turn(path: Path, like: Any) -> Any:
        first = next(turns, False)
        if first and dist.get_rank() == 1:
            dist.barrier()
            shutil.rmtree(path)
        state = read(path, like)
        if first:
            dist.barrier()
        return state

    with patch.object(store, "load", load_in_turn):
        return load_latest(folder, start).train_iter


def test_ranks_agree_that_a_checkpoint_is_gone(ranks: Ranks, tmp_path: Path) -> None:
    ranks(saved, str(tmp_path))
    mine = tower()
    newer = save_in(fit(mine, mine.init(), 2), tmp_path)
    assert newer.name == "000002-train_iter-00000008"
    assert ranks(loaded_while_removed, str(tmp_path)) == [4, 4]


def refused(folder: str) -> list[str]:
    mine, start = started_in_pieces(tower(), EACH, True)
    said = []
    for call in (
        lambda: save(start, Path(folder) / "state"),
        lambda: fit(mine, start, 1, compile=True),
        lambda: fit(mine, start, 1, [Checkpoint(folder, seconds=1.0)]),
        lambda: fit(replace(tower(), model=gathering(tower().model, EACH)), start, 1),
        lambda: mine.load(start),
    ):
        try:
            call()
        except (TypeError, ValueError) as error:
            said.append(str(error))
    return said


def replicated_and_cut() -> list[Tensor]:
    """On a mesh of two dimensions, the first of which replicates."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "cut"))
    one = tower()
    mine = parallel(replace(one, model=gathering(one.model, EACH)))
    end = fit(mine, shard(mine, mine.init(seed=3), mesh), 2)
    assert end.params["table.weight"].placements == (Replicate(), Shard(0))
    return numbers(unshard(end))


def test_meshes_may_have_two_dimensions(ranks: Ranks) -> None:
    one = tower()
    every = ranks(replicated_and_cut)
    check_equal(every)
    check_near(every[0], numbers(fit(one, one.init(seed=3), 2)))


def test_what_cannot_be_done_with_pieces_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    for whole, graph, clock, batches, loading in ranks(refused, str(tmp_path)):
        assert "is in pieces (a DTensor)" in whole
        assert "unshard(state)" in whole
        assert "fit(compile=True): the params are DTensors" in graph
        assert "ranks do not have one clock" in clock
        assert "the params are cut over 2 processes, and batches over 1" in batches
        assert "got 'scale' in pieces (a DTensor). Load unshard(state)" in loading


def among_others() -> str:
    """What is said where batches are cut over as many processes as the params, but not these."""
    mine, start = started_in_pieces(tower(), EACH, True)
    others = replace(mine.data, members=frozenset({dist.get_rank(), 2}))  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="unshard") as caught:
        fit(replace(mine, data=others), start, 1)
    return str(caught.value)


def test_batches_must_be_cut_over_the_very_processes_of_the_params(ranks: Ranks) -> None:
    for said in ranks(among_others):
        assert "are cut over 2 processes, and batches over 2 others" in said
        assert "process 2 has none of 'scale'" in said


def in_float16(bad: float) -> tuple[float, list[int]]:
    """The loss scale after a batch whose gradient has this number in a row of rank 0, and of how
    many elements a rank's pieces are.
    """
    model = torch.nn.Linear(2, 1)
    x = torch.tensor([[1.0, bad]] * 4)
    data = DataLoaders(Batches((x, x[:, :1]), 4))
    half = MixedPrecision(torch.float16, init_scale=8.0)
    mine = Learner(gathering(model), data, torch.nn.functional.mse_loss, sgd(lr=0.1), (), [half])
    mine = parallel(mine)
    start = shard(mine, mine.init(), init_device_mesh("cpu", (dist.get_world_size(),)))
    end = fit(mine, start, 1)
    sizes = [value.to_local().numel() for value in start.params.values()]
    return end.memory["mixed_precision"]["scale"].item(), sizes


def test_a_rank_without_a_piece_looks_for_what_is_not_finite_with_the_others(ranks: Ranks) -> None:
    assert ranks(in_float16, 1.0) == [(8.0, [2, 1]), (8.0, [0, 0])]
    assert ranks(in_float16, torch.inf) == [(4.0, [2, 1]), (4.0, [0, 0])]


def written(folder: str) -> str:
    """What is said of a SaveModel that is to write pieces."""
    mine, start = started_in_pieces(tower(), EACH, True)
    with pytest.raises(ValueError, match="SaveModel: expected whole params") as caught:
        fit(mine, start, 1, [SaveModel(Path(folder) / "best.safetensors")])
    return str(caught.value)


def test_a_save_model_with_a_path_is_refused_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    for said in ranks(written, str(tmp_path)):
        assert "best.safetensors'. Use SaveModel(None)" in said
        assert "save(unshard(end), path)" in said
