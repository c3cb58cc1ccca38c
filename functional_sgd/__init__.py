"""Optimizers as chains of rules: functions (params, grads, state, hyper) -> (params, state)."""

from functional_sgd.autodiff import apply as apply
from functional_sgd.autodiff import split as split
from functional_sgd.autodiff import value_and_grad as value_and_grad
from functional_sgd.bridge import from_torch as from_torch
from functional_sgd.bridge import into_torch as into_torch
from functional_sgd.bridge import to_torch as to_torch
from functional_sgd.bridge import torch_optimizer as torch_optimizer
from functional_sgd.chaining import Chain as Chain
from functional_sgd.chaining import Part as Part
from functional_sgd.chaining import chain as chain
from functional_sgd.chaining import identity as identity
from functional_sgd.chaining import part as part
from functional_sgd.compile.step import compile_step as compile_step
from functional_sgd.fusion.fused import fuse as fuse
from functional_sgd.hyper import by_path as by_path
from functional_sgd.optimizer import Optimizer as Optimizer
from functional_sgd.packing import Packing as Packing
from functional_sgd.packing import pack as pack
from functional_sgd.randomness import normal as normal
from functional_sgd.randomness import uniform as uniform
from functional_sgd.recipes import adam as adam
from functional_sgd.recipes import adamw as adamw
from functional_sgd.recipes import lamb as lamb
from functional_sgd.recipes import larc as larc
from functional_sgd.recipes import lion as lion
from functional_sgd.recipes import momentum as momentum
from functional_sgd.recipes import qhadam as qhadam
from functional_sgd.recipes import radam as radam
from functional_sgd.recipes import ranger as ranger
from functional_sgd.recipes import rmsprop as rmsprop
from functional_sgd.recipes import sgd as sgd
from functional_sgd.reduction import Reduction as Reduction
from functional_sgd.reduction import all_finite as all_finite
from functional_sgd.reduction import largest as largest
from functional_sgd.reduction import mean as mean
from functional_sgd.reduction import norm as norm
from functional_sgd.reduction import total as total
from functional_sgd.rule import Rule as Rule
from functional_sgd.rule import elementwise as elementwise
from functional_sgd.rule import leafwise as leafwise
from functional_sgd.rule import treewise as treewise
from functional_sgd.rules import average_grad as average_grad
from functional_sgd.rules import average_sqr_grad as average_sqr_grad
from functional_sgd.rules import center as center
from functional_sgd.rules import centralize as centralize
from functional_sgd.rules import clip_norm as clip_norm
from functional_sgd.rules import clip_value as clip_value
from functional_sgd.rules import dampen as dampen
from functional_sgd.rules import debias as debias
from functional_sgd.rules import heavy_ball as heavy_ball
from functional_sgd.rules import l2_reg as l2_reg
from functional_sgd.rules import larc_ratio as larc_ratio
from functional_sgd.rules import lars_ratio as lars_ratio
from functional_sgd.rules import nesterov as nesterov
from functional_sgd.rules import quasi_hyperbolic as quasi_hyperbolic
from functional_sgd.rules import rectify as rectify
from functional_sgd.rules import rectify_eps_early as rectify_eps_early
from functional_sgd.rules import rectify_softplus as rectify_softplus
from functional_sgd.rules import scale_by_rms as scale_by_rms
from functional_sgd.rules import scale_by_rms_eps_inside as scale_by_rms_eps_inside
from functional_sgd.rules import sgd_step as sgd_step
from functional_sgd.rules import sign_of_average as sign_of_average
from functional_sgd.rules import sync_slow_params as sync_slow_params
from functional_sgd.rules import trust_ratio as trust_ratio
from functional_sgd.rules import weight_decay as weight_decay
from functional_sgd.sibling import warn_if_hidden as _warn_if_hidden
from functional_sgd.state import seeded as seeded
from functional_sgd.trial import rename as rename
from functional_sgd.wrappers.accumulate import accumulate as accumulate
from functional_sgd.wrappers.average_params import average_of as average_of
from functional_sgd.wrappers.average_params import average_params as average_params
from functional_sgd.wrappers.lookahead import lookahead as lookahead
from functional_sgd.wrappers.partition import freeze as freeze
from functional_sgd.wrappers.partition import partition as partition
from functional_sgd.wrappers.sam import sam as sam
from functional_sgd.wrappers.schedule_free import schedule_free as schedule_free
from functional_sgd.wrappers.schedule_free import schedule_free_adamw as schedule_free_adamw
from functional_sgd.wrappers.schedule_free import schedule_free_sgd as schedule_free_sgd
from functional_sgd.wrappers.scheduled import scheduled as scheduled
from functional_sgd.wrappers.skip_nonfinite import skip_nonfinite as skip_nonfinite

__version__ = "0.1.0"

__all__ = [
    "Chain",
    "Optimizer",
    "Packing",
    "Part",
    "Reduction",
    "Rule",
    "__version__",
    "accumulate",
    "adam",
    "adamw",
    "all_finite",
    "apply",
    "average_grad",
    "average_of",
    "average_params",
    "average_sqr_grad",
    "by_path",
    "center",
    "centralize",
    "chain",
    "clip_norm",
    "clip_value",
    "compile_step",
    "dampen",
    "debias",
    "elementwise",
    "freeze",
    "from_torch",
    "fuse",
    "heavy_ball",
    "identity",
    "into_torch",
    "l2_reg",
    "lamb",
    "larc",
    "larc_ratio",
    "largest",
    "lars_ratio",
    "leafwise",
    "lion",
    "lookahead",
    "mean",
    "momentum",
    "nesterov",
    "norm",
    "normal",
    "pack",
    "part",
    "partition",
    "qhadam",
    "quasi_hyperbolic",
    "radam",
    "ranger",
    "rectify",
    "rectify_eps_early",
    "rectify_softplus",
    "rename",
    "rmsprop",
    "sam",
    "scale_by_rms",
    "scale_by_rms_eps_inside",
    "schedule_free",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "scheduled",
    "seeded",
    "sgd",
    "sgd_step",
    "sign_of_average",
    "skip_nonfinite",
    "split",
    "sync_slow_params",
    "to_torch",
    "torch_optimizer",
    "total",
    "treewise",
    "trust_ratio",
    "uniform",
    "value_and_grad",
    "weight_decay",
]

_warn_if_hidden()
