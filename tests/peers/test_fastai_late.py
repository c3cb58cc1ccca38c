"""fastai's numbers where leaves join late or have no gradient: each counts its own steps.

But for fastai's Lookahead, which counts calls and syncs all leaves at once; here a leaf is synced
after every sixth step of its own.
"""

from typing import Any

import pytest
import torch

import functional_sgd as fs
from tests.peers.late import gradients, largest_gap, start
from tests.peers.test_fastai import CASES, RECIPES

WITH_CALLS = ("lookahead", "ranger")


def follow(make: Any, opt: Any) -> None:
    """Sixty steps, within 1e-12 after each."""
    params: Any = start()
    mirrored = [torch.nn.Parameter(leaf) for leaf in start()]
    theirs, state = make(mirrored), opt.init(params)
    for grads in gradients():
        for param, grad in zip(mirrored, grads, strict=True):
            param.grad = None if grad is None else grad.clone()
        theirs.step()
        params, state = opt(params, grads, state)
        assert largest_gap(params, mirrored) <= 1e-12


@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "l2"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in WITH_CALLS])
def test_chains(name: str, decoupled: bool) -> None:
    theirs, ours = CASES[name]
    follow(
        lambda params: theirs(params, decoupled), ours(fs.weight_decay if decoupled else fs.l2_reg)
    )


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in WITH_CALLS])
def test_recipes(name: str) -> None:
    theirs, ours = RECIPES[name]
    follow(lambda params: theirs(params, True), ours())
