"""Schedules: functions of how far the run has come, as values that can be joined, compared,
pickled and traced.

A schedule is a function of one number (or of a 0-d tensor, if it is to be compiled or
differentiated). What that counts is the caller's choice: the share of the run, from 0 to 1, in
`scheduled(opt, steps=...)` and in the loop's ParamScheduler; steps in `scheduled(opt)`.

- Shapes run over a length of 1: Linear, Cosine, one_cycle, ... `Stretch(shape, 1000)` makes one
  of them 1000 steps long.
- Those with lengths of their own (step_decay, warm_up, Restarts, ...) take them in what the caller
  counts: `step_decay(0.1, every=30)` in steps, `step_decay(0.1, every=1 / 3)` in shares.

>>> from functional_sgd import scheduled, sgd
>>> schedule = warm_up(10, Restarts(Cosine(0.1, 0.0), length=100, mult=2))
>>> opt = scheduled(sgd(), lr=schedule)
>>> schedule(5), schedule(10), schedule(110)
(0.05, 0.1, 0.1)
"""

from typing import TYPE_CHECKING

from functional_sgd.schedules import counted, joining, runs, shapes
from functional_sgd.schedules.counted import *
from functional_sgd.schedules.joining import *
from functional_sgd.schedules.joining import counts_steps as counts_steps
from functional_sgd.schedules.joining import is_shape as is_shape
from functional_sgd.schedules.position import Position as Position
from functional_sgd.schedules.position import Schedule as Schedule
from functional_sgd.schedules.runs import *
from functional_sgd.schedules.shapes import *

NAMES = (*counted.__all__, *joining.__all__, *runs.__all__, *shapes.__all__)

if not TYPE_CHECKING:  # to type checkers, what a star brings is public
    __all__ = ["Position", "Schedule", "counts_steps", "is_shape", *NAMES]
