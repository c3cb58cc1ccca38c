"""Optimizers as chains of rules: functions (params, grads, state, hyper) -> (params, state)."""

from typing import TYPE_CHECKING

from functional_sgd import bridge, catalogue, rules, wrappers
from functional_sgd.autodiff import apply as apply
from functional_sgd.autodiff import split as split
from functional_sgd.autodiff import value_and_grad as value_and_grad
from functional_sgd.bridge import *
from functional_sgd.catalogue import *
from functional_sgd.chaining import Chain as Chain
from functional_sgd.chaining import Part as Part
from functional_sgd.chaining import chain as chain
from functional_sgd.chaining import identity as identity
from functional_sgd.chaining import part as part
from functional_sgd.compile.step import compile_step as compile_step
from functional_sgd.eight_bit import eight_bit as eight_bit
from functional_sgd.fusion.fused import fuse as fuse
from functional_sgd.hyper import by_path as by_path
from functional_sgd.lbfgs import lbfgs as lbfgs
from functional_sgd.listing import Recipe as Recipe
from functional_sgd.listing import recipes as recipes
from functional_sgd.optimizer import Optimizer as Optimizer
from functional_sgd.packing import Packing as Packing
from functional_sgd.packing import pack as pack
from functional_sgd.per_example import mean_of_clipped as mean_of_clipped
from functional_sgd.randomness import normal as normal
from functional_sgd.randomness import uniform as uniform
from functional_sgd.reduction import Reduction as Reduction
from functional_sgd.reduction import all_finite as all_finite
from functional_sgd.reduction import largest as largest
from functional_sgd.reduction import mean as mean
from functional_sgd.reduction import norm as norm
from functional_sgd.reduction import total as total
from functional_sgd.rounding import rounded as rounded
from functional_sgd.rounding import rounded_randomly as rounded_randomly
from functional_sgd.rule import Rule as Rule
from functional_sgd.rule import elementwise as elementwise
from functional_sgd.rule import leafwise as leafwise
from functional_sgd.rule import treewise as treewise
from functional_sgd.rules import *
from functional_sgd.sibling import warn_if_hidden as _warn_if_hidden
from functional_sgd.state import seeded as seeded
from functional_sgd.trial import rename as rename
from functional_sgd.wrappers import *

__version__ = "0.1.0"

if not TYPE_CHECKING:  # to type checkers, what is imported `as` itself or by a star is public
    __all__ = [
        "Chain",
        "Optimizer",
        "Packing",
        "Part",
        "Recipe",
        "Reduction",
        "Rule",
        "__version__",
        "all_finite",
        "apply",
        "by_path",
        "chain",
        "compile_step",
        "eight_bit",
        "elementwise",
        "fuse",
        "identity",
        "largest",
        "lbfgs",
        "leafwise",
        "mean",
        "mean_of_clipped",
        "norm",
        "normal",
        "pack",
        "part",
        "recipes",
        "rename",
        "rounded",
        "rounded_randomly",
        "seeded",
        "split",
        "total",
        "treewise",
        "uniform",
        "value_and_grad",
        *bridge.__all__,
        *catalogue.NAMES,
        *rules.NAMES,
        *wrappers.__all__,
    ]

# Here, because a hidden package cannot warn about itself.
_warn_if_hidden()
