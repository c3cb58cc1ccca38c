"""Matrix optimizers against torch.optim, pytorch_optimizer and their authors' loops, in float64.

Where theirs iterates in bfloat16, the iteration is replaced by the same in float64, written out
here; that ours in bfloat16 is torch's bit for bit is a test of its own.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import Chain, Optimizer, chain
from functional_sgd.fusion.fused import fuse
from functional_sgd.randomness import key_of, normal

MATRICES = ((4, 3), (3, 5), (2, 2), (3, 5))
STEPS = 40
LEAVES = ((4, 3), (5,), (), (3, 3))


def draw(shapes: tuple[tuple[int, ...], ...], seed: int) -> list[Tensor]:
    """Random leaves."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def newton_schulz(matrix: Tensor, *rest: Any, **options: Any) -> Tensor:
    """Muon's iteration as its authors write it, in the precision of the matrix."""
    x = matrix.mT if matrix.size(0) > matrix.size(1) else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrix.size(0) > matrix.size(1) else x


class Wide:
    """torch, but what says float32 means float64."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name == "float32" else getattr(torch, name)


class Drawn(Wide):
    """torch, but it draws what ours draws, leaf after leaf and step after step."""

    def __init__(self, position: int) -> None:
        self.position, self.drawn = position, 0

    def randn_like(self, like: Tensor, **options: Any) -> Tensor:
        """As in whiten."""
        step, leaf = divmod(self.drawn, len(LEAVES))
        self.drawn += 1
        seed = fs.kron().init(torch.zeros(1))["seed"]
        own = key_of(seed, torch.tensor(1 + step), leaf=leaf, position=self.position)
        return normal(own, like)


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs do not round to lower precision on the way."""
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", newton_schulz)
    if importlib.util.find_spec("pytorch_optimizer") is not None:
        folder = "pytorch_optimizer.optimizer"
        monkeypatch.setattr(f"{folder}.muon.normuon.zero_power_via_newton_schulz_5", newton_schulz)
        monkeypatch.setattr(f"{folder}.soap.torch", Wide())
        place = [rule.name for rule in fs.kron().rules].index("whiten")
        monkeypatch.setattr(f"{folder}.psgd.torch", Drawn(place))


THEIRS: Any = importlib.import_module("torch.optim._muon")._zeropower_via_newtonschulz

Make = Callable[[list[Tensor]], torch.optim.Optimizer]


def other(name: str, **options: Any) -> Make:
    """An optimizer of pytorch_optimizer."""

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        kind: Any = getattr(pytest.importorskip("pytorch_optimizer"), name)
        made: torch.optim.Optimizer = kind(params, **options)
        return made

    return make


def nor_muon(**options: Any) -> Make:
    """Theirs wants groups."""

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        return other("NorMuon", foreach=False, **options)([dict(params=params, use_muon=True)])  # type: ignore[list-item]

    return make


def their_kron(**options: Any) -> Make:
    """Theirs learns in every step, as ours does in the first 500."""
    wide = dict(precondition_dtype=torch.float64, pre_conditioner_update_probability=1.0)
    return other("Kron", lr=0.01, **wide, **options)


def torch_muon(**options: Any) -> Make:
    """torch's Muon."""
    return lambda params: torch.optim.Muon(params, lr=0.01, **options)


CASES: dict[str, tuple[Make, Chain, tuple[tuple[int, ...], ...], float]] = {
    "muon": (torch_muon(), fs.muon(lr=0.01), MATRICES, 1e-12),
    "muon, no nesterov": (
        torch_muon(nesterov=False, momentum=0.8),
        fs.muon(lr=0.01, nesterov=False, mom=0.8),
        MATRICES,
        1e-12,
    ),
    "muon, as large as adamw's": (
        torch_muon(adjust_lr_fn="match_rms_adamw", weight_decay=0.3),
        fs.muon(lr=0.01, adjust="match_rms_adamw", wd=0.3, bfloat16=False),
        MATRICES,
        1e-12,
    ),
    "normuon": (nor_muon(lr=0.01), fs.normuon(lr=0.01), MATRICES, 1e-9),
    "normuon wd": (
        nor_muon(lr=0.01, weight_decay=0.3, momentum=0.9, beta2=0.8, nesterov=False),
        fs.normuon(lr=0.01, wd=0.3, mom=0.9, sqr_mom=0.8, nesterov=False),
        MATRICES,
        1e-9,
    ),
    "shampoo": (other("Shampoo", lr=0.1), fs.shampoo(lr=0.1), MATRICES, 1e-9),
    "shampoo eps": (
        other("Shampoo", lr=0.1, matrix_eps=1e-2),
        fs.shampoo(lr=0.1, eps=1e-2),
        MATRICES,
        1e-9,
    ),
    "soap": (
        other("SOAP", lr=0.01, weight_decay=0.0, precondition_frequency=1000),
        fs.soap(lr=0.01, wd=0.0, every=1000),
        LEAVES,
        1e-9,
    ),
    "soap, turning": (
        other("SOAP", lr=0.01, weight_decay=0.0, precondition_frequency=3, betas=(0.9, 0.97)),
        fs.soap(lr=0.01, wd=0.0, every=3, mom=0.9, sqr_mom=0.97),
        LEAVES,
        1e-9,
    ),
    "kron": (
        their_kron(balance_prob=0.0),
        chain(fs.kron(lr=0.01), balanced=0.0),
        LEAVES,
        1e-7,  # for the 1e-6 that they add to a root mean square before they clip
    ),
    "kron, balanced": (
        their_kron(balance_prob=1.0, momentum=0.7),
        chain(fs.kron(lr=0.01, mom=0.7), balanced=1.0),
        LEAVES,
        1e-7,
    ),
}


def ends(opt: Optimizer, params: list[Tensor], steps: int) -> list[Tensor]:
    """Where ours goes."""
    state = opt.init(params)
    now: Any = [leaf.clone() for leaf in params]
    for step in range(steps):
        grads = draw(tuple(tuple(leaf.shape) for leaf in params), 1 + step)
        now, state = opt(now, grads, state)
    return list(now)


def their_ends(make: Make, params: list[Tensor], steps: int) -> list[Tensor]:
    """Where theirs goes."""
    leaves = [leaf.clone().requires_grad_() for leaf in params]
    opt = make(leaves)
    for step in range(steps):
        for leaf, grad in zip(
            leaves, draw(tuple(map(tuple, map(Tensor.size, leaves))), 1 + step), strict=True
        ):
            leaf.grad = grad
        opt.step()
    return [leaf.detach() for leaf in leaves]


def distance(one: list[Tensor], two: list[Tensor]) -> float:
    """The largest difference."""
    return max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", CASES)
def test_float64(name: str, fused: bool) -> None:
    make, opt, shapes, tolerance = CASES[name]
    params = draw(shapes, 0)
    ours = ends(fuse(opt) if fused else opt, params, STEPS)
    assert distance(ours, their_ends(make, params, STEPS)) <= tolerance


def test_the_comparison_can_fail() -> None:
    params = draw(LEAVES, 0)
    theirs = their_ends(CASES["soap"][0], params, 20)
    assert distance(ends(fs.soap(lr=0.01, wd=0.0, eps=1e-6), params, 20), theirs) > 1e-7


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (1, 7), (40, 24), (64, 200)], ids=str)
def test_bfloat16_is_that_of_torch_bit_for_bit(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = fs.orthogonalize_in_bfloat16(matrix)["update"]
    assert torch.equal(found, THEIRS(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7).float())


def test_muon_and_adamw_are_torchs() -> None:
    shapes = (*LEAVES, (2, 3))
    params = draw(shapes, 0)
    opt = fs.muon_with_adamw(lr=0.02, adamw_lr=0.01, wd=0.1, others=("4",))

    def both(leaves: list[Tensor]) -> Any:
        muon = torch.optim.Muon([leaves[0], leaves[3]], lr=0.02, weight_decay=0.1)
        rest = [leaves[1], leaves[2], leaves[4]]
        adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1)
        return Both(muon, adamw)

    assert distance(ends(opt, params, 50), their_ends(both, params, 50)) <= 1e-12


class Both:
    """Two optimizers that step together."""

    def __init__(self, *opts: torch.optim.Optimizer) -> None:
        self.opts = opts

    def step(self) -> None:
        """A step of each."""
        for opt in self.opts:
            opt.step()


@pytest.mark.parametrize("nesterov", [False, True])
def test_adamuon_as_its_authors_write_it(nesterov: bool) -> None:
    lr, wd, mom, eps = 0.02, 0.1, 0.9, 1e-11
    params = draw(MATRICES, 0)
    now = [leaf.clone() for leaf in params]
    buffers, squares = ([torch.zeros_like(leaf) for leaf in params] for _ in range(2))
    for step in range(50):
        for k, grad in enumerate(draw(MATRICES, 1 + step)):
            buffers[k].lerp_(grad, 1 - mom)
            g = grad.lerp(buffers[k], mom) if nesterov else buffers[k]
            g = newton_schulz(torch.sign(g))
            squares[k] = mom * squares[k] + (1 - mom) * g * g
            g = g / (squares[k].sqrt() + eps)
            scale = 0.2 * math.sqrt(g.numel()) / (g.norm() + eps)
            now[k] = now[k] * (1 - lr * wd) - lr * scale * g
    opt = fs.adamuon(lr=lr, mom=mom, sqr_mom=mom, wd=wd, eps=eps, nesterov=nesterov)
    assert distance(ends(opt, params, 50), now) <= 1e-9


def test_shampoo_keeps_its_roots_for_some_steps() -> None:
    params = draw(MATRICES, 0)
    now, lefts, rights, roots = [leaf.clone() for leaf in params], {}, {}, {}
    for step in range(20):
        for k, g in enumerate(draw(MATRICES, 1 + step)):
            lefts[k], rights[k] = lefts.get(k, 0) + g @ g.T, rights.get(k, 0) + g.T @ g
            if step % 4 == 0:
                roots[k] = [
                    inverse_fourth_root(one + 1e-4 * torch.eye(len(one)).to(one))
                    for one in (lefts[k], rights[k])
                ]
            now[k] = now[k] - 0.1 * roots[k][0] @ g @ roots[k][1]
    assert distance(ends(fs.shampoo(lr=0.1, eps=1e-4, every=4), params, 20), now) <= 1e-9


def inverse_fourth_root(matrix: Tensor) -> Tensor:
    """By a singular value decomposition."""
    left, values, right = torch.linalg.svd(matrix)
    return left @ (values**-0.25).diag() @ right
