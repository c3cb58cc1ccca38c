"""A state that was saved and loaded is the same state, in this process or another; and the files
are as promised.
"""

import dataclasses
import errno
import json
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loop import History, Learner, State, StateFileError, fit, load, save
from loop.disk.files import NOT_SAVED
from loop.disk.weights import write_tensors
from loop.history import Log
from tests.comparing import Untouched
from tests.loop.helpers import Kept, assert_at_rest, batches, full, learned, learner, on
from tests.loop.saving import busy, identical, in_process, tiny


@pytest.fixture(scope="module")
def trained() -> tuple[Learner, State]:
    mine = busy()
    return mine, fit(mine, mine.init(seed=5), 2)


# There and back


def test_a_trained_state_comes_back_bit_for_bit(
    tmp_path: Path, trained: tuple[Learner, State]
) -> None:
    mine, end = trained
    assert identical(load(save(end, tmp_path / "a")), end)
    assert identical(load(tmp_path / "a", mine.init()), end)


def test_training_goes_on_bit_for_bit_in_a_new_process(
    tmp_path: Path, trained: tuple[Learner, State]
) -> None:
    mine, end = trained
    in_process("go_on", save(end, tmp_path / "a"), tmp_path / "b")
    assert identical(load(tmp_path / "b"), fit(mine, end, 2))


def test_a_state_within_a_batch_is_saved_at_rest(tmp_path: Path) -> None:
    seen: list[State] = []
    mine = learner(callbacks=[on(after_loss=seen.append)])
    fit(mine, mine.init(), 1)
    found = load(save(seen[1], tmp_path / "a"))
    assert_at_rest(found)
    assert not any(value.requires_grad for value in found.params.values())
    assert identical(found, seen[1].at_rest())


def test_saving_leaves_the_state_as_it_was(tmp_path: Path, trained: tuple[Learner, State]) -> None:
    kept = Kept(trained[1])
    save(trained[1], tmp_path / "a")
    kept.check()


def test_every_field_of_a_state_is_saved_or_named_as_not_saved(tmp_path: Path) -> None:
    document = json.loads((save(tiny(), tmp_path / "a") / "state.json").read_text())
    assert {*document["fields"]} | NOT_SAVED == {entry.name for entry in dataclasses.fields(State)}
    assert not document["fields"].keys() & NOT_SAVED


def test_what_is_loaded_shares_no_memory(tmp_path: Path) -> None:
    """Nor with each other, nor with the file: it may be written to, and removed."""
    flat = torch.arange(6.0)
    state = State(
        {"a": flat[:3], "b": flat[3:], "tied": flat[:3]},
        {},
        {"c": torch.ones(2, dtype=torch.cfloat)},
        {},
    )
    first = load(save(state, tmp_path / "a"))
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    before = Untouched(state.params)
    tensors = [*first.params.values(), *first.opt_state.values()]
    assert len({value.untyped_storage().data_ptr() for value in tensors}) == 4
    for value in tensors:
        value.zero_()
    before.check()
    assert identical(load(tmp_path / "a"), state)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0)[::3],
        torch.ones(1).expand(5),
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
        torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        torch.empty(0, 3),
        torch.tensor(7),
    ],
    ids=["transposed", "strided", "expanded", "conjugated", "negated", "empty", "0-d"],
)
def test_tensors_of_every_layout(tmp_path: Path, tensor: torch.Tensor) -> None:
    found = load(save(tiny(memory={"x": tensor, "again": tensor}), tmp_path / "a")).memory
    assert torch.equal(found["x"], tensor)
    assert torch.equal(found["again"], tensor)
    assert found["x"].is_contiguous()


def test_a_long_log_is_saved_in_less_than_a_second(tmp_path: Path) -> None:
    losses = Log([torch.tensor(float(count)) for count in range(100_000)])
    rates = Log([count / 7 for count in range(100_000)])
    state = tiny(history=History(losses, {"lr": rates}))
    started = time.process_time()
    save(state, tmp_path / "a")
    assert time.process_time() - started < 1
    found = load(tmp_path / "a").history
    assert found == state.history
    assert identical(found.losses[-1], losses[-1])


# What is on the disk


def test_three_files_that_other_tools_read(tmp_path: Path, trained: tuple[Learner, State]) -> None:
    end = trained[1]
    path = save(end, tmp_path / "deep" / "folder" / "a")
    assert path == tmp_path / "deep" / "folder" / "a"
    assert sorted(file.name for file in path.iterdir()) == [
        "SHA256SUMS",
        "state.json",
        "tensors.safetensors",
    ]
    assert (
        subprocess.run(
            ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=path
        ).returncode
        == 0
    )
    tensors = load_file(path / "tensors.safetensors")
    assert identical(tensors["params['0.weight']"], end.params["0.weight"].clone())
    document = json.loads((path / "state.json").read_text())
    assert (document["format"], document["version"]) == ("loop.State", 2)
    assert tensors.keys() == document["tensors"].keys()
    entry = document["tensors"]["opt_state['step']"]
    assert (entry["dtype"], entry["shape"], entry["device"], len(entry["sha256"])) == (
        "int64",
        [6],
        "cpu",
        64,
    )


def test_all_three_files_may_be_read_by_whom_the_folder_lets(tmp_path: Path) -> None:
    path = save(tiny(), tmp_path / "a")
    (tmp_path / "plain").touch()
    assert {file.stat().st_mode for file in path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_everything_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, log = tmp_path / "a", []
    fsync, rename = os.fsync, Path.rename

    def logged_fsync(handle: int) -> None:
        log.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def logged_rename(self: Path, target: Path) -> Path:
        result = rename(self, target)
        log.append(f"-> {target.name}")
        return result

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    save(tiny(), path)
    files, (directory, *rest) = log[:3], log[3:]
    assert sorted(files) == ["SHA256SUMS", "state.json", "tensors.safetensors"]
    assert directory.startswith(".saving-")
    assert rest[:2] == ["-> a", tmp_path.name]
    log.clear()
    save(tiny(), path, overwrite=True)
    assert log[4:8] == ["-> .a.replaced", tmp_path.name, "-> a", tmp_path.name]


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"save: memory\['x'\]\[0\] is of type set, which cannot be saved"
    ):
        save(tiny(memory={"x": [{1}]}), tmp_path / "deep" / "a")
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loop.disk.files.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tiny(), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# Devices and other models


def test_tensors_go_where_those_of_like_are(tmp_path: Path, trained: tuple[Learner, State]) -> None:
    """The device meta stands for another one: it has shapes only, but it is not the CPU."""
    mine, end = trained
    fresh = mine.init(device="meta")
    found = load(save(end, tmp_path / "a"), fresh)
    assert {
        value.device.type for group in (found.params, found.buffers) for value in group.values()
    } == {"meta"}
    assert (
        found.history.losses[0].device.type
        == found.memory["recorder"].average.device.type
        == "meta"
    )
    assert load(tmp_path / "a").params["0.bias"].device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_state_of_another_device(tmp_path: Path) -> None:
    mine = full()
    there = fit(mine, mine.init(device="cuda"), 1).remember(
        "kept", {"there": torch.ones(1).cuda(), "here": torch.ones(1)}
    )
    save(there, tmp_path / "a")
    for device in ("cpu", "cuda"):
        found = load(tmp_path / "a", mine.init(device=device))
        assert identical(load(save(found, tmp_path / device)), load(tmp_path / "a"))
        tensors = [
            *found.params.values(),
            *found.buffers.values(),
            *found.history.losses,
            found.memory["kept"]["there"],
        ]
        assert {value.device.type for value in tensors} == {device}
        assert found.memory["kept"]["here"].device.type == "cpu"
    assert identical(
        learned(fit(mine, load(tmp_path / "a", mine.init(device="cuda")), 1)),
        learned(fit(mine, there, 1)),
    )


FRESH = tiny().replace(
    buffers={"seen": torch.tensor(0)},
    opt_state={"step": torch.tensor(0), "avg": {"w": torch.zeros(3)}, "n": (1, [2.0])},
)

SLOTS = FRESH.opt_state

OTHERS = {
    "shape": (
        {"params": {"w": torch.zeros(4)}},
        r"expected params\['w'\] to be float32\[4\], got float32\[3\]",
    ),
    "dtype": (
        {"params": {"w": torch.zeros(3).half()}},
        r"expected params\['w'\] to be float16\[3\], got float32\[3\]",
    ),
    "missing": ({"params": {**FRESH.params, "b": torch.zeros(1)}}, r"params\['b'\] is missing"),
    "too many": ({"buffers": {}}, r"buffers\['seen'\] is not expected"),
    "slot": (
        {"opt_state": {**SLOTS, "avg": {"v": torch.zeros(3)}}},
        r"opt_state\['avg'\]\['v'\] is missing",
    ),
    "tuple": (
        {"opt_state": {**SLOTS, "n": (1,)}},
        r"opt_state\['n'\] to be tuple of 1, got tuple of 2",
    ),
    "list": (
        {"opt_state": {**SLOTS, "n": (1, (2.0,))}},
        r"opt_state\['n'\]\[1\] to be tuple of 1, got list of 1",
    ),
    "number": (
        {"opt_state": {**SLOTS, "n": (1, [2])}},
        r"opt_state\['n'\]\[1\]\[0\] to be int, got float",
    ),
    "leaf": (
        {"opt_state": {**SLOTS, "avg": torch.zeros(1)}},
        r"opt_state\['avg'\] to be float32\[1\], got dict",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_state_of_another_model_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    changes, message = OTHERS[kind]
    path = save(FRESH, tmp_path / "a")
    with pytest.raises(
        StateFileError, match=f"{path} is of another model or optimizer: .*{message}"
    ):
        load(path, FRESH.replace(**changes))


def test_a_state_of_the_same_model_with_other_numbers_is_taken(tmp_path: Path) -> None:
    other = FRESH.replace(opt_state={**SLOTS, "n": (5, [6.0])}, hyper={"mom": 0.5}, seed=3)
    assert identical(load(save(FRESH, tmp_path / "a"), other), FRESH)


def test_another_learner_is_refused(tmp_path: Path) -> None:
    mine, wide = learner(), learner(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    path = save(fit(mine, mine.init(), 1), tmp_path / "a")
    with pytest.raises(StateFileError, match=r"params\['0.weight'\] is missing"):
        load(path, wide.init())


def test_batches_are_no_part_of_a_state(tmp_path: Path) -> None:
    (x, y), *_ = batches(1, seed=0)
    found = load(
        save(
            tiny().replace(xb=(x,), yb=(y,), pred=x, loss=x.sum(), grads={"w": None}),
            tmp_path / "a",
        )
    )
    assert identical(found, tiny())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0)[::5][1:],
        torch.arange(6.0).reshape(2, 3)[1:, 1:2],
        torch.ones(4)[::2][:0],
        torch.ones(3, 2)[:, 1:][:1].to(torch.complex64),
        torch.ones(1).expand(1),
        torch.as_strided(torch.ones(8), (1, 1), (5, 3)),
    ],
    ids=lambda tensor: f"{list(tensor.shape)} with the strides {tensor.stride()}",
)
def test_tensors_of_few_elements_with_any_stride_come_back(tensor: Tensor, tmp_path: Path) -> None:
    """torch calls them contiguous."""
    state = tiny().replace(buffers={"b": tensor})
    found = load(save(state, tmp_path / "a")).buffers["b"]
    assert found.tolist() == tensor.tolist()
    write_tensors(tmp_path / "b", {"b": tensor.real if tensor.is_complex() else tensor}, {})


def test_a_tensor_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensor: Tensor) -> Tensor:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr("loop.disk.files.plainly", fail)
    with pytest.raises(TypeError, match=r"save: params\['w'\], float32\[3\], cannot be .*CUDA"):
        save(tiny(), tmp_path / "a")


def test_a_full_disk_is_told_with_its_number_and_the_path(tmp_path: Path) -> None:
    with limited(1_000), pytest.raises(OSError) as caught:  # noqa: PT011
        save(tiny().replace(params={"w": torch.ones(10_000)}), tmp_path / "a")
    assert caught.value.errno == errno.EFBIG
    assert str(caught.value.filename).endswith("tensors.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_says_what_it_was_written_with(tmp_path: Path) -> None:
    document = json.loads((save(tiny(), tmp_path / "a") / "state.json").read_text())
    assert (document["torch"], document["threads"]) == (str(torch.__version__), 1)


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
