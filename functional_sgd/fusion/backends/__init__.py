"""Who compiles and runs the passes of a program: one folder or file each."""

from functional_sgd.fusion.backends.backend import Backend, Unavailable
from functional_sgd.fusion.backends.c import CBackend
from functional_sgd.fusion.backends.foreach import ForeachBackend
from functional_sgd.fusion.backends.triton import TritonBackend

__all__ = ["Backend", "CBackend", "ForeachBackend", "TritonBackend", "Unavailable"]
