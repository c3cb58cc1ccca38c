"""Which learning rate a curve of losses over rising learning rates suggests: four rules, as fastai
has them.

Each takes the curve, lrs that rise and as many losses, all finite, and returns a learning rate.
Raises ValueError if the curve has too few points for the rule.
"""

from collections.abc import Sequence

import numpy as np


def valley(lrs: Sequence[float], losses: Sequence[float]) -> float:
    """The learning rate half-way down the longest valley, which works for most models.

    The valley ends where the longest strictly decreasing subsequence of the losses, of n points,
    does, and is taken to begin n points before: the answer is int(n / 3) + int(n / 6) points from
    there. Takes O(points**2).

    >>> valley([10.0**n for n in range(-9, 1)], [9, 9, 8, 7, 6, 5, 4, 3, 2, 9])
    1e-06
    """
    _enough("valley", losses, 1)
    lengths: list[int] = []  # of the longest decreasing subsequence that ends here
    for index, loss in enumerate(losses):
        before = [lengths[other] for other in range(index) if losses[other] > loss]
        lengths.append(1 + max(before, default=0))
    longest = max(lengths)
    # An index minus a length is one too low, but this is fastai's rule, and gives its answers.
    start = lengths.index(longest) - longest  # may be -1
    return float(lrs[max(start + longest // 3 + longest // 6, 0)])


def slide(
    lrs: Sequence[float], losses: Sequence[float], width: int = 15, threshold: float = 0.005
) -> float:
    """The learning rate at the left end of a window that slides from the right, down to where the
    slope has settled.

    The window holds two points, `width` apart; it goes on to the left while the slopes there, by
    point, differ by more than `threshold`. It depends on the scale of the losses.

    >>> slide([10.0**n for n in range(-20, 0)], [1.0] * 18 + [3.0, 9.0])
    1e-18
    """
    _enough("slide", losses, width + 1)
    slopes = np.gradient(np.asarray(losses, dtype=np.float64))
    right, left = len(losses) - 1, len(losses) - 1 - width
    found = left
    while left >= 0 and abs(slopes[right] - slopes[left]) > threshold:
        found, right, left = left, right - 1, left - 1
    return float(lrs[found])


def minimum(lrs: Sequence[float], losses: Sequence[float]) -> float:
    """A tenth of the learning rate with the smallest loss.

    >>> minimum([0.001, 0.01, 0.1, 1.0], [2.0, 1.0, 0.5, 3.0])
    0.01
    """
    _enough("minimum", losses, 1)
    return float(lrs[int(np.argmin(np.asarray(losses)))]) / 10


def steep(lrs: Sequence[float], losses: Sequence[float]) -> float:
    """The learning rate after which the loss falls the most steeply, over the logarithm of the
    learning rate.

    >>> steep([0.001, 0.01, 0.1, 1.0], [2.0, 1.9, 0.5, 3.0])
    0.01
    """
    _enough("steep", losses, 2)
    rises = np.diff(np.asarray(losses, dtype=np.float64))
    steps = np.diff(np.log(np.asarray(lrs, dtype=np.float64)))
    slopes = rises / steps
    return float(lrs[int(np.argmin(slopes))])


def _enough(rule: str, losses: Sequence[float], least: int) -> None:
    if len(losses) < least:
        raise ValueError(
            f"{rule}: needs {least} points of the curve, got {len(losses)}. Run lr_find with more "
            f"iterations or a "
            f"larger stop_factor (the first iterations // 10 and the last 5 batches are no part of "
            f"the curve, nor what "
            f"follows a loss that is not finite: if the first one is not, look at the model and "
            f"the data)."
        )
