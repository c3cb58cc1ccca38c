"""The optimizers that have names: each recipe returns a chain, with the hypers of its paper as
keywords. A chain expression is all there is to one.

A file is a family, and its `__all__` what it gives. `wd=None` leaves weight decay out. Where a
recipe is in torch.optim, its numbers and its kind of decay are torch's; for the other kind, put the
other rule in front: `chain(weight_decay, radam(), wd=0.01)`.
"""

from typing import TYPE_CHECKING

from functional_sgd.catalogue import (
    adaptive,
    descent,
    layers,
    matrices,
)
from functional_sgd.catalogue.adaptive import *
from functional_sgd.catalogue.descent import *
from functional_sgd.catalogue.layers import *
from functional_sgd.catalogue.matrices import *

NAMES = (
    *adaptive.__all__,
    *descent.__all__,
    *layers.__all__,
    *matrices.__all__,
)

if not TYPE_CHECKING:  # to type checkers, what a star brings is public
    __all__ = [*NAMES]
