"""Parameters that are not trained, batch norm that stands still, and groups of layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from functional_sgd import Optimizer, adam, adamw, fuse, lookahead, ranger, sgd
from loop import CancelBatch, GradientClip, Learner, State, fit, validate
from loop.callbacks import freezing
from loop.callbacks.freezing import BnFreeze, Freeze
from loop.layer_groups import exactly, layer_groups, matching, spread
from tests.comparing import assert_same
from tests.loop.helpers import Kept, batches, learned, learner, net, on

BODY = {"0.weight", "0.bias", "1.weight", "1.bias"}


def deep(opt: Optimizer | None = None, model: nn.Module | None = None, **rest: Any) -> Learner:
    """A linear layer, batch norm and another linear layer, without chance."""
    return learner(
        net(dropout=0.0) if model is None else model,
        opt=opt or sgd(lr=0.1, mom=0.9, wd=0.1),
        **rest,
    )


def moved(start: State, end: State) -> set[str]:
    """The names of the parameters that have changed."""
    return {
        name for name, value in start.params.items() if not torch.equal(value, end.params[name])
    }


@pytest.mark.parametrize("patterns", [("0.*", "1.*"), ["[01].*"], "[!4].*"], ids=str)
def test_frozen_parameters_stay_and_the_others_learn(patterns: Any) -> None:
    mine = deep()
    start = mine.init()
    assert moved(start, fit(mine, start, 2)) == {*start.params}
    assert moved(start, fit(mine, start, 2, [Freeze(patterns)])) == {"4.weight", "4.bias"}


@pytest.mark.parametrize(
    "make", [adamw, ranger, lambda: fuse(adamw()), lambda: lookahead(sgd(lr=0.1, wd=0.1))]
)
def test_neither_decay_nor_slots_move(make: Callable[[], Optimizer]) -> None:
    mine = deep(make())
    start = mine.init()
    end = fit(mine, start, 3, [Freeze("[01].*")])
    assert moved(start, end) == {"4.weight", "4.bias"}
    for slot, values in end.opt_state.items():
        if slot != "step":
            for name in BODY:
                assert_same(values[name], start.opt_state[slot][name])


def test_the_others_learn_as_if_alone() -> None:
    """As with torch's requires_grad=False."""
    model = net(dropout=0.0)
    mine = deep(model=model)
    found = fit(mine, mine.init(), 2, [Freeze("0.*")])
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    theirs = deep(model=model)
    expected = fit(theirs, theirs.init(), 2)
    assert "0.weight" in expected.buffers
    assert_same({name: found.params[name] for name in expected.params}, expected.params)


def test_clipping_does_not_count_what_is_frozen() -> None:
    lengths: list[float] = []

    def measure(state: State) -> None:
        grads = [grad.flatten() for grad in (state.grads or {}).values() if grad is not None]
        lengths.append(torch.cat(grads).norm().item())

    mine = deep()
    fit(
        mine,
        mine.init(),
        1,
        [Freeze("[01].*"), GradientClip(0.001), on(before_step=measure, order=100)],
    )
    assert lengths == pytest.approx([0.001] * 3, rel=1e-3)


def test_other_callbacks_see_no_gradient_of_what_is_frozen() -> None:
    """As if the loss did not depend on it."""
    seen: list[dict[str, bool]] = []
    spy = on(
        after_backward=lambda state: seen.append(
            {name: grad is None for name, grad in state.grads.items()}
        )
    )
    mine = deep()
    fit(mine, mine.init(), 1, [spy, Freeze("[01].*")])
    assert seen == [{name: name in BODY for name in mine.init().params}] * 3


def test_freezing_leaves_nothing_behind() -> None:
    mine = deep()
    start = mine.init()
    kept = Kept(start)
    end = fit(mine, start, 1, [Freeze("0.*")])
    kept.check()
    assert "freeze" not in {**end.memory, **end.resources}
    assert moved(end, fit(mine, end, 1)) == {*start.params}
    assert all(parameter.requires_grad for parameter in mine.model.parameters())


def test_a_parameter_that_was_frozen_begins_with_the_first_step_of_a_fresh_one() -> None:
    """Of Adam, the first step is lr long, whatever the gradient; a late one would be longer."""
    mine = deep(adam(lr=0.01, eps=1e-12))
    frozen = fit(mine, mine.init(), 2, [Freeze("0.*")])
    counts = frozen.opt_state["step"].tolist()  # in the order of sorted names
    assert dict(zip(sorted(frozen.params), counts, strict=True)) == {
        **dict.fromkeys(frozen.params, 6),
        **dict.fromkeys(("0.weight", "0.bias"), 0),
    }
    end = fit(mine, frozen, steps=1)
    step = (end.params["0.weight"] - frozen.params["0.weight"]).abs()
    torch.testing.assert_close(step, torch.full_like(step, 0.01), rtol=1e-4, atol=0.0)


def test_a_run_with_freezing_can_be_resumed() -> None:
    def fail(state: State) -> None:
        if state.train_iter == 4:
            raise OSError("full")

    mine = deep(callbacks=[Freeze("0.*"), BnFreeze(all=True)])
    with pytest.raises(OSError, match="full") as caught:
        fit(mine, mine.init(), 2, [on(before_step=fail)])
    stopped = caught.value.state  # type: ignore[attr-defined]
    assert stopped.train_iter == 4
    assert_same(learned(fit(mine, stopped, 2, resume=True)), learned(fit(mine, mine.init(), 2)))


def test_a_pattern_that_matches_nothing() -> None:
    mine = deep()
    with pytest.raises(
        ValueError, match=r"Freeze: pattern 'bdoy.\*' matches no leaf. Leaves: 0.weight, 0.bias"
    ):
        fit(mine, mine.init(), 1, [Freeze("bdoy.*")])


def test_patterns_may_match_the_same_names() -> None:
    assert matching("test", dict.fromkeys(["a.w", "b.w"], torch.ones(1)), ["a.*", "a.w"]) == {"a.w"}


@pytest.mark.parametrize("patterns", ["*", ("*.weight", "*.bias")])
def test_something_must_be_left_to_train(patterns: Any) -> None:
    mine = deep()
    with pytest.raises(ValueError, match="leaves no parameter to train"):
        fit(mine, mine.init(), 1, [Freeze(patterns)])


def statistics(state: State) -> dict[str, torch.Tensor]:
    """What batch norm keeps."""
    return {name: value for name, value in state.buffers.items() if name.startswith("1.")}


@pytest.mark.parametrize(
    ("callbacks", "still"),
    [
        ([], False),
        ([BnFreeze()], False),
        ([Freeze("1.*")], False),
        ([Freeze("1.weight"), BnFreeze()], False),
        ([Freeze("1.*"), BnFreeze()], True),
        ([BnFreeze(), Freeze("[01].*")], True),
        ([BnFreeze(all=True)], True),
    ],
    ids=str,
)
def test_statistics_stand_still_where_the_layer_is_frozen(
    callbacks: list[Any], still: bool
) -> None:
    mine = deep()
    start = mine.init()
    end = fit(mine, start, 2, callbacks)
    same = [torch.equal(value, end.buffers[name]) for name, value in statistics(start).items()]
    assert same == [still] * 3


def test_parameters_that_require_no_gradient_are_frozen_too() -> None:
    mine = deep()
    for parameter in mine.model[1].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    start = mine.init()
    assert_same(statistics(fit(mine, start, 2, [BnFreeze()])), statistics(start))


def test_a_frozen_layer_normalises_by_its_statistics() -> None:
    """The training loss is that of evaluation mode."""
    mine = deep()
    start = mine.init()
    start = start.replace(buffers={**start.buffers, "1.running_mean": torch.full((4,), 0.7)})
    end = fit(mine, start, 1, [BnFreeze(all=True)], lr=0.0)
    first = validate(mine, start, batches(3, seed=1)[:1])["valid_loss"]
    assert float(end.history.losses[0]) == pytest.approx(first, rel=1e-6)
    assert float(fit(mine, start, 1, lr=0.0).history.losses[0]) != pytest.approx(first, rel=1e-3)


class Plain(nn.Sequential):
    """Batch norm without parameters, beside and inside of layers that have some."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
        super().__init__(nn.Linear(2, 4), nn.BatchNorm1d(4, affine=False), inner, nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("callbacks", "still"),
    [
        ([BnFreeze()], []),
        ([BnFreeze(), Freeze("2.0.*")], ["2.1"]),
        ([BnFreeze(), Freeze("0.*")], []),
        ([BnFreeze(all=True)], ["1", "2.1"]),
    ],
    ids=str,
)
def test_batch_norm_without_parameters_goes_with_what_is_around_it(
    callbacks: list[Any], still: list[str]
) -> None:
    with torch.random.fork_rng(devices=[]):
        mine = deep(model=Plain())
    start = mine.init()
    end = fit(mine, start, 1, callbacks)
    found = [
        path
        for path in ("1", "2.1")
        if torch.equal(*(s.buffers[f"{path}.running_mean"] for s in (start, end)))
    ]
    assert found == still


@pytest.mark.parametrize("how", ["to the end", "CancelBatch", "an error"])
def test_the_model_gets_its_modes_back(how: str) -> None:
    mine = deep()
    modes = [layer.training for layer in mine.model.modules()]
    seen: list[list[bool]] = []

    def look(state: State) -> None:
        seen.append([layer.training for layer in mine.model.modules()])
        if how != "to the end":
            raise CancelBatch(state) if how == "CancelBatch" else ValueError

    try:
        fit(mine, mine.init(), 1, [BnFreeze(all=True), on(after_pred=look)])
    except ValueError:
        assert how == "an error"
    assert all(seen[0])
    assert [layer.training for layer in mine.model.modules()] == modes


def test_an_error_in_the_model_gives_the_modes_back() -> None:
    model = net()
    mine = deep(model=nn.Sequential(model, nn.Linear(3, 3)))
    with pytest.raises(RuntimeError):
        fit(mine, mine.init(), 1, [BnFreeze(all=True)])
    assert all(layer.training for layer in mine.model.modules())


def test_validation_is_in_evaluation_mode_anyway() -> None:
    mine = deep()
    start = mine.init()
    assert validate(deep(callbacks=[BnFreeze(all=True)]), start) == validate(mine, start)


def test_layers_are_looked_up_once_a_phase_and_not_for_every_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, is_trained = list[str](), freezing.is_trained
    monkeypatch.setattr(
        freezing,
        "is_trained",
        lambda model, path, trained: asked.append(path) or is_trained(model, path, trained),
    )
    mine = deep()
    fit(mine, mine.init(), 2, [BnFreeze()])
    assert asked == ["1", "1"]


def test_groups_are_the_children_in_order() -> None:
    params = nn.Sequential(*(nn.Linear(1, 1) for _ in range(11))).state_dict()
    assert [group[0] for group in layer_groups(params)] == [
        f"{index}.weight" for index in range(11)
    ]


def test_parameters_of_the_model_itself_are_a_group() -> None:
    assert layer_groups(nn.Linear(1, 1).state_dict()) == (("weight", "bias"),)
    model = nn.Module()
    model.scale, model.inner = (
        nn.Parameter(torch.ones(1)),
        nn.Sequential(nn.Linear(1, 1, bias=False)),
    )
    assert layer_groups(dict(model.named_parameters())) == (("scale",), ("inner.0.weight",))


def test_groups_by_pattern() -> None:
    params = dict.fromkeys(["stem.w", "body.0.w", "body.1.w", "head.w"], torch.ones(1))
    assert layer_groups(params, "body.0*", "[bs]*", "*") == (
        ("body.0.w",),
        ("stem.w", "body.1.w"),
        ("head.w",),
    )
    with pytest.raises(ValueError, match=r"no pattern matches leaf 'head.w'"):
        layer_groups(params, "[bs]*")
    with pytest.raises(ValueError, match=r"pattern 'tail.\*' matches no leaf"):
        layer_groups(params, "tail.*", "*")


def test_rates_by_equal_factors() -> None:
    params = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4))).state_dict()
    rates = spread(params, 1e-5, 1e-2)
    assert list(rates) == list(params)
    assert [
        rates[f"{index}.{kind}"] for index in range(4) for kind in ("weight", "bias")
    ] == pytest.approx([1e-5, 1e-5, 1e-4, 1e-4, 1e-3, 1e-3, 1e-2, 1e-2], rel=1e-12)
    assert rates["3.bias"] == 1e-2


def test_the_rate_of_a_single_group_is_the_high_one() -> None:
    assert spread(nn.Linear(1, 1).state_dict(), 1e-5, 1e-2) == {"weight": 1e-2, "bias": 1e-2}


def test_a_spread_is_a_hyper() -> None:
    mine = deep(sgd(lr=0.1))
    start = mine.init()
    end = fit(mine, start, 1, lr=spread(start.params, 1e-30, 0.1))
    assert {name for name in moved(start, end) if name[0] != "1"} == {"4.weight", "4.bias"}


@pytest.mark.parametrize("values", [(0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_rates_are_above_0(values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="spread: low and high must be above 0"):
        spread({}, *values)


@pytest.mark.parametrize("groups", [[["a"]], [["a"], ["b", "b"]], [["a", "b", "c"]]], ids=str)
def test_every_parameter_is_in_one_group(groups: list[list[str]]) -> None:
    with pytest.raises(
        ValueError, match="spread: every parameter must be in one group, which is not so for [bc]"
    ):
        spread(dict.fromkeys("ab", torch.ones(1)), 0.1, 1.0, groups)


def test_names_as_patterns() -> None:
    params = dict.fromkeys(["a[0]", "a0", "a*", "ab"], torch.ones(1))
    assert matching("test", params, exactly(["a[0]", "a*"])) == {"a[0]", "a*"}
