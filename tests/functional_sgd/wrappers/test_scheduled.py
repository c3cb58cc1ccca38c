"""scheduled: hypers as functions of the number of steps so far."""

from typing import Any

import pytest
import torch
from torch import Tensor

from functional_sgd import (
    accumulate,
    adamw,
    by_path,
    chain,
    momentum,
    partition,
    scheduled,
    sgd,
    sgd_step,
    weight_decay,
)
from functional_sgd.schedules import Constant, Join, Linear, one_cycle
from tests.catalogue import random_like, sample_tree
from tests.comparing import assert_close, assert_same

PARAMS = sample_tree(dtype=torch.float64)


def rates(opt: Any, count: int, **hyper: Any) -> list[float]:
    """How far each step goes along a gradient of 1."""
    params = torch.zeros(1, dtype=torch.float64)
    state, found = opt.init(params), []
    for _ in range(count):
        after, state = opt(params, torch.ones_like(params), state, hyper)
        found.append(float(params - after))
    return found


def test_without_steps_a_schedule_gets_the_number_of_steps_so_far() -> None:
    assert rates(scheduled(sgd(), lr=lambda step: 1 / (step + 1)), 4) == [1, 1 / 2, 1 / 3, 1 / 4]


def test_with_steps_it_gets_a_position_that_ends_at_1() -> None:
    assert rates(scheduled(sgd(), steps=4, lr=Linear(0.0, 1.0)), 6) == [0, 0.25, 0.5, 0.75, 1, 1]


def test_it_is_what_passing_the_values_is() -> None:
    rate, decay = one_cycle(0.1), Linear(0.1, 0.0)
    opt, plain = scheduled(adamw(), steps=8, lr=rate, wd=decay), adamw()
    params, state, expected, other = PARAMS, opt.init(PARAMS), PARAMS, plain.init(PARAMS)
    for number in range(8):
        grads, position = random_like(PARAMS, number), torch.tensor(number / 8, dtype=torch.float64)
        params, state = opt(params, grads, state)
        expected, other = plain(
            expected, grads, other, {"lr": rate(position), "wd": decay(position)}
        )
    assert_same((params, state), (expected, {"calls": torch.tensor(8), "inner": other}))


def test_what_is_passed_at_the_call_wins() -> None:
    opt = scheduled(sgd(), lr=lambda step: 1 / (step + 1))
    assert rates(opt, 2, lr=0.5) == [0.5, 0.5]
    after, _ = opt(torch.zeros(1), torch.ones(1), opt.init(torch.zeros(1)), lr=0.5)
    assert_same(after, torch.tensor([-0.5]))


def test_scheduled_hypers_have_no_default() -> None:
    opt = scheduled(adamw(), lr=lambda step: 1.0)
    assert "lr" not in opt.hyper
    assert opt.hyper == {name: value for name, value in adamw().hyper.items() if name != "lr"}
    assert opt.names == adamw().hyper.keys()


def test_a_hyper_without_default_may_be_scheduled() -> None:
    opt = scheduled(chain(weight_decay, sgd_step), lr=lambda step: 1.0)
    assert opt.required == ()
    assert rates(opt, 1) == [1.0]


def test_a_schedule_may_return_a_tree_prefix() -> None:
    params = {"body": torch.ones(1), "head": torch.ones(1)}
    opt = scheduled(sgd(), lr=lambda step: by_path(params, {"head": 0.5, "*": 0.25}))
    after, _ = opt(params, params, opt.init(params))
    assert_same(after, {"body": torch.tensor([0.75]), "head": torch.tensor([0.5])})


def test_a_constant_needs_no_length() -> None:
    assert rates(scheduled(sgd(), lr=Constant(0.5)), 2) == [0.5, 0.5]


def test_inside_accumulate_it_counts_actions_and_outside_calls() -> None:
    inside = accumulate(scheduled(sgd(), lr=lambda step: step + 1), every=2)
    outside = scheduled(accumulate(sgd(), every=2), lr=lambda step: step + 1)
    assert rates(inside, 4) == [0, 1, 0, 2]
    assert rates(outside, 4) == [0, 2, 0, 4]


def test_parts_of_a_partition() -> None:
    """A shared name schedules all parts, even where their defaults differ; one with a label one
    part.
    """
    parts = partition({"a": sgd(lr=1.0), "b": sgd(lr=2.0)}, {"a": "a", "b": "b"})
    params = {"a": torch.zeros(1), "b": torch.zeros(1)}
    ones = {"a": torch.ones(1), "b": torch.ones(1)}
    shared, one = (
        scheduled(parts, lr=lambda step: 0.5),
        scheduled(parts, **{"b.lr": lambda step: 0.5}),
    )
    assert (shared.hyper, one.hyper) == ({}, {"a.lr": 1.0})
    assert_same(
        shared(params, ones, shared.init(params))[0],
        {"a": torch.tensor([-0.5]), "b": torch.tensor([-0.5])},
    )
    assert_same(
        one(params, ones, one.init(params))[0],
        {"a": torch.tensor([-1.0]), "b": torch.tensor([-0.5])},
    )


@pytest.mark.usefixtures("fresh_compiler")
def test_steps_compile_nothing_again() -> None:
    compiled = []

    def counting(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    opt = scheduled(momentum(), steps=5, lr=one_cycle(0.1))
    fast = torch.compile(opt, fullgraph=True, backend=counting)
    params, state, expected = PARAMS, opt.init(PARAMS), (PARAMS, opt.init(PARAMS))
    for seed in range(6):
        grads = random_like(PARAMS, seed)
        params, state = fast(params, grads, state)
        expected = opt(expected[0], grads, expected[1])
    assert_same((params, state), expected)
    assert len(compiled) == 1


def test_members_may_be_at_different_steps() -> None:
    opt = scheduled(sgd(), lr=lambda step: 1 / (step + 1))
    calls = torch.tensor([0, 3])
    state = {"calls": calls, "inner": {"step": calls[:, None]}}
    after, _ = torch.func.vmap(opt)(torch.zeros(2, 1), torch.ones(2, 1), state)
    assert_close(after, torch.tensor([[-1.0], [-0.25]]))


def test_derivatives_by_what_is_in_a_schedule() -> None:
    def end(first: Tensor) -> Tensor:
        opt = scheduled(sgd(), lr=lambda step: first / (step + 1))
        params = torch.ones(1, dtype=torch.float64)
        state = opt.init(params)
        for _ in range(3):
            params, state = opt(params, params, state)
        return params

    assert torch.autograd.gradcheck(
        end, (torch.tensor(0.1, dtype=torch.float64, requires_grad=True),)
    )


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: scheduled(sgd(), lrr=Constant(1.0)),
            ValueError,
            "scheduled: no rule reads 'lrr'. Did you mean 'lr'",
        ),
        (
            lambda: scheduled(sgd(), lr=0.1),
            TypeError,
            "'lr' must be a function of the step, got 0.1",
        ),
        (
            lambda: scheduled(sgd(), lr=one_cycle(0.1)),
            ValueError,
            "so the length of the run must be known",
        ),
        (
            lambda: scheduled(sgd(), steps=0, lr=Linear(0, 1)),
            ValueError,
            "steps must be at least 1, got 0",
        ),
        (
            lambda: scheduled(sgd, lr=Constant(1.0)),
            TypeError,
            "scheduled: expected an optimizer such as adamw",
        ),
    ],
    ids=["unknown", "number", "position", "no steps", "not called"],
)
def test_wrong_schedules_are_errors_when_built(make: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_a_wrong_state_is_an_error() -> None:
    opt = scheduled(sgd(), lr=Constant(1.0))
    with pytest.raises(ValueError, match="scheduled: state has no 'calls'"):
        opt(PARAMS, PARAMS, {})


def test_repr() -> None:
    opt = scheduled(sgd(), steps=9, lr=Join((1.0,), (Linear(0, 1),)))
    assert repr(opt).startswith("scheduled(chain(sgd_step, lr=0.001), steps=9, lr=Join(")


def test_passing_all_defaults_changes_nothing_where_one_part_has_a_schedule() -> None:
    """A learner passes all hypers at every step."""
    opt = partition(
        {"a": scheduled(sgd(), lr=lambda step: 0.5 + step), "b": sgd(lr=0.25)}, {"x": "a", "y": "b"}
    )
    assert opt.hyper == {"b.lr": 0.25}
    ones = {"x": torch.ones(1), "y": torch.ones(1)}
    after, _ = opt(ones, ones, opt.init(ones), opt.hyper)
    assert_same(after, {"x": torch.tensor([0.5]), "y": torch.tensor([0.75])})
