"""What a chain connects: numbers of the whole tree, and rules that have an effect."""

from typing import Any

import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import (
    average_grad,
    average_sqr_grad,
    chain,
    clip_norm,
    debias,
    elementwise,
    fuse,
    heavy_ball,
    leafwise,
    partition,
    rename,
    scale_by_rms,
    sgd,
    sgd_step,
    treewise,
    weigh_steps,
)
from tests.comparing import assert_close, assert_same, stack

Columns = dict[str, Any]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def run(opt: Any, params: Any, grads: list[Any], hypers: Any = None, **extras: Any) -> Any:
    """(params, state) after a step along each of these gradients."""
    state = opt.init(params)
    for place, grad in enumerate(grads):
        hyper = None if hypers is None else hypers[place]
        params, state = opt(params, grad, state, hyper, **extras)
    return params, state


# Numbers of the whole tree.


@elementwise(rounds=10.0)
def count_rounds(*, rounds: Tensor) -> Columns:
    return dict(rounds=rounds + 1)


@elementwise
def divide_by_rounds(update: Tensor, *, rounds: Tensor) -> Columns:
    return dict(update=update / rounds)


COUNTING = chain(count_rounds, divide_by_rounds, sgd_step, lr=1.0)
TWO = {"a": torch.zeros(2), "b": torch.zeros(())}
ONES = {"a": torch.ones(2), "b": torch.ones(())}


def test_a_number_is_one_entry_of_the_state_and_begins_as_declared() -> None:
    assert_same(COUNTING.init(TWO), {"step": torch.tensor([0, 0]), "rounds": number(10.0)})


def test_later_rules_read_what_this_step_has_made_of_a_number() -> None:
    """-1/11 - 1/12."""
    after, state = run(COUNTING, TWO, [ONES, ONES])
    assert_same(state["rounds"], number(12.0))
    expected = -1 / 11 - 1 / 12
    assert_close(after, {"a": torch.full((2,), expected), "b": torch.tensor(expected)}, rtol=1e-6)


def test_a_number_changes_once_a_call_however_many_leaves_there_are() -> None:
    many = [torch.zeros(1) for _ in range(7)]
    assert_same(run(COUNTING, many, [many])[1]["rounds"], number(11.0))


def test_a_number_belongs_to_no_hyper_and_is_not_asked_for() -> None:
    assert (COUNTING.hyper, COUNTING.required) == ({"lr": 1.0}, ())
    with pytest.raises(ValueError, match="no rule reads 'rounds'"):
        COUNTING(TWO, ONES, COUNTING.init(TWO), {"rounds": 3.0})


def test_without_any_gradient_a_number_stays() -> None:
    _, state = run(COUNTING, TWO, [ONES, dict.fromkeys(TWO)])
    assert_same(state["rounds"], number(11.0))


def test_a_leaf_without_gradient_changes_nothing_about_the_number() -> None:
    _, state = run(COUNTING, TWO, [{"a": None, "b": ONES["b"]}])
    assert_same(state, {"step": torch.tensor([0, 1]), "rounds": number(11.0)})


def test_numbers_are_float64_and_stay_so_whatever_is_written() -> None:
    @elementwise(last=0.0)
    def keeps(grad: Tensor, *, last: Tensor) -> Columns:
        return dict(last=torch.tensor(3.0))

    opt = chain(keeps, sgd_step, lr=1.0)
    assert_same(run(opt, TWO, [ONES])[1]["last"], number(3.0))


def test_a_rule_may_write_a_plain_number() -> None:
    @elementwise(last=1.0)
    def keeps(grad: Tensor, *, last: Tensor) -> Columns:
        return dict(last=5)

    assert_same(run(chain(keeps, sgd_step, lr=1.0), TWO, [ONES])[1]["last"], number(5.0))


@elementwise(total_steps=0.0)
def add_steps(*, step: Tensor, total_steps: Tensor) -> Columns:
    return dict(total_steps=total_steps + step)


def test_the_step_of_a_rule_with_a_number_is_the_number_of_calls() -> None:
    """1 + 2 + 3, though no leaf has taken three steps."""
    opt = chain(add_steps, sgd_step, lr=1.0)
    late, early = {"a": None, "b": ONES["b"]}, {"a": ONES["a"], "b": None}
    _, state = run(opt, TWO, [late, late, early])
    assert_same(
        state, {"step": torch.tensor([1, 2]), "total_steps": number(6.0), "calls": torch.tensor(3)}
    )


def test_calls_are_only_counted_where_a_rule_asks() -> None:
    assert "calls" not in COUNTING.init(TWO)


def test_a_call_without_any_gradient_is_not_counted() -> None:
    opt = chain(add_steps, sgd_step, lr=1.0)
    _, state = run(opt, TWO, [ONES, dict.fromkeys(TWO), ONES])
    assert_same(state["calls"], torch.tensor(2))


def test_other_rules_of_such_a_chain_see_the_steps_of_their_leaf() -> None:
    @elementwise
    def show_step(update: Tensor, *, step: Tensor) -> Columns:
        return dict(update=0 * update + step)

    opt = chain(add_steps, show_step, sgd_step, lr=1.0)
    after, _ = run(opt, TWO, [{"a": None, "b": ONES["b"]}, ONES])
    assert_same(after, {"a": torch.tensor([-1.0, -1.0]), "b": torch.tensor(-3.0)})


def test_a_rule_of_whole_trees_may_keep_a_number() -> None:
    @treewise(seen=0.0)
    def counts_leaves(grad: Any, *, seen: Tensor) -> Columns:
        return dict(grad=grad, seen=seen + sum(leaf is not None for leaf in grad.values()))

    opt = chain(counts_leaves, sgd_step, lr=1.0)
    _, state = run(opt, TWO, [ONES, {"a": None, "b": ONES["b"]}])
    assert_same(state["seen"], number(3.0))


def test_members_of_an_ensemble_have_numbers_of_their_own() -> None:
    state = stack([COUNTING.init(TWO), {**COUNTING.init(TWO), "rounds": number(1.0)}])
    twice = stack([TWO, TWO])
    _, after = torch.func.vmap(COUNTING)(twice, twice, state)
    assert_same(after["rounds"], torch.tensor([11.0, 2.0], dtype=torch.float64))


def test_a_number_can_be_differentiated() -> None:
    """d (-g / (rounds + 1)) / d rounds = g / (rounds + 1)^2."""
    rounds = number(1.0).requires_grad_()
    state = {**COUNTING.init(TWO), "rounds": rounds}
    after, _ = COUNTING(TWO, ONES, state)
    after["b"].backward()
    assert_same(rounds.grad, number(0.25))


def test_the_weights_of_schedule_free_by_hand() -> None:
    """Rates 1, 2, 1: the largest so far 1, 2, 2; weights 1, 4, 4; shares 1, 4/5, 4/9."""
    opt = fs.schedule_free_sgd()
    hypers = [{"lr": lr} for lr in (1.0, 2.0, 1.0)]
    _, state = run(opt, TWO, [ONES] * 3, hypers)
    assert_same([state[n] for n in ("lr_max", "weight_sum")], [number(2.0), number(9.0)])
    assert_close(state["share"], number(4 / 9), rtol=1e-15)


def test_all_leaves_are_averaged_by_the_same_weights() -> None:
    """A leaf that joins late enters with the share that this step has."""
    opt = fs.schedule_free_sgd(lr=1.0, mom=0.0)
    _, state = run(opt, TWO, [{"a": None, "b": ONES["b"]}, ONES])
    expected = {"a": torch.tensor([-0.5, -0.5]), "b": torch.tensor((-1.0 - 2.0) / 2)}
    assert_same(state["average"], expected)


def test_a_hyper_for_each_leaf_cannot_make_a_number() -> None:
    opt = chain(weigh_steps, sgd_step, lr=0.1)
    with pytest.raises(
        ValueError, match="rule weigh_steps keeps a number of the whole tree, so 'lr' must be one"
    ):
        opt(TWO, ONES, opt.init(TWO), {"lr": {"a": 0.1, "b": 0.2}})


def test_a_hyper_for_each_leaf_is_fine_for_the_other_rules() -> None:
    opt = chain(weigh_steps, rename(sgd_step, lr="rate"), lr=1.0)
    after, _ = opt(TWO, ONES, opt.init(TWO), {"rate": {"a": 1.0, "b": 2.0}})
    assert_same(after, {"a": torch.tensor([-1.0, -1.0]), "b": torch.tensor(-2.0)})


@elementwise(rounds=torch.zeros_like)
def rounds_of_each_element(grad: Tensor, rounds: Tensor) -> Columns:
    return dict(rounds=rounds + 1)


@elementwise
def writes_rounds(grad: Tensor) -> Columns:
    return dict(rounds=2 * grad)


@elementwise
def reads_rounds_as_a_column(update: Tensor, rounds: Tensor) -> Columns:
    return dict(update=update / rounds)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((count_rounds, count_rounds), r"slot 'rounds' has two owners, count_rounds and count_r"),
        ((count_rounds, rounds_of_each_element), r"slot 'rounds' has two owners"),
        (
            (count_rounds, writes_rounds),
            r"rule writes_rounds writes the column 'rounds', but count_rounds keeps a number of",
        ),
        (
            (count_rounds, reads_rounds_as_a_column),
            r"reads 'rounds' as a column, but count_rounds keeps one number .* after the '\*'",
        ),
        ((rename(count_rounds, rounds="calls"),), r"may not keep a slot called 'calls'"),
    ],
    ids=["twice", "slot", "written", "read", "reserved"],
)
def test_a_number_has_one_owner_and_is_no_column(rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chain(*rules, sgd_step)


@pytest.mark.parametrize("start", [True, "0", torch.zeros_like, None])
def test_a_number_begins_as_a_number(start: Any) -> None:
    with pytest.raises(TypeError, match="'rounds' is a keyword, so as a slot it is one number of"):
        elementwise(rounds=start)(lambda grad, *, rounds: dict(rounds=rounds))


def test_a_number_has_no_default() -> None:
    with pytest.raises(TypeError, match="it needs a first value that is a number, and no default"):
        elementwise(rounds=0.0)(lambda grad, *, rounds=1.0: dict(rounds=rounds))


# Rules with an effect.


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((sgd_step, clip_norm), r"rule clip_norm has no effect: it writes 'grad', which no later"),
        ((average_grad, clip_norm, sgd_step), r"rule clip_norm has no effect"),
        ((sgd_step, scale_by_rms), r"scale_by_rms reads 'sqr_avg'"),
        ((average_sqr_grad, scale_by_rms, heavy_ball, sgd_step), r"scale_by_rms has no effect"),
        ((debias, sgd_step), r"rule debias has no effect: it writes nothing"),
        ((heavy_ball, debias, sgd_step), r"rule debias has no effect: it writes nothing"),
        ((average_grad, debias), r"no rule writes 'param'"),
    ],
    ids=["at the end", "too late", "unread", "overwritten", "alone", "no average", "no step"],
)
def test_a_rule_without_effect_is_refused(rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chain(*rules)


def test_an_update_that_is_written_behind_the_step_is_refused() -> None:
    """Its rule keeps a slot, so it has an effect; but the params would go without it."""
    with pytest.raises(ValueError, match="average_grad writes 'update' behind sgd_step.*before"):
        chain(sgd_step, average_grad)


@pytest.mark.parametrize(("wrong", "right"), [("updates", "update"), ("params", "param")])
def test_a_column_that_is_called_almost_like_another_has_a_hint(wrong: str, right: str) -> None:
    misspelt = elementwise(lambda grad: {wrong: grad})
    with pytest.raises(ValueError, match=f"writes {wrong!r}.* {wrong!r} is called {right} here"):
        chain(misspelt, sgd_step)


def test_a_column_that_is_read_as_a_hyper_is_refused() -> None:
    @leafwise
    def measure(grad: Tensor) -> dict[str, Tensor]:
        return dict(size=grad.abs())

    @elementwise
    def scale(grad: Tensor, *, size: float) -> dict[str, Tensor]:
        return dict(update=grad / size)

    with pytest.raises(ValueError, match=r"scale reads 'size' as a hyper, but measure .* the '\*'"):
        chain(measure, scale, sgd_step)


def test_a_rule_that_fails_in_a_step_is_named_with_the_shapes_it_got() -> None:
    @leafwise
    def spectral(update: Tensor) -> dict[str, Tensor]:
        return dict(update=update / torch.linalg.matrix_norm(update, 2))

    opt, params = chain(spectral, sgd_step, lr=0.1), {"bias": torch.ones(5)}
    for one in (opt, fuse(opt)):
        with pytest.raises(RuntimeError) as caught:
            one(params, params, one.init(params))
        assert caught.value.__notes__ == ["raised by rule spectral, which got update: (5,)"]


def test_a_rule_that_only_keeps_something_has_an_effect() -> None:
    assert chain(sgd_step, average_sqr_grad).init(TWO).keys() == {"step", "sqr_avg"}


def test_rules_in_front_of_an_optimizer_have_an_effect_by_their_update() -> None:
    opt = partition({"all": sgd(lr=1.0)}, {"*": "all"})
    assert chain(average_grad, debias, opt).front.rules == (average_grad, debias)
    assert chain(clip_norm, opt).front.rules == (clip_norm,)


def test_a_rule_in_front_of_an_optimizer_that_writes_what_is_not_read_is_refused() -> None:
    opt = partition({"all": sgd(lr=1.0)}, {"*": "all"})
    with pytest.raises(ValueError, match="rule clip_norm has no effect"):
        chain(average_grad, clip_norm, opt)


def test_an_effect_may_be_far_away() -> None:
    """The gradient is clipped for the squares alone."""
    opt = chain(average_grad, clip_norm, average_sqr_grad, scale_by_rms, sgd_step)
    assert len(opt.rules) == 5


SLOW = rename(average_grad, grad_avg="slow_avg", mom="slow_mom")


@pytest.mark.parametrize(
    ("rules", "writer"),
    [
        ((average_grad, SLOW, debias), "rename.average_grad, grad_avg='slow_avg', mom='slow_mom'."),
        ((average_grad, rename(clip_norm, grad="update"), debias), "rename.clip_norm"),
        ((average_grad, heavy_ball, debias), "heavy_ball"),
        ((average_grad, average_sqr_grad, scale_by_rms, debias), "scale_by_rms"),
    ],
    ids=["two averages", "clipped", "heavy_ball", "scaled"],
)
def test_debias_wants_the_update_to_be_the_average(rules: Any, writer: str) -> None:
    """It would divide what is no average by the weight of one."""
    message = (
        f"rule debias treats 'update' as the average 'grad_avg', but {writer}.* has written it"
    )
    with pytest.raises(ValueError, match=message):
        chain(*rules, sgd_step)


def test_two_averages_are_debiased_one_after_the_other() -> None:
    """0.5 / 0.5 of the first is the gradient, of which 0.25 / 0.25 is the gradient again."""
    slow = rename(average_grad, grad="update", grad_avg="slow_avg", mom="slow_mom")
    slow_debias = rename(debias, grad_avg="slow_avg", mom="slow_mom", sqr_avg="none")
    opt = chain(average_grad, debias, slow, slow_debias, sgd_step, lr=1.0, mom=0.5, slow_mom=0.75)
    params = torch.zeros(1)
    after, state = opt(params, torch.tensor([3.0]), opt.init(params))
    assert_same(after, torch.tensor([-3.0]))
    assert_same(state["slow_avg"], torch.tensor([0.75]))


def test_debias_is_for_squares_alone_where_the_update_is_no_average() -> None:
    """Speed 4, square 16 * 0.25 = 4, without bias 16: 4 / 4."""
    opt = chain(
        heavy_ball, average_sqr_grad, debias, scale_by_rms, sgd_step,
        lr=1.0, mom=0.5, sqr_mom=0.75, eps=0.0,
    )  # fmt: skip
    params = torch.zeros(1)
    assert_same(opt(params, torch.tensor([4.0]), opt.init(params))[0], torch.tensor([-1.0]))
