"""accumulate: every k-th call is one step on the mean gradient, and the others are none."""

from collections import OrderedDict
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

from functional_sgd import (
    accumulate,
    adamw,
    average_params,
    chain,
    clip_norm,
    lbfgs,
    momo,
    polyak_sgd,
    scheduled,
    sgd,
)
from tests.catalogue import random_like, sample_tree, small_tree
from tests.comparing import assert_close, assert_same, member, stack

PARAMS = sample_tree(dtype=torch.float64)


def mean_of(trees: list[Any]) -> Any:
    """The mean, summed in the order of the list."""
    total = trees[0]
    for tree in trees[1:]:
        total = optree.tree_map(lambda a, b: a + b, total, tree)
    return optree.tree_map(lambda a: a / len(trees), total)


@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "inner", [sgd(lr=0.1, mom=0.9), chain(clip_norm, adamw(lr=0.1))], ids=["sgd", "adamw"]
)
def test_it_is_one_step_on_the_mean_gradient(inner: Any, every: int) -> None:
    """Bit for bit, over three windows."""
    opt, params, expected = accumulate(inner, every), PARAMS, PARAMS
    state, inner_state = opt.init(params), inner.init(params)
    for window in range(3):
        grads = [random_like(PARAMS, 10 * window + seed) for seed in range(every)]
        for number, tree in enumerate(grads):
            assert_same(params, expected)
            assert_same(state["inner"], inner_state)
            assert int(state["gathered"]) == number
            params, state = opt(params, tree, state)
        expected, inner_state = inner(expected, mean_of(grads), inner_state)
    assert_same(params, expected)
    assert_same(state["inner"], inner_state)
    assert_same(state["grad_sum"], optree.tree_map(torch.zeros_like, PARAMS))
    assert (int(state["calls"]), int(state["gathered"])) == (3 * every, 0)


def test_by_hand() -> None:
    """Gradients 1, 3 at lr 1: from 5 to 5, and to 3."""
    opt, params = accumulate(sgd(lr=1.0), every=2), torch.tensor([5.0])
    first, state = opt(params, torch.tensor([1.0]), opt.init(params))
    assert_same((first, state["grad_sum"]), (torch.tensor([5.0]), torch.tensor([1.0])))
    second, state = opt(first, torch.tensor([3.0]), state)
    assert_same((second, state["grad_sum"]), (torch.tensor([3.0]), torch.tensor([0.0])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_gradients_of_half_precision_are_not_lost(dtype: torch.dtype) -> None:
    """256 + 1 + 1 + ... in bfloat16 would stay 256; in float32 it is 256 + 255."""
    opt, params = accumulate(sgd(lr=1.0), every=256), torch.zeros(1, dtype=dtype)
    state = opt.init(params)
    assert state["grad_sum"].dtype == torch.float32
    for number in range(256):
        params, state = opt(
            params, torch.full((1,), 256.0 if number == 0 else 1.0, dtype=dtype), state
        )
    assert_same(params, torch.tensor([-511 / 256]).to(dtype))


def test_wider_gradients_do_not_widen_the_state() -> None:
    params = torch.zeros(2)
    _, state = accumulate(sgd(), every=2)(
        params, torch.ones(2, dtype=torch.float64), accumulate(sgd(), 2).init(params)
    )
    assert state["grad_sum"].dtype == torch.float32


def test_complex_gradients_are_summed_as_they_are() -> None:
    params = torch.zeros(2, dtype=torch.complex64)
    opt = accumulate(sgd(lr=1.0), every=2)
    state = opt.init(params)
    for grad in (1 + 2j, 3 - 1j):
        params, state = opt(params, torch.full((2,), grad), state)
    assert_same(params, torch.full((2,), -2 - 0.5j))


def test_a_leaf_without_gradient_is_left_alone() -> None:
    opt, inner = accumulate(adamw(lr=0.1), every=2), adamw(lr=0.1)
    params = {"idle": torch.ones(2), "used": torch.ones(2)}
    after, state = params, opt.init(params)
    for _ in range(4):
        after, state = opt(after, {"idle": None, "used": params["used"]}, state)
    expected, inner_state = params, inner.init(params)
    for _ in range(2):
        expected, inner_state = inner(expected, {"idle": None, "used": params["used"]}, inner_state)
    assert_same((after, state["inner"]), (expected, inner_state))
    assert after["idle"] is params["idle"]


def follow(call: Any, params: Tensor, state: Any, *grads: float | None) -> list[float]:
    """Where a leaf is after each of these gradients."""
    path = []
    for grad in grads:
        params, state = call(params, None if grad is None else torch.tensor([grad]), state)
        path.append(round(float(params), 4))
    return path


def test_a_leaf_is_stepped_if_it_had_a_gradient_in_any_call_of_the_window() -> None:
    """None counts as 0: (1 + 0) / 2, then (0 + 4) / 2, then not at all, then (4 + 3) / 2."""
    opt, params = accumulate(sgd(lr=1.0), every=2), torch.zeros(1)
    path = follow(opt, params, opt.init(params), 1.0, None, None, 4.0, None, None, 4.0, 3.0)
    assert path == [0.0, -0.5, -0.5, -2.5, -2.5, -2.5, -2.5, -6.0]


def test_only_actions_in_which_a_leaf_takes_part_are_its_steps() -> None:
    opt, params = accumulate(sgd(), every=2), {"a": torch.zeros(1), "b": torch.zeros(1)}
    state = opt.init(params)
    for a_is_there in (True, False, False, False, False, True):
        grads = {"a": torch.ones(1) if a_is_there else None, "b": torch.ones(1)}
        params, state = opt(params, grads, state)
    assert_same(state["inner"]["step"], torch.tensor([2, 3]))


@pytest.mark.usefixtures("fresh_compiler")
def test_while_nobody_can_look_a_leaf_waits_for_a_call_in_which_it_takes_part() -> None:
    """Compiled: 1 is not lost at the second call, in which there is None: (1 + 4 + 3) / 3 at the
    fourth.
    """
    opt, params = accumulate(sgd(lr=1.0), every=2), torch.zeros(1)
    fast = torch.compile(opt, fullgraph=True, backend="eager")
    path = follow(fast, params, opt.init(params), 1.0, None, 4.0, 3.0, 2.0, 4.0)
    assert path == [0.0, 0.0, 0.0, -2.6667, -2.6667, -5.6667]


def test_every_is_a_hyper() -> None:
    opt, params = accumulate(sgd(lr=1.0), every=3), torch.zeros(1)
    assert opt.hyper == {"lr": 1.0, "every": 3}
    params, state = opt(params, torch.ones(1), opt.init(params))
    assert_same(opt(params, torch.ones(1), state)[0], torch.zeros(1))
    for how in ({"hyper": {"every": 2}}, {"every": 2}, {"hyper": {"every": torch.tensor(2)}}):
        assert_same(opt(params, torch.ones(1), state, **how)[0], -torch.ones(1))


def test_every_may_be_scheduled() -> None:
    """Larger and larger batches: it acts at calls 1, 3, 6."""
    opt = scheduled(
        accumulate(sgd(lr=1.0), every=1),
        every=lambda step: 1 + (step >= 1).long() + (step >= 3).long(),
    )
    params = torch.zeros(1)
    state, moves = opt.init(params), []
    for number in range(1, 7):
        after, state = opt(params, torch.ones(1), state)
        moves += [number] if float(after) != float(params) else []
        params = after
    assert moves == [1, 3, 6]


def test_members_of_an_ensemble_act_at_their_own_calls() -> None:
    opt, members = accumulate(sgd(lr=1.0), every=1), [small_tree(seed) for seed in range(2)]
    params, state = stack(members), stack([opt.init(tree) for tree in members])
    every = {"every": torch.tensor([1, 2])}
    after, _ = torch.func.vmap(opt)(params, params, state, every)
    assert_same(
        after["matrix"], torch.stack([torch.zeros_like(members[0]["matrix"]), members[1]["matrix"]])
    )


@pytest.mark.parametrize("every", [0, -1, 0.5])
def test_every_below_one_is_an_error(every: Any) -> None:
    message = f"accumulate: hyper 'every' must be a whole number, at least 1, got {every}"
    with pytest.raises(ValueError, match=message):
        accumulate(sgd(), every)


def test_gradients_of_another_shape_are_an_error() -> None:
    """Not broadcast into the sum."""
    opt, params = accumulate(sgd(), 2), {"w": torch.ones(3)}
    wrong: Tensor = torch.ones(())
    with pytest.raises(
        ValueError, match="accumulate: the gradient of 'w' must have its shape \\(3,\\), got \\(\\)"
    ):
        opt(params, {"w": wrong}, opt.init(params))


def test_repr() -> None:
    assert repr(accumulate(sgd(lr=0.1), every=4)) == "accumulate(chain(sgd_step, lr=0.1), every=4)"


@pytest.mark.parametrize("track", [False, True])
def test_a_gradient_that_is_missing_in_the_last_call_counts_as_zero(track: bool) -> None:
    """Also where derivatives are tracked."""
    opt, one = accumulate(sgd(lr=1.0), 2), torch.ones(1)
    params: Any = {name: torch.tensor([5.0], requires_grad=track) for name in "ab"}
    state = opt.init(params)
    params, state = opt(params, {"a": one, "b": one}, state)
    params, state = opt(params, {"a": one, "b": None}, state)
    assert (params["a"].item(), params["b"].item()) == (4.0, 4.5)
    assert state["inner"]["step"].tolist() == [1, 1]


@pytest.mark.parametrize("wrap", [lambda opt: accumulate(opt, 3), lambda opt: average_params(opt)])
def test_counts_follow_their_leaves_into_a_tree_of_another_order(wrap: Any) -> None:
    """A run whose params become an OrderedDict in its middle is the run of a dict. The steps of a
    chain follow its slots.
    """
    opt, one = wrap(sgd(lr=1.0, mom=0.9)), torch.ones(1)

    def run(kind: Any) -> Any:
        params = {"w": torch.tensor([5.0]), "b": torch.tensor([5.0])}
        state = opt.init(params)
        for _ in range(2):
            params, state = opt(params, {"w": one, "b": None}, state)
        params = kind(w=params["w"], b=params["b"])
        params, state = opt(params, kind(w=one, b=None), state)
        steps = dict(zip(optree.tree_paths(params), state["inner"]["step"].tolist(), strict=True))
        params, state = opt(params, kind(w=one, b=one), state)
        return params, state, steps

    (ordered, found, steps), (plain, expected, expected_steps) = run(OrderedDict), run(dict)
    assert_same(dict(ordered), plain)
    assert steps == expected_steps
    for name in ("average", "grad_sum"):
        if name in expected:
            assert_same(dict(found[name]), expected[name])


@pytest.mark.parametrize("opt", [polyak_sgd(max_rate=10.0), momo()], ids=["polyak_sgd", "momo"])
def test_the_loss_is_the_mean_of_those_of_the_window(opt: Any) -> None:
    """Two windows, of losses 1, 2, 6 (as a hyper: it may be either) and 4, 0, 2."""
    window = accumulate(opt, 3)
    params, expected = PARAMS, PARAMS
    state, inner = window.init(params), opt.init(params)
    for losses in ([1.0, 2.0, 6.0], [4.0, 0.0, 2.0]):
        grads = [random_like(PARAMS, int(loss)) for loss in losses]
        params, state = window(params, grads[0], state, value=torch.tensor(losses[0]))
        params, state = window(params, grads[1], state, value=losses[1])
        params, state = window(params, grads[2], state, {"value": torch.tensor(losses[2])})
        mean = torch.tensor(sum(losses) / 3, dtype=torch.float64)
        expected, inner = opt(expected, mean_of(grads), inner, value=mean)
    assert_same((params, state["inner"]), (expected, inner))
    assert_same(state["value_sum"], torch.zeros((), dtype=torch.float64))


def test_two_pieces_give_the_polyak_step_of_the_whole_batch_by_hand() -> None:
    """Losses 1 and 3, gradients 1 and 3, from 5: 5 - 2 / 2**2 * 2."""
    opt, params = accumulate(polyak_sgd(), 2), torch.tensor([5.0])
    state = opt.init(params)
    for number in (1.0, 3.0):
        params, state = opt(params, torch.tensor([number]), state, value=torch.tensor(number))
    assert_same(params, torch.tensor([4.0]))


def test_a_loss_that_is_missing_in_any_call_is_an_error() -> None:
    opt, params = accumulate(momo(), 2), torch.ones(1)
    with pytest.raises(ValueError, match="accumulate: .*reads 'value', .*Pass that of each piece"):
        opt(params, params, opt.init(params))


def test_sums_of_losses_can_be_mapped_over() -> None:
    opt, members = accumulate(polyak_sgd(max_rate=9.0), 2), [small_tree(seed) for seed in range(3)]
    losses = torch.tensor([[1.0, 2.0, 3.0], [3.0, 3.0, 3.0]], dtype=torch.float64)
    params, state = stack(members), stack([opt.init(tree) for tree in members])
    for value in losses:
        step = torch.func.vmap(lambda p, s, v: opt(p, p, s, value=v))
        params, state = step(params, state, value)
    for index, tree in enumerate(members):
        alone, own = tree, opt.init(tree)
        for value in losses[:, index]:
            alone, own = opt(alone, alone, own, value=value)
        assert_close(member(params, index), alone, rtol=1e-13)


def test_a_derivative_by_the_loss_of_an_earlier_call_is_there() -> None:
    """Of 5 - mean / 2**2 * 2 by the first of two losses."""
    opt, params = accumulate(polyak_sgd(max_rate=9.0), 2), torch.tensor([5.0])

    def end(first: Tensor) -> Tensor:
        after, state = opt(params, torch.tensor([2.0]), opt.init(params), value=first)
        return opt(after, torch.tensor([2.0]), state, value=torch.tensor(2.0))[0].sum()

    assert_same(torch.func.grad(end)(torch.tensor(2.0)), torch.tensor(-0.25))


def test_optimizers_that_evaluate_the_loss_are_refused() -> None:
    with pytest.raises(ValueError, match="accumulate: .*reads 'value_fn'.*all pieces at once"):
        accumulate(lbfgs(), 2)
