"""Kernels in C, for CPUs."""

from functional_sgd.fusion.backends.c.launch import CBackend

__all__ = ["CBackend"]
