"""Trees, tolerances and counters for the tests of `fuse`."""

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from functional_sgd import Chain, Rule, chain, fuse
from functional_sgd.fusion import segments
from tests.comparing import copy_of

Tree = Any
Pair = namedtuple("Pair", "left right")

REDUCING = 512
"""Further ulps where a norm goes in: as torch adds up 70,001 numbers in float32, it is so far off.
"""


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers, the same for all dtypes, with an exact zero in front."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    values = torch.randn(shape, generator=generator, dtype=wide).to(dtype)
    if values.numel() > 1:
        values.view(-1)[0] = 0
    return values


def plain_tree(dtype: torch.dtype) -> Tree:
    """Contiguous leaves: empty, 0-d, small, and one that is cut into chunks; one of them gets no
    gradient.
    """
    shapes = {
        "a": (0, 3),
        "b": [(), {"c": (3, 4)}],
        "d": Pair((70_001,), (5,)),
        "idle": (4,),
        "one": (1,),
    }
    return optree.tree_map(
        lambda shape: draw(shape, dtype, 1 + sum(shape)), shapes, is_leaf=lambda x: type(x) is tuple
    )


def odd_tree(dtype: torch.dtype) -> Tree:
    """The same, with a transposed and a strided leaf besides."""
    return {
        **plain_tree(dtype),
        "strided": draw((12,), dtype, 8)[::2],
        "turned": draw((5, 3), dtype, 9).T,
    }


def grads_for(params: Tree, seed: int) -> Tree:
    """Gradients: some transposed, strided or expanded in memory; None for the idle leaf."""
    number = iter(range(1000))

    def one(path: tuple[Any, ...], leaf: Tensor) -> Tensor | None:
        seed_here = 1000 * seed + next(number)
        if "idle" in path:
            return None
        if leaf.dim() == 2:
            return draw((leaf.shape[1], leaf.shape[0]), leaf.dtype, seed_here).T
        if leaf.shape == (5,):
            return draw((1,), leaf.dtype, seed_here).expand(5)
        return draw((*leaf.shape, 2), leaf.dtype, seed_here)[..., 0]

    return optree.tree_map_with_path(one, params)


def assert_near(
    found: Tree, expected: Tree, before: Tree, ulps: float = 2, more: float = 0
) -> None:
    """Equal to `ulps` roundings of the largest of the old value, the new one, and the largest
    change in the leaf.

    Every operation rounds as torch's does, except roots and powers, in which torch's own vectorised
    functions are an ulp off on some processors; the sum, quotient, product and difference after it
    then round once more each. An element in which large terms cancel has the error of its terms,
    which are of the size of its neighbours' changes. `more` are roundings of the working precision,
    where numbers come from reductions; of the lowest among the leaves'.
    """
    floats = [leaf.dtype for leaf in optree.tree_leaves(expected) if leaf.is_floating_point()]
    coarsest = max((torch.finfo(dtype).eps for dtype in floats), default=0.0)
    fine = min(coarsest, torch.finfo(torch.float32).eps)
    assert optree.tree_structure(found) == optree.tree_structure(expected)
    for path, new, wanted, old in zip(
        optree.tree_paths(expected),
        *map(optree.tree_leaves, (found, expected, before)),
        strict=True,
    ):
        assert new.dtype == wanted.dtype, path
        assert new.shape == wanted.shape, f"{path}: {new.shape}, expected {wanted.shape}"
        if not new.dtype.is_floating_point and not new.is_complex():
            assert torch.equal(new, wanted), path
            continue
        new, wanted, old = (
            torch.view_as_real(t) if t.is_complex() else t for t in (new, wanted, old)
        )
        eps = torch.finfo(new.dtype).eps
        new, wanted, old = (t.double() for t in (new, wanted, old))
        size = torch.stack([old.abs(), wanted.abs(), (wanted - old).abs()]).amax(0)
        size = size.clamp(min=_largest(wanted - old))
        error, allowed = (new - wanted).abs(), (ulps * eps + more * fine) * size
        bad = ~((error <= allowed) | (new == wanted) | (new.isnan() & wanted.isnan()))
        assert not bad.any(), (
            f"{path}: {new[bad][:3].tolist()}, expected {wanted[bad][:3].tolist()} at "
            f"{bad.nonzero()}"
        )


def _largest(change: Tensor) -> float:
    finite = change[change.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def tolerance_of(opt: Chain) -> float:
    """`more` of assert_near, for this chain."""
    return 0 if all(rule.scope == "elementwise" for rule in opt.rules) else REDUCING


def check_steps(
    opt: Chain,
    params: Tree,
    donate: bool = False,
    steps: int = 3,
    grads: Callable[[Tree, int], Tree] = grads_for,
    fused: Any = None,
    more: float | None = None,
    ulps: float = 2,
    **hyper: Any,
) -> tuple[Tree, Tree]:
    """Steps of the fused chain, each compared with the chain from the same state."""
    fused = fuse(opt, donate=donate) if fused is None else fused
    more = tolerance_of(opt) if more is None else more
    params, state = copy_of(params), opt.init(params)
    for number in range(steps):
        given = grads(params, number)
        before = copy_of((params, state))
        expected = opt(*copy_of((params,)), given, before[1], hyper)
        params, state = fused(params, given, state, hyper)
        assert_near((params, state), expected, before, ulps, more)
    return params, state


def kinds(opt: Any) -> list[str]:
    """What `explain` prints, a word for each segment."""
    return ["kernel" if segment.graph is not None else "torch" for segment in opt.segments]


def then_step(*rules: Rule, **hyper: Any) -> Chain:
    """These rules and a plain step."""
    from functional_sgd import sgd_step

    return chain(*rules, sgd_step, **{"lr": 0.1, **hyper})


def count_kernels(monkeypatch: Any) -> list[str]:
    """A list that grows with every kernel that is made."""
    made: list[str] = []
    real = segments.Launcher

    def counting(kernel: Any) -> Any:
        made.append(kernel.source)
        return real(kernel)

    monkeypatch.setattr(segments, "Launcher", counting)
    return made


def memory_of(tree: Tree) -> set[int]:
    """The storages of all leaves that have any memory."""
    return {leaf.untyped_storage().data_ptr() for leaf in optree.tree_leaves(tree) if leaf.numel()}
