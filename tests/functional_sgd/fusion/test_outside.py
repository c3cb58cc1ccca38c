"""What rules read besides their arguments: kernels have it as constants, and must follow it."""

import argparse
from types import SimpleNamespace

import pytest
import torch

import functional_sgd as fs
from functional_sgd import chain, elementwise, fuse, sgd_step, total
from functional_sgd.fingerprint import fingerprint, reads_outside
from tests.catalogue import RECIPES

NUMBER = 2.0
TENSOR = torch.tensor(2.0)
NUMBERS = [2.0]
OBJECT = SimpleNamespace(scale=2.0)
ARGUMENTS = argparse.Namespace(scale=2.0)


def helper(x):
    return x * NUMBER


@elementwise
def by_number(grad):
    return dict(update=grad * NUMBER)


@elementwise
def by_tensor(grad):
    return dict(update=grad * TENSOR)


@elementwise
def by_entry(grad):
    return dict(update=grad * NUMBERS[0])


@elementwise
def by_attribute(grad):
    return dict(update=grad * OBJECT.scale)


@elementwise
def by_argument(grad):
    return dict(update=grad * ARGUMENTS.scale)


@elementwise
def by_helper(grad):
    return dict(update=helper(grad))


@elementwise
def by_reduction(grad, *, size=total(lambda grad: grad.square() * NUMBER)):
    return dict(update=grad * size)


def closing_over():
    scale = torch.tensor(2.0)

    @elementwise
    def by_cell(grad):
        return dict(update=grad * scale)

    return by_cell, scale


BY_CELL, CELL = closing_over()

RULES = [
    *(by_number, by_tensor, by_entry, by_attribute, by_argument, by_helper, by_reduction, BY_CELL)
]


def change() -> None:
    """Make everything 3 that is 2, each where rules look it up."""
    global NUMBER
    NUMBER = NUMBERS[0] = OBJECT.scale = ARGUMENTS.scale = 3.0
    TENSOR.fill_(3.0)
    CELL.fill_(3.0)


@pytest.fixture(autouse=True)
def as_before():
    yield
    global NUMBER
    NUMBER = NUMBERS[0] = OBJECT.scale = ARGUMENTS.scale = 2.0
    TENSOR.fill_(2.0)
    CELL.fill_(2.0)


def stepped(opt, params=None):
    params = {"w": torch.tensor([1.0, -1.0])} if params is None else params
    return opt(params, {"w": torch.ones(2)}, opt.init(params))[0]["w"].tolist()


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_kernel_follows_what_its_rules_read(rule, donate):
    opt = chain(rule, sgd_step, lr=1.0)
    fused = fuse(opt, donate=donate)
    before = stepped(opt)
    assert stepped(fused) == before
    change()
    after = stepped(opt)
    assert after != before
    assert stepped(fused) == stepped(fused) == after


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_so_does_one_inside_a_wrapper(rule):
    opt = fs.lookahead(chain(rule, sgd_step, lr=1.0), sync_every=3)
    fused = fuse(opt)
    assert stepped(fused) == stepped(opt)
    change()
    assert stepped(fused) == stepped(opt)


def test_nothing_is_planned_anew_while_nothing_changes():
    fused = fuse(chain(by_number, sgd_step, lr=1.0))
    stepped(fused)
    program = fused.program
    stepped(fused)
    assert fused.program is program


def test_the_rules_of_the_library_read_their_arguments_alone():
    """So nothing is looked at in their steps."""
    reading = {
        rule.name
        for make in RECIPES.values()
        for rule in make().rules
        if reads_outside(rule.function)
    }
    assert not reading


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_whoever_reads_more_is_found(rule):
    assert reads_outside(rule.function)
    before = fingerprint(rule.function)
    assert before == fingerprint(rule.function)
    change()
    assert before != fingerprint(rule.function)


def test_a_long_list_is_compared_by_identity_and_length():
    many = [1.0] * 1000
    before = fingerprint(many)
    many[0] = 2.0
    assert fingerprint(many) == before != fingerprint([*many])
    many.append(1.0)
    assert fingerprint(many) != before
