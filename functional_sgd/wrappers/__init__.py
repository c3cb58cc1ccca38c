"""Optimizers made from optimizers, one a file."""

from functional_sgd.wrappers.lookahead import lookahead as lookahead
