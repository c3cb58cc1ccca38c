"""fuse: chains of rules as compiled kernels."""
