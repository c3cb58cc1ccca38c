"""Is the GPU backend right, and as fast as it should be? First it is compared with double
precision, then timed.
"""

import sys
from collections.abc import Iterator

import torch
from common import Tensors, Timing, TreeName, bandwidths, gradients, machine, race, say, show, trees
from contenders import OURS, OptimizerName, contenders

import functional_sgd as fs

Row = tuple[str, float, str, float]  # what, measured, at least or at most, the bar


def error(name: OptimizerName, donate: bool, steps: int = 5) -> float:
    """How far some fused steps in single precision end from those in double precision, in units of
    the whole way.
    """
    opt, params = OURS[name], trees("gpt10", device="cuda")
    wide = {leaf: value.double() for leaf, value in params.items()}
    start, fused = dict(wide), fs.fuse(opt, donate=donate)
    state, wide_state = opt.init(params), opt.init(wide)
    for _ in range(steps):
        grads = gradients(params)
        params, state = fused(params, grads, state)
        wide, wide_state = opt(
            wide, {leaf: grad.double() for leaf, grad in grads.items()}, wide_state
        )
    far = max((params[leaf].double() - wide[leaf]).abs().max().item() for leaf in wide)
    return far / max((wide[leaf] - start[leaf]).abs().max().item() for leaf in wide)


def times(
    tree_name: TreeName, name: OptimizerName, rounds: int
) -> tuple[Tensors, dict[str, Timing]]:
    """The times of everybody who can do this."""
    tree = trees(tree_name, device="cuda")
    entered = {who: make() for who, make in contenders(name, tree, gradients(tree), jax=False)}
    del entered["ours, leaf by leaf"]
    return tree, race({who: one.step for who, one in entered.items()}, rounds, device="cuda")


def bars(rounds: int) -> Iterator[Row]:
    """What is measured, and where it should be."""
    copying, _ = bandwidths(device="cuda")
    say(f"A copy moves {copying / 1e9:.0f} GB/s.")
    tree, found = times("one100m", "adamw", rounds)
    moved = 7 * 4 * sum(value.numel() for value in tree.values())
    ours = found["ours, donated"].median
    yield "adamw, 100 M parameters: bandwidth, of a copy", moved / ours / copying, "at least", 0.88
    yield (
        "adamw, 100 M parameters: time, of torch fused",
        ours / found["torch fused"].median,
        "at most",
        1.0,
    )
    for tree_name, bar in (("gpt124", 0.9), ("many1000", 0.5)):
        _, found = times(tree_name, "adamw", rounds)
        for form in ("ours, donated", "ours, pure"):
            yield (
                f"adamw, {tree_name}, {form}: of torch fused",
                found[form].median / found["torch fused"].median,
                "at most",
                bar,
            )
    _, found = times("gpt124", "four", rounds)
    ratio = found["ours, donated"].median / found["foreach by hand"].median
    yield "a chain of four parts, gpt124: time, of foreach by hand", ratio, "at most", 1.0


def main(rounds: int = 20) -> None:
    """Print both tables; exits with 1 if the numbers are wrong, or a bar is missed."""
    if not torch.cuda.is_available():
        sys.exit("gpu_check: there is no GPU.")
    print(machine())
    wrong = [(name, donate, error(name, donate)) for name in OURS for donate in (False, True)]
    rows = [[name, "donated" if donate else "pure", f"{far:.1e}"] for name, donate, far in wrong]
    show(
        "Five steps, compared with double precision",
        ["optimizer", "form", "error, of the way"],
        rows,
    )
    if any(not far < 1e-3 for *_, far in wrong):
        sys.exit("gpu_check: the numbers are wrong.")
    missed = 0
    table = []
    for what, found, sense, bar in bars(rounds):
        good = found >= bar if sense == "at least" else found <= bar
        missed += not good
        table.append([what, f"{found:.2f}", f"{sense} {bar}", "yes" if good else "no"])
    show("Speed", ["what", "measured", "bar", "met"], table)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
