"""The parts of a network that examples/lesson9_parts.py makes from scratch (N1 to N15 are rows of
lesson 9, 2019).
"""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from functional_sgd import split
from tests.comparing import assert_close, assert_same


def _load(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


parts = _load("lesson9_parts")
SQRT5 = math.sqrt(5)


@pytest.fixture(autouse=True)
def seed() -> Any:
    """Every test draws the same numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def noise(count: int, channels: int = 1) -> Tensor:
    """Images of deviation 1."""
    return torch.randn(count, channels, 28, 28)


def test_n1_torchs_first_weights_shrink_what_passes_and_ours_do_not() -> None:
    """Weights of deviation 1 / sqrt(3 * 25): outputs of 1 / sqrt(3), and less after a ReLU.
    Kaiming's: 1.
    """
    conv, x = nn.Conv2d(1, 32, 5), noise(100)
    assert parts.stats(conv.weight)[1] == pytest.approx(1 / math.sqrt(75), rel=0.05)
    out = conv(x)
    assert parts.stats(out)[1] == pytest.approx(0.58, rel=0.05)
    assert parts.stats(out.relu())[1] == pytest.approx(0.36, rel=0.1)
    assert parts.stats(functional.conv2d(x, parts.kaiming_uniform(conv.weight, a=1.0)))[
        1
    ] == pytest.approx(1, rel=0.05)


def test_n2_a_weight_is_outputs_inputs_height_width() -> None:
    """A convolution is a matrix times the unfolded image."""
    conv, x = nn.Conv2d(3, 4, 5, bias=False), noise(2, channels=3)
    assert tuple(conv.weight.shape) == (4, 3, 5, 5)
    by_hand = (conv.weight.flatten(1) @ functional.unfold(x, 5)).unflatten(-1, (24, 24))
    assert_close(by_hand, conv(x), rtol=1e-4, atol=1e-5)


def test_n3_receptive_field_and_fans() -> None:
    weight = torch.empty(32, 1, 5, 5)
    assert weight[0, 0].numel() == 25
    assert parts.fan_in_out(weight) == (25, 800)
    assert parts.fan_in_out(nn.Linear(50, 10).weight) == (50, 10)


def test_n4_gains() -> None:
    found = [parts.gain(a) for a in (1, 0, 0.01, 0.1, SQRT5)]
    assert found == pytest.approx(
        [1, 1.4142135624, 1.4141428570, 1.4071950895, 0.5773502692], rel=1e-10
    )


@pytest.mark.parametrize(("a", "use_fan_out"), [(0.0, False), (SQRT5, False), (0.1, True)])
def test_n5_uniform_weights_are_as_wide_as_torchs(a: float, use_fan_out: bool) -> None:
    """Bound sqrt(3) times the deviation, since uniform numbers within 1 have deviation 1
    / sqrt(3).
    """
    assert torch.empty(100_000).uniform_(-1, 1).std().item() == pytest.approx(
        1 / math.sqrt(3), rel=0.01
    )
    weight = torch.empty(64, 16, 5, 5)
    theirs = nn.init.kaiming_uniform_(
        weight.clone(), a, mode="fan_out" if use_fan_out else "fan_in"
    )
    ours = parts.kaiming_uniform(weight, a, use_fan_out)
    assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=1e-3)
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.02)


def deep(change: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Four convolutions with ReLU in between: the output's deviation, and that of the first
    weight's gradient.
    """
    convs = [
        nn.Conv2d(ni, nf, k, stride=2, padding=k // 2)
        for ni, nf, k in [(1, 8, 5), (8, 16, 3), (16, 32, 3)]
    ]
    convs.append(nn.Conv2d(32, 1, 3, stride=2, padding=1))
    for conv in convs:
        conv.weight.data = change(conv.weight.data)
        if change is not same:
            conv.bias.data.zero_()
    out = nn.Sequential(*[layer for conv in convs for layer in (conv, nn.ReLU())][:-1])(noise(100))
    functional.mse_loss(out.flatten(1).mean(1), torch.randn(100)).backward()
    assert convs[0].weight.grad is not None
    return parts.stats(out)[1], parts.stats(convs[0].weight.grad)[1]


def same(weight: Tensor) -> Tensor:
    """As torch made it."""
    return weight


def test_n6_n7_in_a_deep_net_outputs_and_gradients_shrink() -> None:
    """Each layer loses: outputs are more than 10 times smaller, gradients more than 3 times."""
    torchs, kaiming = deep(same), deep(parts.kaiming_uniform)
    assert kaiming[0] > 10 * torchs[0]
    assert kaiming[1] > 3 * torchs[1]


def test_n8_a_linear_weight_is_upside_down() -> None:
    layer, x = nn.Linear(5, 3), torch.randn(2, 5)
    assert tuple(layer.weight.shape) == (3, 5)
    assert_close(x @ layer.weight.T + layer.bias, layer(x))


SCORES, TARGET = (
    torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).double(),
    torch.tensor([3, 0, 1, 1, 2, 0]),
)


def test_n9_nll_by_integer_indexing() -> None:
    log_probs = SCORES.log_softmax(-1)
    assert_close(parts.nll(log_probs, TARGET), functional.nll_loss(log_probs, TARGET), rtol=1e-14)


def test_n10_three_ways_to_the_log_of_a_softmax() -> None:
    quotient = (SCORES.exp() / SCORES.exp().sum(-1, keepdim=True)).log()
    difference = SCORES - SCORES.exp().sum(-1, keepdim=True).log()
    for other in (quotient, difference, SCORES.log_softmax(-1)):
        assert_close(parts.log_softmax(SCORES), other, rtol=1e-12)


def test_n11_logsumexp_does_not_overflow() -> None:
    """log(2 exp(1000)) = 1000 + log 2, where exp(1000) is inf; the gradient is finite; rows of -inf
    are -inf.
    """
    x = torch.tensor([1000.0, 1000.0], dtype=torch.float64, requires_grad=True)
    assert x.exp().sum().log().item() == math.inf
    found = parts.logsumexp(x)
    assert found.item() == pytest.approx(1000.6931471805599, rel=1e-15)
    assert_close(torch.autograd.grad(found, x)[0], torch.tensor([0.5, 0.5], dtype=torch.float64))
    odd = torch.tensor([[-math.inf, -math.inf], [0.0, -math.inf], [math.inf, 0.0]])
    assert_same(parts.logsumexp(odd), torch.logsumexp(odd, -1))


def test_n12_cross_entropy_is_both() -> None:
    assert_close(
        parts.cross_entropy(SCORES, TARGET), functional.cross_entropy(SCORES, TARGET), rtol=1e-12
    )
    assert torch.autograd.gradcheck(
        lambda x: parts.cross_entropy(x, TARGET), SCORES.clone().requires_grad_()
    )


def test_n14_a_module_that_watches_what_is_assigned() -> None:
    """What is assigned is listed, but not what begins with an underscore: `_modules` would look for
    itself for ever.
    """
    module = parts.DummyModule()
    module.first = nn.Linear(2, 3)
    module._hidden = nn.Linear(2, 3)
    assert list(module._modules) == ["first"]
    assert [tuple(parameter.shape) for parameter in module.parameters()] == [(3, 2), (3,)]


def test_n15_four_versions_of_one_network() -> None:
    """Four parameters each, the same outputs, in the same order."""
    layers = [nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)]
    versions, x = parts.four_versions(*layers), torch.randn(7, 5)
    assert len(versions) == 4
    for version in versions:
        assert [tuple(parameter.shape) for parameter in version.parameters()] == [
            (4, 5),
            (4,),
            (3, 4),
            (3,),
        ]
        assert_same(version(x), versions[0](x))
    names = [list(split(version)[0]) for version in versions[1:]]
    assert names[0] == ["layer_0.weight", "layer_0.bias", "layer_2.weight", "layer_2.bias"]
    assert names[1] == ["layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"]
    assert names[2] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_n15_without_init_of_the_parent_nothing_can_be_registered() -> None:
    """super().__init__() makes `_modules`, which nn.Module's __setattr__ writes to."""
    bare = type("Bare", (nn.Module,), {"__init__": lambda self: None})()
    with pytest.raises(
        AttributeError, match=r"cannot assign module before Module.__init__\(\) call"
    ):
        bare.layer = nn.Linear(1, 1)
