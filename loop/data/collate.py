"""Make a batch of samples that are not equally long."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import default_collate

from functional_sgd.tree import Tree


def padding_collate(
    samples: Sequence[Tree], value: float = 0, target_value: float = -100
) -> tuple[Tensor, Tensor, *tuple[Tree, ...]]:
    """Sequences of unequal lengths as one tensor, with a mask of what is real: (padded, mask,
    *rest).

    A sample is a sequence (T, ...), or a tuple of one and targets. padded is (N, longest T, ...),
    filled up with `value`; mask is (N, longest T), True where there was something. Of the rest,
    tensors with axes are filled up to the longest with `target_value`, which cross_entropy ignores;
    numbers and tensors without axes are stacked. Other values of padding:
    `functools.partial(padding_collate, value=1)`. The model's forward takes both padded and mask if
    the Learner has n_inputs=2. Raises ValueError for no samples, samples of different kinds, or
    bools to be filled up with something else.

    >>> padded, mask, target = padding_collate([(torch.tensor([1, 2]), 0), (torch.tensor([3]), 1)])
    >>> padded.tolist(), mask.tolist(), target.tolist()
    ([[1, 2], [3, 0]], [[True, True], [True, False]], [0, 1])
    """
    rows: list[tuple[Tree, ...]] = []
    for sample in samples:
        has_targets = isinstance(sample, (tuple, list))
        row = tuple(sample) if has_targets else (sample,)
        rows.append(row)
    alike = len({len(row) for row in rows}) == 1  # of no samples there is no length
    if not alike or not all(isinstance(row[0], Tensor) for row in rows):
        raise ValueError(
            "padding_collate: samples must be tensors, or tuples of one length that begin with a "
            "tensor."
        )
    first, *rest = zip(*rows, strict=True)
    lengths = torch.tensor([len(sequence) for sequence in first])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    others = [_joined(column, target_value) for column in rest]
    return _padded(first, value), mask, *others


def _joined(column: Sequence[Tree], value: float) -> Tree:
    sequences = all(isinstance(entry, Tensor) and entry.dim() > 0 for entry in column)
    return _padded(column, value) if sequences else default_collate(list(column))


def _padded(sequences: Sequence[Tensor], value: float) -> Tensor:
    if sequences[0].dtype == torch.bool and value not in (0, 1):
        raise ValueError(
            f"padding_collate: sequences of bool cannot be filled up with {value}, which would be "
            f"True. "
            f"Choose 0 or 1, as with functools.partial(padding_collate, target_value=0), or "
            f"convert them."
        )
    return torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=value)
