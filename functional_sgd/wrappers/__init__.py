"""Optimizers made from optimizers, one a file."""
