"""What does a step on matrices cost? Leaves of one shape, which `fuse` gives to torch as one batch.

A turn of SOAP is ten steps, in one of which its bases are turned.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import tyro
from common import Tensors, gradients, race, save, show
from contenders import Ours

import functional_sgd as fs

TURN = {"muon": 1, "normuon": 1, "soap": 10}
OURS: dict[str, Callable[[], fs.Chain]] = {
    "muon": fs.muon,
    "normuon": fs.normuon,
    "soap": fs.soap,
}


class Theirs:
    """An optimizer that steps in place."""

    def __init__(self, make: Callable[[Any], Any], tree: Tensors, grads: Tensors) -> None:
        self.params = [value.clone().requires_grad_() for value in tree.values()]
        for param, grad in zip(self.params, grads.values(), strict=True):
            param.grad = grad.clone()
        self.opt = make(self.params)

    def step(self) -> None:
        """One update."""
        self.opt.step()


def theirs(name: str) -> dict[str, Callable[[Any], Any]]:
    """Who else has this optimizer, and is installed."""
    found: dict[str, Callable[[Any], Any]] = {}
    if name == "muon":
        found["torch.optim"] = torch.optim.Muon
    if importlib.util.find_spec("pytorch_optimizer") is None:
        return found
    import pytorch_optimizer

    if name == "soap":
        found["pytorch_optimizer"] = pytorch_optimizer.SOAP
    else:
        kind = {"muon": pytorch_optimizer.Muon, "normuon": pytorch_optimizer.NorMuon}[name]
        found["pytorch_optimizer"] = lambda params: kind([{"params": params, "use_muon": True}])
    return found


def times_of(name: str, tree: Tensors, rounds: int) -> dict[str, float]:
    """Milliseconds of a step, by who takes it."""
    grads = gradients(tree)
    opts: dict[str, Any] = {
        who: Theirs(make, tree, grads) for who, make in theirs(name).items()
    } | {"ours, donated": Ours(fs.fuse(OURS[name](), donate=True), tree, grads)}

    def turn(opt: Any) -> Callable[[], None]:
        def steps() -> None:
            for _ in range(TURN[name]):
                opt.step()

        return steps

    times = race({who: turn(opt) for who, opt in opts.items()}, rounds, warmup=1)
    return {who: 1e3 * timing.median / TURN[name] for who, timing in times.items()}


def main(
    names: tuple[str, ...] = ("muon", "normuon", "soap"),
    count: int = 24,
    side: int = 512,
    rounds: int = 5,
    save_results: bool = False,
) -> None:
    """Time steps on some matrices of one shape.

    Args:
        names: Which optimizers.
        count: How many matrices.
        side: How many rows and columns each of them has.
        rounds: How often each contender is timed.
        save_results: Write the table into results/.
    """
    generator = torch.Generator().manual_seed(0)
    tree = {f"w{index:02d}": torch.randn(side, side, generator=generator) for index in range(count)}
    rows = []
    for name in names:
        times = times_of(name, tree, rounds)
        ours = times["ours, donated"]
        for who, time in times.items():
            rows.append([name, who, f"{time:,.0f}", f"{ours / time:.2f}"])
    title = f"Milliseconds of a step on {count} matrices of {side} x {side} (median)"
    text = show(title, ["optimizer", "who", "ms", "ours / theirs"], rows)
    if save_results:
        save("matrices", text, ("torch", "pytorch-optimizer", "pytorch_optimizer", "numpy"))


if __name__ == "__main__":
    tyro.cli(main)
