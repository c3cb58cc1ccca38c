"""The rules, one theme a file; its `__all__` says what it gives."""

from typing import TYPE_CHECKING

from functional_sgd.rules import (
    averaging,
    clipping,
    decay,
    distance,
    loss,
    scaling,
    stepping,
    travel,
    trust,
)
from functional_sgd.rules.averaging import *
from functional_sgd.rules.clipping import *
from functional_sgd.rules.decay import *
from functional_sgd.rules.distance import *
from functional_sgd.rules.loss import *
from functional_sgd.rules.scaling import *
from functional_sgd.rules.stepping import *
from functional_sgd.rules.travel import *
from functional_sgd.rules.trust import *

NAMES = (
    *averaging.__all__,
    *clipping.__all__,
    *decay.__all__,
    *distance.__all__,
    *loss.__all__,
    *scaling.__all__,
    *stepping.__all__,
    *travel.__all__,
    *trust.__all__,
)

if not TYPE_CHECKING:  # to type checkers, what a star brings is public
    __all__ = [*NAMES]
