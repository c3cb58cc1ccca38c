"""Products of matrices: one by one, in batches, and their derivatives."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from functional_sgd.products import add_product


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


def quadratic(matrix: Tensor) -> Tensor:
    """0.3 m + 0.7 m m."""
    return add_product(matrix, matrix, matrix, beta=0.3, alpha=0.7)


def test_numbers_by_hand() -> None:
    matrix = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    assert add_product(matrix, matrix, matrix, 2.0, -1.0).tolist() == [[1.0, -4.0], [0.0, -3.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_batch_has_the_bits_of_each_matrix_alone(dtype: torch.dtype) -> None:
    batch = drawn(6, 40, 40, dtype=dtype)
    alone = torch.stack([quadratic(matrix) for matrix in batch])
    assert torch.equal(vmap(quadratic)(batch), alone)
    nested = vmap(vmap(quadratic))(batch.view(2, 3, 40, 40))
    assert torch.equal(nested.flatten(0, 1), alone)


def test_what_is_the_same_in_a_batch_need_not_be_given_twice() -> None:
    start, one, batch = drawn(2, 5), drawn(2, 3), drawn(3, 5, 4)
    found = vmap(add_product, (None, None, 2))(start, one, batch)
    for index, other in enumerate(batch.unbind(2)):
        torch.testing.assert_close(found[index], start + one @ other)
    outer = vmap(vmap(add_product, (None, None, 2)), (0, None, None))
    twice = outer(torch.stack([start, 2 * start]), one, batch)
    torch.testing.assert_close(twice[1], found + start)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_derivatives_forwards_backwards_and_twice() -> None:
    inputs = [drawn(*shape).requires_grad_() for shape in ((2, 4), (2, 3), (3, 4))]
    function = partial(add_product, beta=0.3, alpha=0.7)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)
