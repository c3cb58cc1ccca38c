"""Faster ways to run a chain; each gives what `step.leaf_by_leaf` gives."""

from functional_sgd.execute.fused import fuse as fuse
from functional_sgd.execute.whole import compile_step as compile_step
