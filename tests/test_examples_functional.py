"""What training by pure functions promises, in the examples that use it: derivatives through steps,
and ensembles whose members are single runs.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from functional_sgd import split, value_and_grad
from tests.comparing import assert_close, member


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], Any]]:
    """An example as a module, by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
        yield importlib.import_module


def assert_derivative(value: Callable[[Any], Tensor], at: dict[str, Tensor], seed: int = 0) -> None:
    """The gradient agrees with a central difference along a random direction, in float64."""
    generator = torch.Generator().manual_seed(seed)
    along = {
        name: torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        for name, leaf in at.items()
    }

    def moved(size: float) -> float:
        return value({name: leaf + size * along[name] for name, leaf in at.items()}).item()

    _, grads = value_and_grad(value)(at)
    exact = sum((grads[name] * along[name]).sum().item() for name in at)
    assert abs(exact) > 1e-3
    assert (moved(1e-5) - moved(-1e-5)) / 2e-5 == pytest.approx(exact, rel=1e-6)


def test_maml_differentiates_through_the_inner_steps(example: Any) -> None:
    maml, generator = example("maml"), torch.Generator().manual_seed(0)
    params = maml.network(generator, width=6, dtype=torch.float64)
    x, y = maml.tasks(3, 8, generator, dtype=torch.float64)
    assert_derivative(lambda params: maml.meta_loss(params, x, y, steps=3), params)


def test_maml_maps_what_a_loop_over_tasks_would_do(example: Any) -> None:
    maml, generator = example("maml"), torch.Generator().manual_seed(0)
    params = maml.network(generator, width=6, dtype=torch.float64)
    x, y = maml.tasks(3, 8, generator, dtype=torch.float64)
    alone = [
        maml.loss(maml.adapted(params, a[:4], b[:4], 3), a[4:], b[4:])
        for a, b in zip(x, y, strict=True)
    ]
    torch.testing.assert_close(
        maml.meta_loss(params, x, y, steps=3), torch.stack(alone).mean(), rtol=1e-13, atol=0
    )


def test_a_run_is_differentiated_by_the_lr_of_every_leaf(example: Any) -> None:
    learn, generator = example("learn_the_lr"), torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = learn.network().double()
    params, _ = split(model)
    x = torch.randn(5, 8, 64, generator=generator, dtype=torch.float64)
    y = torch.randint(10, (5, 8), generator=generator)
    batches = list(zip(x[:4], y[:4], strict=True))
    log_lrs = {name: torch.tensor(0.3, dtype=torch.float64).log() for name in params}

    def run(log_lrs: dict[str, Tensor]) -> Tensor:
        found: Tensor = learn.after_training(log_lrs, model, params, batches, (x[4], y[4]))
        return found

    assert_derivative(run, log_lrs)


def test_members_of_the_ensemble_are_single_runs(example: Any) -> None:
    """Each with an lr of its own."""
    ensemble, generator = example("ensemble"), torch.Generator().manual_seed(0)
    lrs = torch.tensor([0.001, 0.01, 0.1], dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        singles = [ensemble.first_weights(seed, "cpu", torch.float64) for seed in range(3)]
    params = ensemble.stacked(singles)
    state = torch.func.vmap(ensemble.OPT.init)(params)
    step = partial(ensemble.step, ensemble.OPT)
    mapped = torch.func.vmap(step, in_dims=(0, 0, 0, None, None))
    x = torch.randn(4, 8, 64, generator=generator, dtype=torch.float64)
    y = torch.randint(10, (4, 8), generator=generator)
    alone = [(single, ensemble.OPT.init(single)) for single in singles]
    for images, labels in zip(x, y, strict=True):
        params, state, _ = mapped(params, state, lrs, images, labels)
        alone = [step(*one, lr, images, labels)[:2] for one, lr in zip(alone, lrs, strict=True)]
    for index, one in enumerate(alone):
        assert_close((member(params, index), member(state, index)), one, rtol=1e-9, atol=1e-12)
