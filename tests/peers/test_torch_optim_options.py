"""Every option of torch.optim that has numbers of its own: float64, a hundred steps, within 1e-12.

The sets of options are those of torch's own tests (torch/testing/_internal/common_optimizers.py),
but for those that choose an implementation, such as capturable, and some more.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_sgd as fs
from functional_sgd import Chain, Optimizer, chain
from tests.peers.late import gradients, largest_gap, start

pytestmark = pytest.mark.usefixtures("scalars_in_double")

STEPS = 100
O = torch.optim  # noqa: E741

BETAS = ("mom", "sqr_mom")
NAMES: dict[str, Any] = {
    "lr": "lr",
    "eps": "eps",
    "weight_decay": "wd",
    "betas": BETAS,
    "amsgrad": "amsgrad",
}
"""torch's name of an option -> ours; of a tuple, one for each entry."""

KINDS: dict[type[torch.optim.Optimizer], tuple[Callable[..., Chain], dict[str, Any]]] = {
    O.Adadelta: (fs.adadelta, {"rho": "sqr_mom"}),
    O.Adafactor: (
        fs.adafactor,
        {"eps": ("eps", "min_rms"), "d": "max_rms", "beta2_decay": "sqr_mom_decay"},
    ),
    O.Adagrad: (fs.adagrad, {"lr_decay": "lr_decay", "initial_accumulator_value": "first_sum"}),
    O.Adam: (fs.adam, {}),
    O.AdamW: (fs.adamw, {}),
    O.Adamax: (fs.adamax, {}),
    O.ASGD: (fs.asgd, {"lambd": "lambd", "alpha": "power", "t0": "average_from"}),
    O.NAdam: (fs.nadam, {"momentum_decay": "mom_decay"}),
    O.RAdam: (fs.radam, {}),
    O.RMSprop: (fs.rmsprop, {"alpha": "sqr_mom", "momentum": "mom", "centered": "centered"}),
    O.Rprop: (fs.rprop, {"etas": ("shrink", "grow"), "step_sizes": ("min_size", "max_size")}),
    O.SGD: (fs.sgd, {"momentum": "mom", "dampening": "dampening", "nesterov": "nesterov"}),
}

OPTIONS: dict[type[torch.optim.Optimizer], list[dict[str, Any]]] = {
    O.Adadelta: [
        {},
        {"lr": 0.01},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"weight_decay": 0.1, "maximize": True},
        {"rho": 0.95, "weight_decay": 0.9},
        {"eps": 1e-3},
    ],
    O.Adafactor: [
        {},
        {"weight_decay": 0.1, "lr": 0.01},
        {"weight_decay": 0.1, "maximize": True},
        {"beta2_decay": -1.0},
        {"d": 1.5},
        {"lr": 0.5, "eps": (1e-2, 0.5)},
    ],
    O.Adagrad: [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"lr": 0.1},
        {"initial_accumulator_value": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.1},
        {"eps": 1e-2},
    ],
    O.Adam: [
        {},
        {"lr": 0.01},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "amsgrad": True},
        {"betas": (0.8, 0.9), "amsgrad": True, "eps": 1e-3},
    ],
    O.AdamW: [
        {},
        {"lr": 0.01},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "amsgrad": True},
    ],
    O.Adamax: [
        {},
        {"lr": 0.1},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.9, "betas": (0.8, 0.9), "eps": 0.1},
    ],
    O.ASGD: [
        {},
        {"lambd": 0.1},
        {"lr": 0.02},
        {"t0": 100},
        {"maximize": True},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"t0": 10, "alpha": 0.5, "lambd": 0.5, "lr": 0.1},
    ],
    O.NAdam: [
        {},
        {"lr": 1e-3},
        {"momentum_decay": 6e-3},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "momentum_decay": 6e-3},
        {"weight_decay": 0.1, "momentum_decay": 6e-3, "decoupled_weight_decay": True},
        {"weight_decay": 0.1, "maximize": True},
        {"betas": (0.8, 0.9), "momentum_decay": 0.5, "eps": 1e-3},
    ],
    O.RAdam: [
        {},
        {"lr": 2e-3},
        {"eps": 1e-6},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"weight_decay": 0.1, "maximize": True},
    ],
    O.RMSprop: [
        {},
        {"lr": 1e-3},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"weight_decay": 0.1, "centered": True},
        {"maximize": True, "weight_decay": 0.1},
        {"weight_decay": 0.1, "centered": True, "momentum": 0.1},
        {"weight_decay": 0.1, "centered": True, "momentum": 0.1, "maximize": True},
    ],
    O.Rprop: [
        {},
        {"lr": 2e-4},
        {"etas": (0.5, 1.5)},
        {"step_sizes": (2e-6, 100)},
        {"maximize": True},
        {"step_sizes": (5e-3, 0.02)},
    ],
    O.SGD: [
        {},
        {"lr": 1e-2},
        {"weight_decay": 0.5},
        {"momentum": 0.9},
        {"weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
}
CASES = [(kind, options) for kind, every in OPTIONS.items() for options in every]


def ours_for(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> Chain:
    """The chain for these options of torch's."""
    recipe, own = KINDS[kind]
    hypers: dict[str, Any] = {}
    if kind is O.Adafactor:  # theirs is that of the dtype
        hypers["eps"] = torch.finfo(torch.float64).eps
    for name, value in options.items():
        ours = {**NAMES, **own}.get(name)
        if name == "beta2_decay":
            hypers[ours] = -value
        elif isinstance(ours, tuple):
            hypers |= dict(zip(ours, value, strict=True))
        elif ours is not None:
            hypers[ours] = value
    front: list[Any] = [fs.ascend] if options.get("maximize") else []
    if options.get("decoupled_weight_decay"):
        return chain(*front, fs.weight_decay, recipe(**{**hypers, "wd": None}), wd=hypers["wd"])
    return chain(*front, recipe(**hypers))


def give(params: list[Any], grads: list[Any]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()


@pytest.mark.parametrize(
    ("kind", "options"), CASES, ids=[f"{kind.__name__}-{options}" for kind, options in CASES]
)
def test_every_step_is_that_of_torch(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    """With leaves that have no gradient now and then, and one that joins late."""
    mirrored = [leaf.requires_grad_() for leaf in start()]
    make: Any = kind
    theirs = make(mirrored, **options)
    ours, params = ours_for(kind, options), start()
    state = ours.init(params)
    for grads in gradients(STEPS):
        give(mirrored, grads)
        theirs.step()
        params, state = ours(params, grads, state)
        assert largest_gap(params, mirrored) <= 1e-12
    if kind is O.ASGD:
        averages = [theirs.state[leaf]["ax"] for leaf in mirrored]
        assert largest_gap(ours.evaluated(params, state), averages) <= 1e-12


def test_nothing_is_left_out() -> None:
    """All of torch.optim but LBFGS and Muon, which are not of this kind, and SparseAdam, below."""
    every = {
        value
        for value in vars(torch.optim).values()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    others = {"Optimizer", "LBFGS", "Muon", "SparseAdam"}
    assert {kind for kind in every if kind.__name__ not in others} == OPTIONS.keys()


def test_a_new_rate_is_heeded_at_once_by_asgd() -> None:
    """By torch's one step later: so ours is given that of the step before."""
    mirrored, params = [torch.ones(3).requires_grad_()], [torch.ones(3)]
    theirs, ours = O.ASGD(mirrored, 0.05, lambd=0.5), fs.asgd(0.05, lambd=0.5)
    state, rate = ours.init(params), 0.05
    for step in range(20):
        grad, before = torch.full((3,), step - 7.0), rate
        give(mirrored, [grad])
        rate = theirs.param_groups[0]["lr"] = 0.05 / (1 + step % 4)
        theirs.step()
        params, state = ours(params, [grad], state, {"lr": before})
        assert largest_gap(params, mirrored) <= 1e-14


SPARSE: list[dict[str, Any]] = [
    {},
    {"lr": 0.01},
    {"betas": (0.8, 0.9), "eps": 1e-3},
    {"maximize": True},
]


def sparse_for(options: dict[str, Any]) -> Optimizer:
    """sparse_adam with these options of torch's."""
    given = {NAMES[name]: value for name, value in options.items() if isinstance(value, float)}
    opt = fs.sparse_adam(**given, **dict(zip(BETAS, options.get("betas", ()), strict=False)))
    (inner,) = opt.inner
    assert isinstance(inner, Chain)
    return fs.lazy_rows(chain(fs.ascend, inner)) if options.get("maximize") else opt


def sparse_grads() -> list[Tensor]:
    """For a table of 12 words: each step has some, often twice, and step 5 has none."""
    generator, grads = torch.Generator().manual_seed(0), []
    for step in range(STEPS):
        count = 0 if step == 5 else 6
        words = torch.randint(0, 12, (1, count), generator=generator)
        values = torch.randn(count, 3, generator=generator)
        grads.append(torch.sparse_coo_tensor(words, values, (12, 3), check_invariants=True))
    return grads


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("options", SPARSE, ids=str)
def test_sparse_adam_is_that_of_torch(options: dict[str, Any], dense: bool) -> None:
    """Given the same sparse gradients, or dense ones with rows of zeros."""
    table: Any = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    mirrored = table.clone().requires_grad_()
    theirs, ours = O.SparseAdam([mirrored], **options), sparse_for(options)
    state = ours.init(table)
    for grad in sparse_grads():
        mirrored.grad = grad.clone()
        theirs.step()
        table, state = ours(table, grad.to_dense() if dense else grad, state)
        assert largest_gap([table], [mirrored]) <= 1e-12


def test_sparse_adam_of_single_elements_is_that_of_torch() -> None:
    """A gradient that is sparse along both axes names elements."""
    table: Any = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    mirrored = table.clone().requires_grad_()
    theirs, ours = O.SparseAdam([mirrored], lr=0.1), fs.sparse_adam(lr=0.1)
    state, generator = ours.init(table), torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        grad = torch.randn(4, 3, generator=generator).clamp(min=0).to_sparse()
        mirrored.grad = grad.clone()
        theirs.step()
        table, state = ours(table, grad, state)
        assert largest_gap([table], [mirrored]) <= 1e-12


def test_an_embedding_with_sparse_gradients_trains_as_with_torchs() -> None:
    """As one of torch's optimizers, in place."""
    models = [nn.Embedding(10, 4, sparse=True) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [
        O.SparseAdam(models[0].parameters(), lr=0.1),
        fs.to_torch(fs.sparse_adam(lr=0.1), models[1].named_parameters()),
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        words = torch.randint(0, 10, (3,), generator=generator)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            (model(words) - 1).square().sum().backward()
            optimizer.step()
    assert largest_gap([models[1].weight.detach()], [models[0].weight]) <= 1e-12
