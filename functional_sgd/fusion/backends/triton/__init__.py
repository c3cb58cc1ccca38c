"""Kernels in Triton, for GPUs."""

from functional_sgd.fusion.backends.triton.launch import TritonBackend

__all__ = ["TritonBackend"]
