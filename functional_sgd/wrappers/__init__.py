"""Optimizers made from optimizers, one a file."""

from functional_sgd.wrappers.accumulate import accumulate
from functional_sgd.wrappers.average_params import average_of, average_params
from functional_sgd.wrappers.lazy_rows import lazy_rows
from functional_sgd.wrappers.lookahead import lookahead
from functional_sgd.wrappers.low_rank import low_rank
from functional_sgd.wrappers.mechanize import mechanize
from functional_sgd.wrappers.partition import freeze, partition
from functional_sgd.wrappers.sam import sam
from functional_sgd.wrappers.schedule_free import schedule_free
from functional_sgd.wrappers.scheduled import scheduled
from functional_sgd.wrappers.skip_nonfinite import skip_large, skip_nonfinite

__all__ = [
    "accumulate",
    "average_of",
    "average_params",
    "freeze",
    "lazy_rows",
    "lookahead",
    "low_rank",
    "mechanize",
    "partition",
    "sam",
    "schedule_free",
    "scheduled",
    "skip_large",
    "skip_nonfinite",
]
