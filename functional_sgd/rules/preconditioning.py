"""Rules that precondition both sides of a matrix, by what its gradients have been like.

Matrices are what `functional_sgd.rules.matrices` says. What is costly is done every so many steps.
"""

import torch
from torch import Tensor

from functional_sgd.decompositions import eigh, orthonormal, renewed
from functional_sgd.ranges import Count, Decay, NonNegative, Positive
from functional_sgd.reduction import root
from functional_sgd.rule import leafwise
from functional_sgd.rules.matrices import as_matrix, is_matrix, like_leaf
from functional_sgd.tracing import known_for_all

__all__ = ["average_in_eigenbasis", "precondition_sides"]

LONGEST = 10_000
"""A side that is longer has no matrix of its own, which would be as long and as wide."""


def left_zeros(param: Tensor) -> Tensor:
    """A zero for every two rows; a single one if there are too many, or none."""
    return _square_zeros(param, 0)


def right_zeros(param: Tensor) -> Tensor:
    """A zero for every two columns; a single one if there are too many, or none."""
    return _square_zeros(param, 1)


def _square_zeros(param: Tensor, side: int) -> Tensor:
    size = as_matrix(param).shape[side] if is_matrix(param) else LONGEST + 1
    return param.new_zeros(size, size) if size <= LONGEST else param.new_zeros(())


@leafwise(left=left_zeros, right=right_zeros, left_root=left_zeros, right_root=right_zeros)
def precondition_sides(
    grad: Tensor,
    left: Tensor,
    right: Tensor,
    left_root: Tensor,
    right_root: Tensor,
    *,
    step: Tensor,
    every: Count = 1,
    eps: Positive = 1e-6,
) -> dict[str, Tensor]:
    """Multiply a matrix from both sides by the inverse fourth roots of what its gradients have
    summed up to: AdaGrad for rows and columns that move together.

    left = left + grad grad';  right = right + grad' grad
    update = (left + eps)**(-1/4) grad (right + eps)**(-1/4)

    Reads grad, step, eps > 0 and every >= 1: the roots are taken anew in the first step, and then
    every so many. Keeps left and right, which start at 0, and their roots; a side longer than
    10,000 has none, and is left alone. Leaves of fewer than two axes stay as they are.

    Roots that are not due are not computed on the CPU; on other devices, and in programs that are
    recorded, they are, and thrown away. Source: Shampoo (Gupta et al. 2018).

    >>> grad, none = torch.tensor([[4.0, 0.0], [0.0, 9.0]]), torch.zeros(2, 2)
    >>> made = precondition_sides(grad, none, none, none, none, step=torch.tensor(1), eps=1e-9)
    >>> made["left"], made["update"]
    (tensor([[16.,  0.],
            [ 0., 81.]]), tensor([[1., 0.],
            [0., 1.]]))
    """
    if not is_matrix(grad):
        roots = dict(left_root=left_root.clone(), right_root=right_root.clone())
        return dict(update=grad, left=left.clone(), right=right.clone(), **roots)
    matrix = as_matrix(grad)
    left, right = _add_products(matrix, left, right, 1, 1)
    due = (step - 1) % every == 0
    left_root = renewed(due, left_root, lambda: _inverse_root(left, eps))
    right_root = renewed(due, right_root, lambda: _inverse_root(right, eps))
    update = like_leaf(_between(left_root, matrix, right_root), grad)
    return dict(update=update, left=left, right=right, left_root=left_root, right_root=right_root)


@leafwise(
    grad_avg=torch.zeros_like,
    sqr_avg=torch.zeros_like,
    left=left_zeros,
    right=right_zeros,
    left_basis=left_zeros,
    right_basis=right_zeros,
)
def average_in_eigenbasis(
    grad: Tensor,
    grad_avg: Tensor,
    sqr_avg: Tensor,
    left: Tensor,
    right: Tensor,
    left_basis: Tensor,
    right_basis: Tensor,
    *,
    step: Tensor,
    mom: Decay = 0.95,
    sqr_mom: Decay = 0.95,
    every: Count = 10,
    eps: NonNegative = 1e-8,
) -> dict[str, Tensor]:
    """Adam in the directions in which a matrix varies most, those of Shampoo's two sides.

    seen = left_basis' grad right_basis;  sqr_avg = sqr_mom * sqr_avg + (1 - sqr_mom) * seen**2
    grad_avg = mom * grad_avg + (1 - mom) * seen;  both debiased
    update = left_basis (grad_avg / (sqrt(sqr_avg) + eps)) right_basis'

    and then, for the steps to come: left = sqr_mom * left + (1 - sqr_mom) * grad grad', right
    likewise of grad' grad, and every so many steps the bases are turned towards the eigenvectors of
    these by a step of power iteration (in the order of their eigenvalues), and the averages with
    them: grad_avg is seen from the new ones, sqr_avg keeps its numbers in their order.

    The first step only finds the bases, from the first gradient: its update is 0, and it does not
    count for the averages. Reads grad, step, mom and sqr_mom in [0, 1), every >= 1 and eps >= 0; at
    eps = 0, what has had no gradient stays. A side longer than 10,000 has no basis; leaves of fewer
    than two axes have none, which leaves Adam.

    What is not due is not computed on the CPU; on other devices, and in programs that are recorded,
    it is, and thrown away. Source: SOAP (Vyas et al. 2024), numbers of its authors.

    >>> grad, none = torch.tensor([[0.0, 2.0]]), torch.tensor(0.0)
    >>> zero = torch.zeros(1, 2)
    >>> first = average_in_eigenbasis(grad, zero, zero, none, none, none, none,
    ...                               step=torch.tensor(1))
    >>> average_in_eigenbasis(grad, *[first[name] for name in list(first)[1:]],
    ...                       step=torch.tensor(2))["update"]
    tensor([[0.0000, 1.0000]])
    """
    first = step <= 1
    # 1 in the first step, too, which does not count: 1 - mom**0 would be a divisor of 0.
    count = torch.where(first, 1, step - 1)
    x, average, squares = (as_matrix(leaf) for leaf in (grad, grad_avg, sqr_avg))
    # Slots of a complex vector are those of a matrix of pairs, which it is not: step, a number,
    # stands in for them, and is left out of products.
    sides = (left, right) if is_matrix(grad) else (step, step)
    bases = (left_basis, right_basis) if is_matrix(grad) else sides
    seen = _between(_mirrored(bases[0]), x, bases[1])
    later = (step > 1).to(step.dtype)  # 0 in the first step, which leaves the averages alone
    average = (1 - later * (1 - mom)) * average + later * (1 - mom) * seen
    squares = (1 - later * (1 - sqr_mom)) * squares + later * (1 - sqr_mom) * seen.square()
    weight = torch.where(first, 0.0, (1 - sqr_mom**count).sqrt() / (1 - mom**count))
    divisor = root(squares) + eps
    # 0 in the first step, if eps is; a single NaN would be in all of the matrix.
    update = weight * average / torch.where(divisor == 0, 1.0, divisor)
    update = _between(bases[0], update, _mirrored(bases[1]))
    if is_matrix(grad):
        # After the update, as in the authors' code: no gradient is seen from a basis that it has
        # helped to find.
        left, right = _add_products(x, left, right, sqr_mom, 1 - sqr_mom)
        due = (step > 1) & (count % every == 0)
        left_basis, order = _turned(first, due, left, bases[0])
        squares = squares if order is None else squares[order]
        right_basis, order = _turned(first, due, right, bases[1])
        squares = squares if order is None else squares[:, order]
        average = renewed(
            due,
            average,
            lambda: _between(
                _from_basis(bases[0], left_basis),
                average,
                _mirrored(_from_basis(bases[1], right_basis)),
            ),
        )
    else:
        slots = (left, right, left_basis, right_basis)
        left, right, left_basis, right_basis = (slot.clone() for slot in slots)
    kept = dict(left=left, right=right, left_basis=left_basis, right_basis=right_basis)
    averages = dict(grad_avg=like_leaf(average, grad), sqr_avg=like_leaf(squares, grad))
    return dict(update=like_leaf(update, grad), **averages, **kept)


def _add_products(
    matrix: Tensor, left: Tensor, right: Tensor, kept: float | Tensor, share: float | Tensor
) -> tuple[Tensor, Tensor]:
    """kept * left + share * matrix matrix', and of the other side; of those that there are."""
    left = kept * left + share * (matrix @ matrix.mT) if left.dim() > 1 else left.clone()
    right = kept * right + share * (matrix.mT @ matrix) if right.dim() > 1 else right.clone()
    return left, right


def _between(left: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
    """left @ matrix @ right, where a factor that is no matrix is left out."""
    matrix = left @ matrix if left.dim() > 1 else matrix
    return matrix @ right if right.dim() > 1 else matrix


def _mirrored(side: Tensor) -> Tensor:
    """The transpose of a matrix."""
    return side.mT if side.dim() > 1 else side


def _from_basis(old: Tensor, new: Tensor) -> Tensor:
    """What takes directions of an old basis to those of a new one."""
    return new.mT @ old if old.dim() > 1 else old


def _inverse_root(matrix: Tensor, eps: float | Tensor) -> Tensor:
    """(matrix + eps)**(-1/4), of a symmetric matrix without negative eigenvalues."""
    if matrix.dim() < 2:
        return matrix.clone()
    values, vectors = eigh(matrix)
    # By rounding, eigenvalues of 0 come out slightly negative, and their roots would be NaN.
    return (vectors * (values.clamp(min=0) + eps) ** -0.25) @ vectors.mT


def _turned(
    first: Tensor, due: Tensor, matrix: Tensor, basis: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(The basis for the next step, the order in which it has the directions of the last; None if
    that is as it was).

    The eigenvectors in the first step, and one step of power iteration whenever it is due.
    """
    if matrix.dim() < 2:
        return basis.clone(), None
    # eigh begins with the smallest eigenvalue; the steps to come keep the largest in front.
    basis = renewed(first, basis, lambda: eigh(matrix)[1].flip(1))
    if known_for_all(due) is False:
        return basis, None
    product = matrix @ basis
    order = (basis * product).sum(0).argsort(descending=True, stable=True)
    turned = orthonormal(product[:, order])
    if known_for_all(due):
        return turned, order
    same = torch.arange(len(matrix), device=matrix.device)
    return torch.where(due, turned, basis), torch.where(due, order, same)
