"""How a chain is cut into passes: every rule sees what it would see leaf by leaf, whatever is done
before it, after it, or at the same time.
"""

import pytest
import torch

import functional_sgd as fs
from functional_sgd import chain, elementwise, fuse, largest, leafwise, norm, rename, treewise
from tests.comparing import assert_same
from tests.functional_sgd.fusion.helpers import check_steps, draw, kinds, plain_tree, then_step

donating = pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])


def small(dtype=torch.float32):
    shapes = {"a": (6,), "b": (2, 3), "c": (), "d": (0, 2)}
    return {name: draw(shape, dtype, 1 + sum(shape)) for name, shape in shapes.items()}


# Numbers of the tree.


@elementwise(best=0.0, best_before=5.0)
def keeps_two(update, *, best, best_before, top=largest(lambda update: update.abs(), over="tree")):
    return dict(update=update / (1 + best_before), best=best_before, best_before=best_before + top)


@elementwise(pace=1.0)
def counts(update, *, pace):
    return dict(update=update, pace=pace + 1)


@leafwise(pace=1.0)
def counts_by_torch(grad, *, pace):
    return dict(grad=1.0 * grad.reshape(grad.shape), pace=pace + 1)


@elementwise
def paced(param, *, pace):
    return dict(param=param * (1 - 0.01 * pace))


@leafwise
def paced_by_torch(update, *, pace):
    return dict(update=(1 + pace) * update.reshape(update.shape))


@treewise
def paced_by_tree(grad, *, pace):
    return dict(grad={name: (1 + pace) * leaf for name, leaf in grad.items()})


NUMBERS = {
    "one begins with the name of another": [keeps_two],
    "torch reads before a kernel sets": [paced_by_torch, counts],
    "torch reads after a kernel sets": [counts, paced_by_torch],
    "a tree is read before a kernel sets": [paced_by_tree, counts],
    "a kernel reads before torch sets": [paced, counts_by_torch],
    "a kernel reads after torch sets": [counts_by_torch, paced],
    "kernels read before and after": [paced, counts, fs.rename(paced, param="param")],
}


@donating
@pytest.mark.parametrize("rules", NUMBERS.values(), ids=NUMBERS)
def test_a_number_of_the_tree_has_the_value_of_its_time(rules, donate):
    check_steps(then_step(*rules), small(), donate, ulps=2)


def test_a_hyper_that_differs_by_leaf_is_refused_before_anything_is_overwritten():
    @elementwise(pace=1.0)
    def grows(update, *, pace, growth=0.1):
        return dict(update=update * pace, pace=pace + growth)

    fused, params = fuse(then_step(grows, paced), donate=True), small()
    state, before = fused.init(params), {name: leaf.clone() for name, leaf in params.items()}
    with pytest.raises(ValueError, match="rule grows keeps a number of the whole tree"):
        fused(params, params, state, dict(growth=dict.fromkeys(params, 0.1)))
    assert_same(params, before)
    assert float(state["pace"]) == 1.0


# Names.


@elementwise
def sized(update, *, size=0.5):
    return dict(update=update * size)


@donating
@pytest.mark.parametrize("rules", [[fs.trust_ratio, sized], [sized, fs.trust_ratio]])
def test_a_hyper_may_have_the_name_of_a_number_of_another_rule(rules, donate):
    check_steps(then_step(fs.average_grad, *rules), small(), donate)
    check_steps(then_step(fs.average_grad, *rules), small(), donate, size=0.25)


# Columns that are stored in less precision than rules calculate in.


@elementwise(average=lambda param: torch.zeros_like(param, dtype=torch.bfloat16))
def average_in_half(grad, average, *, mom=0.9):
    average = mom * average + (1 - mom) * grad
    return dict(average=average, update=average)


@donating
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_later_pass_sees_what_was_computed_not_what_was_rounded(dtype, donate):
    check_steps(then_step(average_in_half, fs.trust_ratio), small(dtype), donate)


@elementwise(mass=lambda param: torch.zeros_like(param, dtype=torch.float64))
def gather(grad, mass):
    return dict(mass=mass + grad, update=grad)


@donating
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_slot_in_another_precision_than_the_arithmetic_keeps_it(dtype, donate):
    """A sum in double precision of float32 gradients: kernels would round it at every step."""
    check_steps(then_step(gather), small(dtype), donate, ulps=0)
    opt, params = fuse(then_step(gather), donate=donate), {"w": torch.ones(2, dtype=dtype)}
    state = {**opt.init(params), "mass": {"w": torch.full((2,), 1e9, dtype=torch.float64)}}
    _, after = opt(params, {"w": torch.full((2,), 0.5, dtype=dtype)}, state)
    assert after["mass"]["w"].tolist() == [1e9 + 0.5] * 2


def test_params_that_become_double_have_float32_slots():
    opt, params = fs.adamw(), small()
    wide = {name: leaf.double() for name, leaf in params.items()}
    assert_same(fuse(opt)(wide, wide, opt.init(params)), opt(wide, wide, opt.init(params)))


# What is true or false.


@elementwise(last=torch.ones_like)
def agreeing(update, last, *, length=norm("update")):
    agree = update * last > 0
    scaled = update / (1 + length)
    return dict(update=torch.where(agree, scaled, 0.1 * scaled), last=update)


@elementwise
def agrees(grad, update):
    return dict(agree=grad * update >= 0, update=update)


@elementwise
def doubled_where(update, agree):
    return dict(update=torch.where(agree != 0, 2 * update, update))


@leafwise
def doubled_by_torch(update, agree):
    return dict(update=torch.where(agree != 0, 2 * update, update.reshape(update.shape)))


@leafwise(writes=("update",))
def inverted_by_torch(update, agree):
    return dict(update=torch.where(~agree, 2 * update, update))


LOGICAL = {
    "of a slot that is overwritten": [agreeing],
    "of an earlier pass": [fs.average_grad, agrees, fs.trust_ratio, doubled_where],
    "for a rule by torch": [fs.average_grad, agrees, doubled_by_torch],
    "inverted by torch": [fs.average_grad, agrees, inverted_by_torch],
}


@donating
@pytest.mark.parametrize("rules", LOGICAL.values(), ids=LOGICAL)
def test_a_condition_is_that_of_its_time(rules, donate):
    check_steps(then_step(*rules), small(), donate, steps=4)


# Rules by torch, late and in a row.


@leafwise(seen=torch.zeros_like)
def keeps_param(param, seen):
    return dict(seen=param, turned=1.0 * param.reshape(param.shape))


@elementwise
def doubles(turned):
    return dict(twice=2 * turned)


@leafwise(total_turned=torch.zeros_like)
def keeps_twice(twice, total_turned):
    return dict(total_turned=total_turned + twice)


@donating
def test_rules_by_torch_after_the_params_were_written(donate):
    opt = chain(fs.sgd_step, keeps_param, doubles, keeps_twice, lr=0.1)
    assert kinds(fuse(opt)) == ["kernel", "torch", "kernel", "torch"]
    check_steps(opt, small(), donate)


@donating
def test_a_kernel_between_two_rules_by_torch_writes_what_the_second_reads(donate):
    opt = then_step(fs.centralize, fs.average_grad, fs.rename(fs.centralize, grad="update"))
    assert kinds(fuse(opt)) == ["torch", "kernel", "torch", "kernel"]
    check_steps(opt, plain_tree(torch.float32), donate)


# Columns that the caller gives.


@elementwise
def curved(grad, bend):
    return dict(update=grad / (1 + bend.abs()))


GIVEN = {
    "contiguous": lambda leaf: torch.rand_like(leaf),
    "double": lambda leaf: torch.rand_like(leaf).double(),
    "half": lambda leaf: torch.rand_like(leaf).bfloat16(),
    "turned": lambda leaf: torch.rand(*leaf.shape[::-1]).T if leaf.dim() == 2 else leaf,
    "strided": lambda leaf: torch.rand(*leaf.shape, 2)[..., 0],
    "expanded": lambda leaf: torch.rand(()).expand(leaf.shape),
    "negative": lambda leaf: torch.view_as_complex(torch.rand(*leaf.shape, 2)).conj().imag,
}


@donating
def test_a_given_column_may_change_its_layout_and_dtype_from_call_to_call(donate):
    """Though params, gradients and state are just like those of the call before."""
    opt = then_step(curved)
    fused, params = fuse(opt, donate=donate), small()
    state = opt.init(params)
    for make in [*GIVEN.values()] * 2:
        bend = {name: make(leaf) for name, leaf in params.items()}
        expected = opt(params, small(), state, bend=bend)
        found = fused(
            {name: leaf.clone() for name, leaf in params.items()},
            small(),
            {"step": state["step"]},
            bend=bend,
        )
        assert_same(found, expected)


@leafwise(temporary_0=torch.zeros_like, update_by_1=torch.zeros_like)
def count(grad, temporary_0, update_by_1):
    """Slots with the names that a planner would give."""
    return dict(temporary_0=temporary_0 + 1, update_by_1=update_by_1 + 2, update=grad * 1.0)


@elementwise
def double(update):
    return dict(update=2 * update)


def test_slots_may_have_names_that_a_planner_would_give():
    opt = chain(rename(double, update="grad"), fs.centralize, count, fs.sgd_step, lr=0.1)
    params = {"w": torch.ones(3)}
    plain, fused = (params, opt.init(params)), (params, opt.init(params))
    for number in range(3):
        grads = {"w": draw((3,), torch.float32, number)}
        plain, fused = opt(plain[0], grads, plain[1]), fuse(opt)(fused[0], grads, fused[1])
        torch.testing.assert_close(fused, plain)
