"""Cut leaves into chunks, so that threads or programs share large ones out."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def cut_up(
    sizes: Sequence[int], chunk: int
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]:
    """Leaves of these sizes in chunks of at most so many elements.

    Returns the leaf of each chunk, its start and its length.

    >>> [array.tolist() for array in cut_up([5, 2], chunk=4)]
    [[0, 0, 1], [0, 4, 0], [4, 1, 2]]
    """
    leaf, start, count = [], [], []
    for index, size in enumerate(sizes):
        for begin in range(0, size, chunk):
            leaf.append(index)
            start.append(begin)
            count.append(min(chunk, size - begin))
    return (
        np.array(leaf, dtype=np.int32),
        np.array(start, dtype=np.int64),
        np.array(count, dtype=np.int32),
    )
