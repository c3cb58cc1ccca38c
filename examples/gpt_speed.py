"""How fast gpt.py is beside the loop that one would write by hand, with torch.optim."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import torch
from gpt_model import next_token_loss
from torch import Tensor, nn

from loop import DataLoaders, GradientAccumulation, Learner, MixedPrecision, fit


def plain_loop(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    accumulate: int,
    rate: Callable[[int], float],
    bf16: bool,
) -> None:
    """An epoch over the batches: AdamW, weight decay for matrices only, a step for every so many
    batches, lr = rate(step).
    """
    matrices = [param for param in model.parameters() if param.dim() > 1]
    others = [param for param in model.parameters() if param.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    device = next(model.parameters()).device
    model.train()
    for index, (x, y) in enumerate(batches, start=1):
        x, y = x.to(device), y.to(device)
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            loss = next_token_loss(model(x), y)
        torch.autograd.backward(loss / accumulate)
        if index % accumulate == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def speeds(learner: Learner, accumulate: int, lr: float, device: str, bf16: bool) -> None:
    """Print how many characters a second both loops train on; the faster of three runs each."""
    batches = list(learner.data.train)[: 8 * accumulate]
    count, ours, plain = sum(x.numel() for x, _ in batches), math.inf, math.inf
    wanted = (GradientAccumulation, MixedPrecision)
    callbacks = tuple(one for one in learner.callbacks if isinstance(one, wanted))
    mine = replace(learner, data=DataLoaders(batches), callbacks=callbacks)
    for _ in range(3):
        state, started = mine.init(device=device), time.perf_counter()
        fit(mine, state, 1)
        ours = min(ours, time.perf_counter() - started)
        model, started = deepcopy(learner.model).to(device), time.perf_counter()
        plain_loop(model, batches, accumulate, lambda step: lr, bf16)
        plain = min(plain, time.perf_counter() - started)
    print(f"characters a second: {count / ours:,.0f}; in a plain loop {count / plain:,.0f}")
