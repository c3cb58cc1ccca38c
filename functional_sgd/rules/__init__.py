"""The rules, one theme a file; its `__all__` says what it gives."""

from typing import TYPE_CHECKING

from functional_sgd.rules import (
    averaging,
    certainty,
    clipping,
    corrections,
    curvature,
    decay,
    directions,
    distance,
    extremes,
    factored,
    lean,
    loss,
    matrices,
    momenta,
    moments,
    noise,
    preconditioning,
    projecting,
    rates,
    rounding,
    scaling,
    schedule_free,
    sketching,
    spikes,
    stepping,
    travel,
    trust,
    watching,
    whitening,
)
from functional_sgd.rules.averaging import *
from functional_sgd.rules.certainty import *
from functional_sgd.rules.clipping import *
from functional_sgd.rules.corrections import *
from functional_sgd.rules.curvature import *
from functional_sgd.rules.decay import *
from functional_sgd.rules.directions import *
from functional_sgd.rules.distance import *
from functional_sgd.rules.extremes import *
from functional_sgd.rules.factored import *
from functional_sgd.rules.lean import *
from functional_sgd.rules.loss import *
from functional_sgd.rules.matrices import *
from functional_sgd.rules.momenta import *
from functional_sgd.rules.moments import *
from functional_sgd.rules.noise import *
from functional_sgd.rules.preconditioning import *
from functional_sgd.rules.projecting import *
from functional_sgd.rules.rates import *
from functional_sgd.rules.rounding import *
from functional_sgd.rules.scaling import *
from functional_sgd.rules.schedule_free import *
from functional_sgd.rules.sketching import *
from functional_sgd.rules.spikes import *
from functional_sgd.rules.stepping import *
from functional_sgd.rules.travel import *
from functional_sgd.rules.trust import *
from functional_sgd.rules.watching import *
from functional_sgd.rules.whitening import *

NAMES = (
    *averaging.__all__,
    *certainty.__all__,
    *clipping.__all__,
    *corrections.__all__,
    *curvature.__all__,
    *decay.__all__,
    *directions.__all__,
    *distance.__all__,
    *extremes.__all__,
    *factored.__all__,
    *lean.__all__,
    *loss.__all__,
    *matrices.__all__,
    *momenta.__all__,
    *moments.__all__,
    *noise.__all__,
    *preconditioning.__all__,
    *projecting.__all__,
    *rates.__all__,
    *rounding.__all__,
    *scaling.__all__,
    *schedule_free.__all__,
    *sketching.__all__,
    *spikes.__all__,
    *stepping.__all__,
    *travel.__all__,
    *trust.__all__,
    *watching.__all__,
    *whitening.__all__,
)

if not TYPE_CHECKING:  # to type checkers, what a star brings is public
    __all__ = [*NAMES]
