"""Optimizers of torch.optim with options of every kind, alone and with groups."""

from typing import Any

import torch

O = torch.optim  # noqa: E741

MAKERS: dict[str, Any] = {
    "sgd": lambda p: O.SGD(p, 0.1),
    "sgd wd": lambda p: O.SGD(p, 0.1, weight_decay=0.1),
    "sgd momentum": lambda p: O.SGD(p, 0.1, momentum=0.9),
    "sgd nesterov wd": lambda p: O.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd dampening": lambda p: O.SGD(p, 0.1, momentum=0.9, dampening=0.4),
    "sgd dampening without momentum": lambda p: O.SGD(p, 0.1, dampening=0.4),
    "adam": lambda p: O.Adam(p, 0.01, betas=(0.8, 0.95), eps=1e-4),
    "adam wd": lambda p: O.Adam(p, 0.01, weight_decay=0.1),
    "adam decoupled": lambda p: O.Adam(p, 0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "adam beta 0": lambda p: O.Adam(p, 0.01, betas=(0.0, 0.95)),
    "adamw": lambda p: O.AdamW(p, 0.01),
    "adamw wd 0": lambda p: O.AdamW(p, 0.01, weight_decay=0.0),
    "adamw tensor lr": lambda p: O.AdamW(p, torch.tensor(0.01, dtype=torch.float64)),
    "rmsprop": lambda p: O.RMSprop(p, 0.01),
    "rmsprop all": lambda p: O.RMSprop(
        p, 0.01, alpha=0.9, momentum=0.5, centered=True, weight_decay=0.1
    ),
    "radam": lambda p: O.RAdam(p, 0.01),
    "radam wd": lambda p: O.RAdam(p, 0.01, weight_decay=0.1),
    "radam decoupled": lambda p: O.RAdam(p, 0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "sgd maximize wd": lambda p: O.SGD(p, 0.1, maximize=True, weight_decay=0.1),
    "adam amsgrad": lambda p: O.Adam(p, 0.01, amsgrad=True),
    "adamw amsgrad maximize": lambda p: O.AdamW(p, 0.01, amsgrad=True, maximize=True),
    "adamax": lambda p: O.Adamax(p, 0.01, betas=(0.8, 0.95), weight_decay=0.1),
    "nadam": lambda p: O.NAdam(p, 0.01, momentum_decay=0.1),
    "nadam decoupled": lambda p: O.NAdam(p, 0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "adagrad": lambda p: O.Adagrad(p, 0.1),
    "adagrad all": lambda p: O.Adagrad(
        p, 0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.5
    ),
    "adadelta": lambda p: O.Adadelta(p, 0.5, rho=0.8, eps=1e-4, weight_decay=0.1),
    "rprop": lambda p: O.Rprop(p, 0.1, etas=(0.4, 1.5), step_sizes=(1e-3, 0.5)),
    "asgd": lambda p: O.ASGD(p, 0.1, lambd=0.5, alpha=0.5, t0=10, weight_decay=0.1),
}
GROUPED: dict[str, Any] = {
    "sgd": lambda a, b: O.SGD(
        [{"params": a}, {"params": b, "lr": 0.5, "weight_decay": 0.2}], 0.1, momentum=0.9
    ),
    "sgd momentum in one": lambda a, b: O.SGD(
        [{"params": a}, {"params": b, "momentum": 0.9}], 0.1, dampening=0.4
    ),
    "adamw": lambda a, b: O.AdamW(
        [{"params": a, "weight_decay": 0.0}, {"params": b, "betas": (0.7, 0.9)}], 0.01
    ),
    "adam wd in one": lambda a, b: O.Adam(
        [{"params": a}, {"params": b, "weight_decay": 0.2, "eps": 1e-3}], 0.01
    ),
    "rmsprop momentum in one": lambda a, b: O.RMSprop(
        [{"params": b}, {"params": a, "momentum": 0.9}], 0.01
    ),
    "adagrad lr decay in one": lambda a, b: O.Adagrad(
        [{"params": b}, {"params": a, "lr_decay": 0.5}], 0.01
    ),
    "asgd": lambda a, b: O.ASGD(
        [{"params": b, "lr": 0.1}, {"params": a, "lambd": 0.5, "t0": 3}], 0.01
    ),
    "rprop": lambda a, b: O.Rprop([{"params": b}, {"params": a, "etas": (0.4, 1.5)}], 0.01),
}
