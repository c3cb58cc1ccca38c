"""Models that return dataclasses, dicts of their own class, and things that are no tensors."""

from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from functional_sgd import sgd
from loop import DataLoaders, MixedPrecision, fit, predict, sample_losses, trace, validate
from tests.comparing import assert_close, assert_same
from tests.loop.helpers import batches, learner, linear, losses, on


@dataclass
class Output:
    """A plain one."""

    logits: Tensor
    scale: float = 1.0
    hidden: Tensor | None = None


class ModelOutput(OrderedDict[str, Any]):
    """What Hugging Face's looks like: a dict by name, an attribute, and a dataclass."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None:
                super().__setitem__(field.name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]


@dataclass
class Named(ModelOutput):
    """One of those."""

    logits: Tensor | None = None
    hidden: Tensor | None = None


class Wrapped(nn.Module):
    """A linear layer whose output is in a record."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.inner, self.kind = linear(), kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(logits=self.inner(x))


def loss_of(output: Any, y: Tensor) -> Tensor:
    return mse_loss(output.logits, y)


KINDS = pytest.mark.parametrize("kind", [Output, Named])


def wrapped(kind: Any, **rest: Any) -> Any:
    return learner(Wrapped(kind), loss=loss_of, opt=sgd(lr=0.1), **rest)


@KINDS
def test_predictions_come_joined_in_the_same_record(kind: Any) -> None:
    mine, bare = wrapped(kind), learner(linear())
    found = predict(mine, mine.init())
    assert type(found) is kind
    assert_same(found.logits, predict(bare, bare.init()))
    assert found.hidden is None
    if kind is Named:
        assert list(found) == ["logits"]
        assert found["logits"] is found.logits


def test_what_is_no_tensor_comes_as_a_tuple_of_all_batches() -> None:
    mine = wrapped(Output)
    assert predict(mine, mine.init()).scale == (1.0, 1.0)


def test_numbers_of_batches_are_stacked() -> None:
    class Summed(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"sum": super().forward(x).sum()}

    mine = learner(Summed(2, 2), loss=lambda output, y: output["sum"])
    assert predict(mine, mine.init())["sum"].shape == (2,)


@KINDS
def test_training_is_as_without_the_record_and_leaves_no_graph(kind: Any) -> None:
    mine, bare = wrapped(kind), learner(linear(), opt=sgd(lr=0.1))
    assert losses(fit(mine, mine.init(), 2)) == losses(fit(bare, bare.init(), 2))
    for event, state in trace(mine, mine.init()):
        if event == "after_backward":
            assert not state.pred.logits.requires_grad


@KINDS
def test_losses_of_samples_know_the_record(kind: Any) -> None:
    mine, bare = wrapped(kind), learner(linear())
    found, expected = sample_losses(mine, mine.init()), sample_losses(bare, bare.init())
    assert_close(found.losses, expected.losses)
    assert_same(found.preds.logits, expected.preds)


@KINDS
def test_mixed_precision_gives_float32_in_the_record(kind: Any) -> None:
    mine, seen = wrapped(kind, callbacks=[MixedPrecision()]), []
    spy = on(after_pred=lambda state: seen.append(state.pred.logits.dtype), order=100)
    fit(mine, mine.init(), 1, [spy])
    assert set(seen) == {torch.float32}


@KINDS
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_batch_gives_the_record_too(kind: Any) -> None:
    mine, seen = wrapped(kind), []
    spy = on(after_pred=lambda state: seen.append(state.pred.logits.clone()))
    found = fit(mine, mine.init(), 1, [spy], compile=True)
    compiled, seen[:] = list(seen), []
    assert_close(losses(found), losses(fit(mine, mine.init(), 1, [spy])), atol=1e-6)
    assert_close(compiled, list(seen), atol=1e-6)


class ByKeyword(nn.Module):
    """What Hugging Face's models look like: named inputs, and a loss if there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(
        self, *, values: Tensor, scale: Tensor | None = None, labels: Tensor | None = None
    ) -> Any:
        logits = self.inner(values * (1 if scale is None else scale))
        return {"logits": logits, "loss": None if labels is None else mse_loss(logits, labels)}


def as_dicts(seed: int, target: str = "labels") -> list[dict[str, Tensor]]:
    ones = torch.ones(())
    return [{"values": x, target: y, "scale": ones} for x, y in batches(3, seed)]


def by_name(target: str = "labels", **rest: Any) -> Any:
    data = DataLoaders(as_dicts(1, target), as_dicts(2, target))
    rest = {"loss": lambda output, y: mse_loss(output["logits"], y), **rest}
    return learner(ByKeyword(), data, opt=sgd(lr=0.1), **rest)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_batch_may_be_a_dict(compile: bool) -> None:
    """The loss gets the labels, the model everything else by name."""
    mine = by_name()
    bare = learner(linear(), DataLoaders(batches(3, 1), batches(3, 2)), opt=sgd(lr=0.1))
    end, expected = fit(mine, mine.init(), 2, compile=compile), fit(bare, bare.init(), 2)
    assert_close(losses(end), losses(expected), atol=1e-6)
    found = validate(mine, end)["valid_loss"]
    assert found == pytest.approx(validate(bare, expected)["valid_loss"], abs=1e-6)
    assert_close(predict(mine, end)["logits"], predict(bare, expected), atol=1e-6)


def test_the_learner_says_which_entries_of_a_dict_are_targets() -> None:
    mine, usual = by_name("wanted", targets="wanted"), by_name()
    assert losses(fit(mine, mine.init(), 1)) == losses(fit(usual, usual.init(), 1))


def test_without_targets_the_model_gets_the_labels_and_the_loss_its_output() -> None:
    mine, usual = by_name(targets=(), loss=lambda output: output["loss"]), by_name()
    end, expected = fit(mine, mine.init(), 1), fit(usual, usual.init(), 1)
    assert losses(end) == losses(expected)
    assert end.history.rows == expected.history.rows


def test_a_dict_without_labels_can_be_predicted() -> None:
    mine = by_name()
    data = [{"values": x} for x, _ in batches(3, 2)]
    assert_same(predict(mine, mine.init(), data)["logits"], predict(mine, mine.init())["logits"])


def test_a_missing_target_is_an_error_that_names_it() -> None:
    mine = by_name(targets=("labels", "weights"))
    with pytest.raises(ValueError, match=r"has no \['weights'\], only \['values', 'labels'"):
        fit(mine, mine.init(), 1)


def test_an_error_note_has_the_shape_of_a_numpy_batch_and_not_its_numbers() -> None:
    x = torch.zeros(100, 2).numpy()
    mine = learner(data=DataLoaders([(x, torch.zeros(100, 2))]))
    with pytest.raises(TypeError) as caught:
        fit(mine, mine.init(), 1)
    assert "float32[100, 2]" in caught.value.__notes__[-1]
    assert "0., 0." not in caught.value.__notes__[-1]
