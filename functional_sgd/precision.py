"""Which dtypes are half precision, and which is the most exact one that a device has."""

import torch

HALVES = (torch.bfloat16, torch.float16)
"""The dtypes of half precision: leaves of them are computed in float32."""


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers are computed that are kept in this one.

    >>> computed_in(torch.bfloat16), computed_in(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float32 if dtype in HALVES else dtype


def widest(device: torch.device) -> torch.dtype:
    """The dtype of numbers that must be as exact as they can be: float64, which Metal has not.

    >>> widest(torch.device("cpu")), widest(torch.device("mps"))
    (torch.float64, torch.float32)
    """
    return torch.float32 if device.type == "mps" else torch.float64
