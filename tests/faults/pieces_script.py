"""Saving in pieces, by ranks that are killed: `python -m tests.faults.pieces_script NAME ARGS...`
prints what became of it.
"""

import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import loop.disk.atomic
import loop.disk.files
import loop.disk.pieces
import loop.disk.store
import loop.ranks.checkpoint
from loop import State, load_latest, unshard
from loop.disk.store import checkpoints
from loop.layout import in_rows
from loop.ranks.checkpoint import saving_together
from loop.ranks.group import group_of
from tests.faults.groups import Group, Say, main, told
from tests.loop.saving import identical, killed_before_line, scratch_in


def numbered(count: int) -> State:
    """A state that can be told from others in every element, of tensors that two ranks cannot
    share evenly.
    """
    rows = torch.arange(30_001.0)[:, None] * torch.ones(3) + count
    params = {"rows": rows, "few": torch.full((1, 5), float(count)), "one": torch.tensor(count / 3)}
    slots = {name: value.double() / 7 for name, value in params.items()}
    return State(
        params,
        {"seen": torch.tensor(count)},
        {"mu": slots, "count": torch.tensor(count)},
        {"lr": 0.1 * count},
        train_iter=count,
        memory={"average": {name: value * 2 for name, value in params.items()}},
    )


def in_pieces(state: State, mesh: Any) -> State:
    """Params, slots and averages in rows."""

    def cut(tree: Any) -> dict[str, Tensor]:
        return {name: in_rows(value, mesh) for name, value in tree.items()}

    return state.replace(
        params=cut(state.params),
        opt_state={**state.opt_state, "mu": cut(state.opt_state["mu"])},
        memory={"average": cut(state.memory["average"])},
    )


def same(found: State, count: int) -> bool:
    """Whether this is the state of that number, bit for bit."""
    expected = numbered(count)
    return all(
        identical(getattr(found, name), getattr(expected, name))
        for name in ("params", "buffers", "opt_state", "hyper", "train_iter", "memory")
    )


def loaded(folder: Path, say: Say, mesh: Any) -> int:
    """Load what is there, and say which it is, and whether it is whole."""
    if not checkpoints(folder):
        say("loaded 0 True")
        return 0
    found = load_latest(folder, in_pieces(numbered(0), mesh))
    say(f"loaded {found.train_iter} {same(unshard(found), found.train_iter)}")
    return found.train_iter


def save_on(folder: Path, say: Say, times: int) -> None:
    """Load what is there, and save one state after the other."""
    mesh, group = init_device_mesh("cpu", (dist.get_world_size(),)), group_of("test", None)
    last = loaded(folder, say, mesh)
    for count in range(last + 1, last + 1 + times):
        saving_together(in_pieces(numbered(count), mesh), folder, 2, group)()
        say(f"saved {count}")


def pieces(name: str, kills: str) -> dict[str, Any]:
    """Kill a rank that saves in pieces, or both, at a random moment; what is the newest is whole,
    for two ranks and for one process, and none that was saved is lost.
    """
    folder, chance, last, within = Path(name), random.Random(6), 0, 0
    wrong, ends = [], Counter[str]()

    def check(group: Group) -> None:
        said = {group.wait_for(rank, "loaded") for rank in range(2)}
        if said != {f"loaded {last} True"}:
            wrong.append(f"the ranks have {said}, expected {last}")

    for kill in range(int(kills)):
        group = Group(2, lambda rank, say: save_on(folder, say, 100_000))
        check(group)
        group.wait_for(0, "saved")
        victims = chance.choice([[0], [1], [0, 1], [1, 0]])
        time.sleep(chance.random() * 0.1)
        for victim in victims:
            group.kill(victim)
        ends.update(map(told, group.end()))
        saved = max(int(line.split()[1]) for lines in group.lines for line in lines)
        found = load_latest(folder)
        last = found.train_iter
        if last not in (saved, saved + 1) or not same(found, last):
            wrong.append(f"kill {kill} of {victims}: {saved} was saved, {last} is there")
        within += bool(scratch_in(folder))
    group = Group(2, lambda rank, say: save_on(folder, say, 1))
    check(group)
    ends.update(map(told, group.end()))
    return {
        "wrong": wrong,
        "ends": ends,
        "within a save": within,
        "saved": last,
        "left": scratch_in(folder),
    }


FILES = {
    module.__file__
    for module in (
        loop.disk.atomic,
        loop.disk.files,
        loop.disk.pieces,
        loop.disk.store,
        loop.ranks.checkpoint,
    )
}


def lines(name: str, every: str) -> dict[str, Any]:
    """Kill one of two ranks before a line that it runs while state 2 is saved: every line, or every
    so many; which state is there then?
    """
    wrong, found, ends, kills = [], [], Counter[str](), 0
    for victim in range(2):
        line, over = 1 + victim, False
        while not over:
            folder = Path(name) / f"{victim}-{line}"

            def work(rank: int, say: Say, line: int = line, folder: Path = folder) -> None:
                mesh, group = init_device_mesh("cpu", (2,)), group_of("test", None)
                saving_together(in_pieces(numbered(1), mesh), folder, 2, group)()
                state = in_pieces(numbered(2), mesh)
                if rank == victim:  # noqa: B023
                    sys.settrace(killed_before_line(FILES, line))
                saving_together(state, folder, 2, group)()

            codes = Group(2, work).end()
            ends.update(map(told, codes))
            over = codes[victim] == 0
            kills += not over
            alone = load_latest(folder)
            found.append(alone.train_iter)
            group = Group(2, lambda rank, say, folder=folder: save_on(folder, say, 1))
            ends.update(map(told, group.end()))
            if {said for said, *_ in group.lines} != {f"loaded {found[-1]} True"}:
                wrong.append(f"rank {victim} before line {line}: {group.lines}")
            if not same(alone, found[-1]) or scratch_in(folder):
                wrong.append(f"rank {victim} before line {line}: {found[-1]}, {scratch_in(folder)}")
            line += int(every)
    return {"kills": kills, "wrong": wrong, "found": sorted(set(found)), "ends": ends}


if __name__ == "__main__":
    main(globals())
