"""Runs on several ranks that are killed: `python -m tests.faults.rank_script NAME ARGS...` prints
what became of it.
"""

import hashlib
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor

from loop import Checkpoint, Learner, State, fit, load, load_latest, parallel, unshard
from loop.disk.store import checkpoints
from tests.faults.groups import Group, Say, main, told
from tests.loop.ranks.learners import learner, loaders, numbers
from tests.loop.ranks.towers import EACH, started_in_pieces, tower
from tests.loop.saving import bits, identical


class Seen:
    """Writes down which samples a rank has in each training batch. A line that is written stays,
    whatever becomes of the process.
    """

    def __init__(self, say: Say) -> None:
        self.say = say

    def before_batch(self, state: State) -> None:
        assert state.xb is not None
        if state.training:
            rows = [hashlib.sha256(bits(row)).hexdigest()[:12] for row in state.xb[0]]
            self.say(f"batch {state.train_iter} {' '.join(rows)}")


class Send:
    """A signal for this process, at an event of a training batch, so many times. No Callback, so
    resume does not ask.
    """

    def __init__(self, batch: int, event: str, number: int = signal.SIGKILL, times: int = 1):
        self.batch, self.number, self.times = batch, number, times
        self.always = event == "committed"
        setattr(self, event, self._look)

    def _look(self, state: State) -> None:
        if state.train_iter >= self.batch and (state.training or self.always):
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


EVENTS = ["before_batch", "after_pred", "after_loss", "after_backward", "after_step", "committed"]

RUNS: dict[str, Callable[[], Learner]] = {
    "whole": learner,
    "fetched": lambda: learner(data=loaders()),
    "pieces": lambda: tower("adamw", "average"),
}


def train(kind: str, folder: Path | None, callbacks: Sequence[Any] = ()) -> list[Tensor]:
    """What each rank does, and does again after a kill: on any number of ranks, from where the
    folder says. The numbers at the end.
    """
    if kind == "pieces":
        mine, start = started_in_pieces(RUNS[kind](), EACH, True)
    else:
        mine = parallel(RUNS[kind]())
        start = mine.init(seed=3)
    if folder is None:
        return numbers(unshard(fit(mine, start, 3, callbacks)))
    keep = Checkpoint(folder, batches=2)
    return numbers(unshard(fit(mine, start, 3, [keep, *callbacks], resume=folder)))


def leg(kind: str, folder: Path, world: int, signals: Mapping[int, Send]) -> Group:
    """Some ranks go on with a run; some of them get a signal."""

    def work(rank: int, say: Say) -> None:
        mine = [signals[rank]] if rank in signals else []
        end = train(kind, folder / "run", [Seen(say), *mine])
        torch.save(end, folder / f"end-{rank}")

    return Group(world, work)


def ends_in(folder: Path, world: int = 2) -> list[list[Tensor]]:
    """The numbers at the end of each rank."""
    return [torch.load(folder / f"end-{rank}") for rank in range(world)]


def batches_of(lines: Iterable[str]) -> dict[int, list[str]]:
    """What a Seen has said: the samples of each batch."""
    words = [line.split()[1:] for line in lines]
    return {int(batch): rows for batch, *rows in words}


def again(name: str, kind: str, rounds: str) -> dict[str, Any]:
    """Kill one of two ranks of a run, at a random moment in the midst of it, and start both again:
    the end is that of a run on two ranks that nobody has disturbed, bit for bit.
    """
    chance, same, went_on, ends = random.Random(f"{kind} 9"), [], 0, Counter[str]()
    folders = [Path(name) / str(number) for number in range(int(rounds) + 1)]
    for folder in folders:
        folder.mkdir()
    undisturbed = leg(kind, folders[0], 2, {})
    assert undisturbed.end() == [0, 0]
    expected, batches = ends_in(folders[0])[0], len(undisturbed.lines[0])
    for folder in folders[1:]:
        group, victim = leg(kind, folder, 2, {}), chance.randrange(2)
        for _ in range(chance.randint(1, batches * 2 // 3)):
            group.hear(victim)
        group.kill(victim)
        ends.update(map(told, group.end()))
        went_on += len(checkpoints(folder / "run")) > 0
        group = leg(kind, folder, 2, {})
        ends.update(map(told, group.end()))
        same += [identical(end, expected) for end in ends_in(folder)]
    return {"same": all(same), "went on": went_on, "ends": ends}


def chain(name: str, kind: str, rounds: str) -> dict[str, Any]:
    """A run on 2, 3, 1 and 2 ranks. One, or all, are killed in a random batch of each leg but the
    last; the samples of every batch, and the end, are those of a process that nobody has disturbed.
    """
    chance, wrong, ends = random.Random(f"{kind} 7"), list[str](), Counter[str]()
    went_on, kills, distance = 0, 0, 0.0
    one, told_of = RUNS[kind](), list[str]()
    expected = numbers(fit(one, one.init(seed=3), 3, [Seen(told_of.append)]))
    order = batches_of(told_of)
    for number in range(int(rounds)):
        folder, seen = Path(name) / str(number), dict[int, list[str]]()
        folder.mkdir()
        for index, world in enumerate((2, 3, 1, 2)):
            what = f"round {number}, leg {index}"
            run = folder / "run"
            begin = load_latest(run).train_iter if checkpoints(run) else 0
            went_on += begin > 0
            ahead = chance.randint(1, len(order) // 4)
            kill = Send(begin + ahead, chance.choice(EVENTS))
            victims = chance.choice([list(range(world)), [chance.randrange(world)]])
            victims = [] if index == 3 else victims
            group = leg(kind, folder, world, dict.fromkeys(victims, kill))
            codes = group.end()
            ends.update(map(told, codes))
            killed = [rank for rank, code in enumerate(codes) if code == -signal.SIGKILL]
            kills += len(killed)
            if killed != victims:
                wrong.append(f"{what}: {codes}, expected kills of {victims} at {vars(kill)}")
            parts = list(map(batches_of, group.lines))
            whole = sorted(set.intersection(*map(set, parts)))
            if whole and whole != list(range(begin, whole[-1] + 1)):
                wrong.append(f"{what} goes on at {whole}, expected {begin}")
            seen |= {batch: [row for part in parts for row in part[batch]] for batch in whole}
            if any(seen[batch] != order[batch] for batch in whole):
                wrong.append(f"{what} has other samples")
        if sorted(seen) != sorted(order):
            wrong.append(f"round {number} has the batches {sorted(seen)}")
        every = ends_in(folder)
        if not identical(*every):
            wrong.append(f"round {number}: the ranks end otherwise")
        for found, wanted in zip(every[0], expected, strict=True):
            away = float((found.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
            if wanted.dtype == torch.float64:
                distance = max(distance, away)
            elif away > 1e-6:
                wrong.append(f"round {number} ends {away} away, in {wanted.dtype}")
    return {
        "kills": kills,
        "batches": len(order),
        "went on": went_on,
        "distance": distance,
        "wrong": wrong,
        "ends": ends,
    }


class Remember:
    """What is learned in every state that a run can be resumed from, by its place."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[int, ...], list[Tensor]] = {}

    def committed(self, state: State) -> None:
        self.numbers[state.done] = learned(state)


def learned(state: State) -> list[Tensor]:
    """Params, slots, losses."""
    trees: Any = (state.params, state.opt_state)
    losses = torch.tensor(list(map(float, state.history.losses)), dtype=torch.float64)
    return [losses, *(one for one in optree.tree_leaves(trees) if isinstance(one, Tensor))]


def twice(name: str, rounds: str) -> dict[str, Any]:
    """Two SIGTERMs for each rank of a run in pieces, as a scheduler and torchrun may send them: the
    second one ends it where it is. What is in the folder is of one place in the run.
    """
    chance, wrong, ends, places = random.Random(10), list[str](), Counter[str](), Counter[int]()
    one, seen = RUNS["pieces"](), Remember()
    fit(one, one.init(seed=3), 3, [seen])
    for number in range(int(rounds)):
        folder = Path(name) / str(number)
        folder.mkdir()
        at = 5 if number == 0 else chance.randint(1, 8)
        signals = {
            0: Send(at + 1, "before_batch", signal.SIGTERM, 2),
            1: Send(at, "after_step", signal.SIGTERM, 2),
        }
        if number:
            signals = {
                rank: Send(at + chance.randrange(2), chance.choice(EVENTS), signal.SIGTERM, 2)
                for rank in range(2)
            }
        ends.update(map(told, leg("pieces", folder, 2, signals).end()))
        for path in checkpoints(folder / "run"):
            found = load(path)
            places[len(found.done)] += 1
            pairs = zip(learned(found), seen.numbers[found.done], strict=True)
            if not all(torch.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in pairs):
                wrong.append(f"round {number}: {path.name} is of no state")
    return {"wrong": wrong, "ends": ends, "checkpoints": places.total()}


if __name__ == "__main__":
    main(globals())
