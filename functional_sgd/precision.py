"""Which dtypes are half precision, and which is the most exact one that a device has."""

import torch

HALVES = (torch.bfloat16, torch.float16)
"""The dtypes of half precision: leaves of them are computed in float32."""


def widest(device: torch.device) -> torch.dtype:
    """The dtype of numbers that must be as exact as they can be: float64, which Metal has not.

    >>> widest(torch.device("cpu")), widest(torch.device("mps"))
    (torch.float64, torch.float32)
    """
    return torch.float32 if device.type == "mps" else torch.float64
