"""Batches that are read whole, and cut."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import default_collate

from loop.ranks.cut import Cut


def parts_of(batch: Any) -> list[Any]:
    """What each of two ranks has of it, tensors as lists."""
    return [plain(next(iter(Cut([batch], which, 2)))) for which in range(2)]


def plain(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.tolist()
    if isinstance(tree, dict):
        return {name: plain(one) for name, one in tree.items()}
    return type(tree)(map(plain, tree)) if isinstance(tree, (list, tuple)) else tree


def test_names_that_torch_has_collated_are_cut_with_their_samples() -> None:
    batch = default_collate([(torch.tensor(k), f"n{k}") for k in range(4)])
    assert parts_of(batch) == [[[0, 1], ("n0", "n1")], [[2, 3], ("n2", "n3")]]


def test_names_in_a_dict_are_cut_too() -> None:
    batch = default_collate([{"x": torch.tensor(k), "name": f"n{k}"} for k in range(3)])
    assert parts_of(batch) == [
        {"x": [0], "name": ["n0"]},
        {"x": [1, 2], "name": ["n1", "n2"]},
    ]


def test_a_list_with_a_dict_for_each_sample_is_cut() -> None:
    batch = (torch.arange(2), [{"box": torch.tensor([1, 2])}, {"box": torch.tensor([3, 4])}])
    assert parts_of(batch) == [([0], [{"box": [1, 2]}]), ([1], [{"box": [3, 4]}])]


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_batch_of_two_dicts_is_none_of_two_samples(kind: Any) -> None:
    batch = kind([{"x": torch.arange(2)}, {"y": torch.arange(2)}])
    assert parts_of(batch) == [kind([{"x": [0]}, {"y": [0]}]), kind([{"x": [1]}, {"y": [1]}])]


def test_a_pair_of_inputs_is_none_of_two_samples() -> None:
    batch = ((torch.arange(2), torch.arange(2)), torch.arange(2))
    assert parts_of(batch) == [(([0], [0]), [0]), (([1], [1]), [1])]


@pytest.mark.parametrize("first", [True, False])
def test_packed_sequences_are_refused(first: bool) -> None:
    packed, target = pack_sequence([torch.arange(3), torch.arange(2)]), torch.arange(2)
    batch = (packed, target) if first else (target, packed)
    with pytest.raises(TypeError, match=r"got a PackedSequence.* pack in the model's forward"):
        parts_of(batch)
