"""What a learner is made of, as a table."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from functional_sgd import adamw, by_path, sgd
from loop import DataLoaders, GradientClip, Learner, Progress, accuracy, summary
from tests.loop.helpers import Kept, full, learner, net, on, raiser

MINE = full(callbacks=[GradientClip()], metrics=[accuracy])


def layers(
    model: nn.Module, *inputs: Tensor, **rest: Any
) -> list[tuple[str, str, tuple[tuple[int, ...], ...]]]:
    """(name, kind, shapes) of what the summary of a model lists."""
    mine = Learner(
        model, DataLoaders([inputs]), nn.functional.mse_loss, sgd(), n_inputs=len(inputs), **rest
    )
    return [(layer.name, layer.kind, layer.shapes) for layer in summary(mine, mine.init()).layers]


def test_the_layers_with_what_comes_out_of_them() -> None:
    found = summary(MINE, MINE.init())
    assert found.inputs == ((8, 2),)
    assert [(layer.name, layer.kind, layer.shapes) for layer in found.layers] == [
        ("0", "Linear", ((8, 4),)),
        ("1", "BatchNorm1d", ((8, 4),)),
        ("2", "ReLU", ((8, 4),)),
        ("3", "Dropout", ((8, 4),)),
        ("4", "Linear", ((8, 2),)),
    ]


def test_the_parameters_of_the_layers() -> None:
    found = summary(MINE, MINE.init())
    assert [layer.trained for layer in found.layers] == [12, 8, 0, 0, 10]
    assert [layer.frozen for layer in found.layers] == [0] * 5


def test_the_sizes_in_elements_and_bytes() -> None:
    """AdamW keeps two averages in float32 and one int64 counter; BatchNorm two float32 and one
    int64.
    """
    assert summary(MINE, MINE.init()).sizes == {
        "trained": (30, 120),
        "frozen": (0, 0),
        "buffers": (9, 40),
        "optimizer": (66, 288),
    }


def test_frozen_parameters() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    model[4].requires_grad_(False)
    mine = learner(model)
    found = summary(mine, mine.init())
    assert [(layer.trained, layer.frozen) for layer in found.layers] == [
        (4, 8),
        (8, 0),
        (0, 0),
        (0, 0),
        (0, 10),
    ]
    assert found.sizes["frozen"] == (18, 72)
    assert found.sizes["buffers"] == (9, 40)


def test_the_rest_of_the_learner() -> None:
    found = summary(MINE, MINE.init().replace(hyper={"lr": 0.5}))
    assert found.opt == repr(MINE.opt)
    assert (found.hyper["lr"], found.hyper["mom"]) == (0.5, 0.9)
    assert (found.loss, found.metrics) == ("mse_loss", ("accuracy",))
    assert found.callbacks == ("gradient_clip", "recorder")


def test_a_layer_used_twice_is_listed_once() -> None:
    """With the shape of its first output."""
    act = nn.ReLU()
    assert layers(nn.Sequential(act, nn.Linear(2, 5), act), torch.ones(3, 2)) == [
        ("0", "ReLU", ((3, 2),)),
        ("1", "Linear", ((3, 5),)),
    ]


def test_a_tensor_that_two_layers_share_counts_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    mine = learner(model)
    assert [(layer.trained, layer.frozen) for layer in summary(mine, mine.init()).layers] == [
        (6, 0),
        (2, 0),
    ]


class Odd(nn.Module):
    """A parameter of its own, a layer that is not called, two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.inner = nn.Sequential(nn.Linear(2, 5))
        self.unused = nn.Linear(2, 3)
        self.idle = nn.ReLU()

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"first": self.inner(a) * self.scale, "second": b.sum()}


def test_a_model_of_an_odd_make() -> None:
    assert layers(Odd(), torch.ones(4, 2), torch.ones(7)) == [
        ("", "Odd", ((4, 5), ())),
        ("inner.0", "Linear", ((4, 5),)),
        ("unused", "Linear", ()),
    ]


def test_a_model_that_is_one_layer() -> None:
    assert layers(nn.Linear(2, 3), torch.ones(4, 2)) == [("", "Linear", ((4, 3),))]


@pytest.mark.parametrize("error", [None, RuntimeError("no")])
def test_nothing_is_changed(error: Exception | None) -> None:
    """The state, the random numbers, the modes, the hooks; even if the model fails."""
    mine = full()
    if error is not None:
        mine.model.append(nn.Identity())
        mine.model[5].forward = raiser(error)
    mine.model[1].eval()
    state = mine.init()
    kept, before = Kept(state), torch.get_rng_state()
    modes = [layer.training for layer in mine.model.modules()]
    if error is None:
        summary(mine, state)
    else:
        with pytest.raises(RuntimeError, match="no"):
            summary(mine, state)
    kept.check()
    assert torch.equal(torch.get_rng_state(), before)
    assert [layer.training for layer in mine.model.modules()] == modes
    assert not [layer for layer in mine.model.modules() if layer._forward_hooks]


def test_no_callback_is_called() -> None:
    mine = learner(
        callbacks=[
            on(before_fit=raiser(AssertionError), after_pred=raiser(AssertionError), name="spy")
        ]
    )
    assert summary(mine, mine.init()).callbacks == ("spy", "recorder")


def test_the_text() -> None:
    mine = learner(net(), opt=adamw(lr=0.01), callbacks=[Progress(), GradientClip()])
    state = mine.init()
    trees = state.replace(hyper={"lr": by_path(state.params, {"0.*": 0.25, "*": 0.5})})
    assert str(summary(mine, trees)).splitlines() == [
        "Sequential, input 4 x 2",
        "-----------------------------------------------",
        "layer  kind         output  parameters  trained",
        "-----------------------------------------------",
        "0      Linear       4 x 4           12      yes",
        "1      BatchNorm1d  4 x 4            8      yes",
        "2      ReLU         4 x 4",
        "3      Dropout      4 x 4",
        "4      Linear       4 x 2           10      yes",
        "-----------------------------------------------",
        "trained:    30  (120 bytes)",
        "frozen:      0    (0 bytes)",
        "buffers:     9   (40 bytes)",
        "optimizer:  66  (288 bytes)",
        "",
        f"optimizer:  {mine.opt!r}",
        "hypers:     lr=0.25 to 0.5, wd=0.01, mom=0.9, sqr_mom=0.999, eps=1e-08",
        "loss:       mse_loss",
        "metrics:    none",
        "callbacks:  gradient_clip, recorder, progress",
    ]


def test_the_text_of_large_and_frozen_layers() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1))
    model[1].requires_grad_(False)
    model[0].bias.requires_grad_(False)
    mine = Learner(
        model, DataLoaders([(torch.ones(1, 1024), torch.ones(1, 1))]), nn.functional.mse_loss, sgd()
    )
    lines = str(summary(mine, mine.init())).splitlines()
    assert lines[4:6] == [
        "0      Linear  1 x 1024   1,049,600  1,048,576",
        "1      Linear  1 x 1          1,025         no",
    ]
    assert lines[7].split() == ["trained:", "1,048,576", "(4.0", "MiB)"]
    assert lines[8].split() == ["frozen:", "2,049", "(8.0", "KiB)"]
