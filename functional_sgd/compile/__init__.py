"""Forward pass, gradients and update as one compiled graph."""

from functional_sgd.compile.step import compile_step

__all__ = ["compile_step"]
