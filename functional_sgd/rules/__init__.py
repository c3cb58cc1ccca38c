"""The rules, one theme a file; its `__all__` says what it gives."""

from typing import TYPE_CHECKING

from functional_sgd.rules import (
    averaging,
    clipping,
    decay,
    matrices,
    preconditioning,
    scaling,
    stepping,
    trust,
)
from functional_sgd.rules.averaging import *
from functional_sgd.rules.clipping import *
from functional_sgd.rules.decay import *
from functional_sgd.rules.matrices import *
from functional_sgd.rules.preconditioning import *
from functional_sgd.rules.scaling import *
from functional_sgd.rules.stepping import *
from functional_sgd.rules.trust import *

NAMES = (
    *averaging.__all__,
    *clipping.__all__,
    *decay.__all__,
    *matrices.__all__,
    *preconditioning.__all__,
    *scaling.__all__,
    *stepping.__all__,
    *trust.__all__,
)

if not TYPE_CHECKING:  # to type checkers, what a star brings is public
    __all__ = [*NAMES]
