"""The optimizers that have names: each recipe returns a chain, with the hypers of its paper as
keywords. A chain expression is all there is to one.

A file is a family, and its `__all__` what it gives. `wd=None` leaves weight decay out. Where a
recipe is in torch.optim, its numbers and its kind of decay are torch's; for the other kind, put the
other rule in front: `chain(weight_decay, radam(), wd=0.01)`.
"""

from typing import TYPE_CHECKING

from functional_sgd.catalogue import (
    adam_family,
    adaptive,
    careful,
    classic,
    corrected,
    curvature,
    descent,
    factored,
    layers,
    lean,
    matrices,
    momenta,
    noisy,
    online,
    parameter_free,
    robust,
    schedule_free,
    signs,
)
from functional_sgd.catalogue.adam_family import *
from functional_sgd.catalogue.adaptive import *
from functional_sgd.catalogue.careful import *
from functional_sgd.catalogue.classic import *
from functional_sgd.catalogue.corrected import *
from functional_sgd.catalogue.curvature import *
from functional_sgd.catalogue.descent import *
from functional_sgd.catalogue.factored import *
from functional_sgd.catalogue.layers import *
from functional_sgd.catalogue.lean import *
from functional_sgd.catalogue.matrices import *
from functional_sgd.catalogue.momenta import *
from functional_sgd.catalogue.noisy import *
from functional_sgd.catalogue.online import *
from functional_sgd.catalogue.parameter_free import *
from functional_sgd.catalogue.robust import *
from functional_sgd.catalogue.schedule_free import *
from functional_sgd.catalogue.signs import *

NAMES = (
    *adam_family.__all__,
    *adaptive.__all__,
    *careful.__all__,
    *classic.__all__,
    *corrected.__all__,
    *curvature.__all__,
    *descent.__all__,
    *factored.__all__,
    *layers.__all__,
    *lean.__all__,
    *matrices.__all__,
    *momenta.__all__,
    *noisy.__all__,
    *online.__all__,
    *parameter_free.__all__,
    *robust.__all__,
    *schedule_free.__all__,
    *signs.__all__,
)

if not TYPE_CHECKING:  # to type checkers, what a star brings is public
    __all__ = [*NAMES]
