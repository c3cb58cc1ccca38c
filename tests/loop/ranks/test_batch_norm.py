"""Which BatchNorm layers see the batches of all ranks, and which are refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from loop import global_batch_norm
from loop.ranks.batch_norm import GlobalBatchNorm
from tests.ranks import Ranks


class Halved(nn.BatchNorm1d):
    """A layer that does what no other does."""

    def forward(self, input: Tensor) -> Tensor:
        """Half of what others give."""
        return super().forward(input) / 2


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, value: Tensor) -> Tensor:
        """Twice the value."""
        return value * 2


def shared(kind: str) -> tuple[list[bool], list[str], int]:
    """What is global of a model that has one layer in two places; the names that it has in the end;
    and how often the layer's hook was called.
    """
    norm, called = nn.BatchNorm1d(2), []
    inner: nn.Module = nn.Sequential(norm) if kind == "apart" else norm
    model = nn.Sequential(norm, nn.Tanh(), inner)
    norm.register_forward_hook(lambda *_: called.append(True))
    own = global_batch_norm(model)
    own(torch.ones(2, 2))
    found = own[2][0] if kind == "apart" else own[2]
    same = [type(own[0]) is GlobalBatchNorm, found is own[0], type(norm) is nn.BatchNorm1d]
    assert own.state_dict().keys() == model.state_dict().keys()
    return same, [name for name, _ in own.named_parameters()], len(called)


@pytest.mark.parametrize("kind", ["beside", "apart"])
def test_a_layer_in_two_places_stays_one_and_keeps_its_hooks(ranks: Ranks, kind: str) -> None:
    assert ranks(shared, kind) == [([True] * 3, ["0.weight", "0.bias"], 2)] * 2


def refused() -> list[str]:
    """What is said of layers that compute something else."""
    parametrized, patched = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    register_parametrization(parametrized, "weight", Doubled())
    patched.forward = nn.Identity().forward  # type: ignore[method-assign]
    said = []
    for layer in (Halved(2), patched, parametrized):
        with pytest.raises(ValueError, match="give the model a layer of torch.nn") as caught:
            global_batch_norm(nn.Sequential(layer))
        said.append(str(caught.value))
    return said


def test_a_layer_that_computes_something_else_is_refused_by_name(ranks: Ranks) -> None:
    for own, patched, parametrized in ranks(refused):
        assert "'0' of the model, a Halved, has a forward pass of its own" in own
        assert "'0' of the model, a BatchNorm1d, has a forward pass of its own" in patched
        assert "a ParametrizedBatchNorm1d, has a parametrization" in parametrized


def test_layers_that_are_global_or_synchronized_already_become_those_of_the_mesh(
    ranks: Ranks,
) -> None:
    assert ranks(again) == [[True, True]] * 2


def again() -> list[bool]:
    model = global_batch_norm(nn.Sequential(nn.SyncBatchNorm(2), nn.BatchNorm2d(2)))
    return [type(layer) is GlobalBatchNorm for layer in global_batch_norm(model)]
