"""What does a step cost besides arithmetic? Leaves of one element, so that all that is left is
Python and calls.
"""

import cProfile
import pstats

import torch
import tyro
from common import race, save, say, show
from contenders import OURS, Ours, contenders

import functional_sgd as fs

CHOSEN = ("ours, donated", "ours, pure", "torch foreach", "torch fused")


def measure(leaves: int, rounds: int) -> list[str]:
    """A row of microseconds for each way of doing AdamW."""
    tree = {f"leaf{index:05d}": torch.ones(1) for index in range(leaves)}
    grads = {name: torch.full((1,), 0.5) for name in tree}
    entered = {
        who: make().step
        for who, make in contenders("adamw", tree, grads, jax=False)
        if who in CHOSEN
    }
    times = race(entered, rounds)
    return [f"{leaves:,}", *(f"{1e6 * times[who].median:,.0f}" for who in CHOSEN)]


def profile(leaves: int, steps: int, lines: int) -> None:
    """Where the time of a donated step goes, function by function; profiling makes calls look
    dearer than they are.
    """
    tree = {f"leaf{index:05d}": torch.ones(1) for index in range(leaves)}
    ours = Ours(
        fs.fuse(OURS["adamw"], donate=True), tree, {name: torch.full((1,), 0.5) for name in tree}
    )
    ours.step()
    watcher = cProfile.Profile()
    watcher.enable()
    for _ in range(steps):
        ours.step()
    watcher.disable()
    print(f"{steps} steps, {leaves:,} leaves")
    pstats.Stats(watcher).sort_stats("tottime").print_stats(lines)


def main(
    leaves: tuple[int, ...] = (1, 10, 100, 1000, 5000),
    rounds: int = 100,
    profiled: bool = False,
    lines: int = 25,
    save_results: bool = False,
) -> None:
    """Time AdamW on many leaves of one element.

    Args:
        leaves: How many leaves.
        rounds: How often each contender is timed.
        profiled: Show a profile of the donated step of the most leaves, instead of times.
        lines: The length of the profile.
        save_results: Write the table into results/.
    """
    if profiled:
        return profile(max(leaves), rounds, lines)
    text = say("Microseconds of one AdamW step on leaves of one element (median).")
    text += "\n" + show(
        "overhead", ["leaves", *CHOSEN], [measure(count, rounds) for count in leaves]
    )
    if save_results:
        save("overhead", text)
    return None


if __name__ == "__main__":
    tyro.cli(main)
