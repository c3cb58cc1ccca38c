"""Trees, tolerances and counters for the tests of `fuse`."""

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from functional_sgd import Chain, Rule, chain, fuse
from functional_sgd.fusion.backends.c import launch
from functional_sgd.fusion.passes import Pass
from tests.comparing import copy_of

Tree = Any
Pair = namedtuple("Pair", "left right")

REDUCING = 512
"""Further ulps where rules add up numbers with torch: of 70,001 in float32, it is so far off."""

SUMMING = 4096
"""Further ulps of double precision where rules declare sums: executors add up in other orders.

A kernel adds up 65,536 numbers in 8 or more lanes; if they are all the same, each of the 8,192
additions in a lane may err by half an ulp in the same direction.
"""


NUMBERS_OF_ROOTS = {"d_adapt_adagrad", "d_adapt_adam", "d_adapt_adam_decoupled"}
"""Recipes with a number of the tree, in float64, that is made of columns divided by roots.

Where roots are off by an ulp of the columns, so is it: by more, since its terms cancel.
"""


OF_SUMS = {*NUMBERS_OF_ROOTS, "d_adapt_sgd", "dog", "dowg"}
"""Recipes that keep sums of columns in the state, which foreach operators square in float32."""


class ExactRoots(TorchFunctionMode):
    """Square roots on the CPU are rounded correctly, as those in kernels are.

    With AVX-512, torch's own are an ulp off for a fifth of all float32 numbers, and for one of 70
    in float64. Everything else that the shipped rules do rounds alike in every executor.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, value = getattr(func, "__name__", ""), args[0] if args else None
        root = name == "sqrt" or (name in ("pow", "__pow__") and args[1:] == (0.5,))
        if root and type(value) is Tensor and value.is_cpu and not value.requires_grad:
            with np.errstate(invalid="ignore"):
                return torch.from_numpy(np.asarray(np.sqrt(value.numpy())))
        return func(*args, **(kwargs or {}))


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
    found: Tree,
    expected: Tree,
    before: Tree,
    ulps: float = 2,
    more: float = 0,
    wide: float = 0,
) -> None:
    """Equal to `ulps` roundings of the largest of the old value, the new one, and the largest
    change in the leaf.

    Every operation rounds as torch's does, except roots (see ExactRoots) and powers, in which
    torch's own vectorised functions are an ulp off on some processors; the sum, quotient, product
    and difference after it then round once more each. An element in which large terms cancel has
    the error of its terms, which are of the size of its neighbours' changes. `more` are roundings
    of the working precision (of the lowest among the leaves'), where rules add up with torch;
    `wide` those of double precision, where they declare reductions.
    """
    floats = [leaf.dtype for leaf in optree.tree_leaves(expected) if leaf.is_floating_point()]
    coarsest = max((torch.finfo(dtype).eps for dtype in floats), default=0.0)
    fine = min(coarsest, torch.finfo(torch.float32).eps)
    extra = more * fine + wide * torch.finfo(torch.float64).eps
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
        error, allowed = (new - wanted).abs(), (ulps * eps + extra) * size
        bad = ~((error <= allowed) | (new == wanted) | (new.isnan() & wanted.isnan()))
        assert not bad.any(), (
            f"{path}: {new[bad][:3].tolist()}, expected {wanted[bad][:3].tolist()} at "
            f"{bad.nonzero()[:3].tolist()}; {int(bad.sum())} of {bad.numel()} are off"
        )


def _largest(change: Tensor) -> float:
    finite = change[change.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def tolerance_of(opt: Chain) -> dict[str, float]:
    """`more` and `wide` of assert_near, for this chain."""
    by_torch = any(rule.scope != "elementwise" for rule in opt.rules)
    reduces = any(rule.signature.reductions for rule in opt.rules)
    return dict(more=REDUCING if by_torch else 0, wide=SUMMING if reduces else 0)


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
    allowed = {**tolerance_of(opt), **({} if more is None else {"more": more})}
    params, state = copy_of(params), opt.init(params)
    for number in range(steps):
        given = grads(params, number)
        before = copy_of((params, state))
        with ExactRoots():  # those of leaves that fused steps leave to torch, too
            expected = opt(*copy_of((params,)), given, before[1], hyper)
            params, state = fused(params, given, state, hyper)
        assert_near((params, state), expected, before, ulps, **allowed)
    return params, state


def kinds(opt: Any) -> list[str]:
    """What `explain` prints, a word for each step."""
    return ["kernel" if isinstance(step, Pass) else "torch" for step in opt.program.steps]


def then_step(*rules: Rule, **hyper: Any) -> Chain:
    """These rules and a plain step."""
    from functional_sgd import sgd_step

    return chain(*rules, sgd_step, **{"lr": 0.1, **hyper})


def count_kernels(monkeypatch: Any) -> list[str]:
    """A list that grows with every kernel that is made."""
    made: list[str] = []
    real = launch.c_source

    def counting(work: Any, dtypes: Any) -> Any:
        made.append(real(work, dtypes))
        return made[-1]

    monkeypatch.setattr(launch, "c_source", counting)
    return made


def memory_of(tree: Tree) -> set[int]:
    """The storages of all leaves that have any memory."""
    return {leaf.untyped_storage().data_ptr() for leaf in optree.tree_leaves(tree) if leaf.numel()}
