"""The rules, one theme a file. A new rule goes into its theme's file and into the list here."""

from functional_sgd.rules.averaging import average_grad as average_grad
from functional_sgd.rules.averaging import average_sqr_grad as average_sqr_grad
from functional_sgd.rules.averaging import dampen as dampen
from functional_sgd.rules.averaging import debias as debias
from functional_sgd.rules.averaging import heavy_ball as heavy_ball
from functional_sgd.rules.averaging import nesterov as nesterov
from functional_sgd.rules.averaging import quasi_hyperbolic as quasi_hyperbolic
from functional_sgd.rules.averaging import sign_of_average as sign_of_average
from functional_sgd.rules.clipping import centralize as centralize
from functional_sgd.rules.clipping import clip_norm as clip_norm
from functional_sgd.rules.clipping import clip_value as clip_value
from functional_sgd.rules.decay import l2_reg as l2_reg
from functional_sgd.rules.decay import weight_decay as weight_decay
from functional_sgd.rules.scaling import center as center
from functional_sgd.rules.scaling import rectify as rectify
from functional_sgd.rules.scaling import rectify_eps_early as rectify_eps_early
from functional_sgd.rules.scaling import rectify_softplus as rectify_softplus
from functional_sgd.rules.scaling import scale_by_rms as scale_by_rms
from functional_sgd.rules.scaling import scale_by_rms_eps_inside as scale_by_rms_eps_inside
from functional_sgd.rules.stepping import sgd_step as sgd_step
from functional_sgd.rules.stepping import sync_slow_params as sync_slow_params
from functional_sgd.rules.trust import larc_ratio as larc_ratio
from functional_sgd.rules.trust import lars_ratio as lars_ratio
from functional_sgd.rules.trust import trust_ratio as trust_ratio
