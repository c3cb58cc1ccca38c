"""fuse: chains of rules as compiled kernels."""

from functional_sgd.fusion.fused import Fused, donating, fuse

__all__ = ["Fused", "donating", "fuse"]
