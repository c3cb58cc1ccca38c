"""A backend of somebody else's: what it takes to add one, and what happens if it fails."""

import inspect

import optree
import pytest
import torch

import functional_sgd as fs
from functional_sgd import chain, fuse
from functional_sgd.fusion.backends import available
from functional_sgd.fusion.backends.backend import Backend, Unavailable
from functional_sgd.fusion.backends.c.launch import CBackend
from functional_sgd.fusion.backends.foreach import ForeachBackend
from functional_sgd.fusion.check import evaluate
from functional_sgd.rules import matrices, preconditioning
from tests.catalogue import RECIPES
from tests.comparing import assert_same, copy_of
from tests.functional_sgd.fusion.helpers import (
    NUMBERS_OF_ROOTS,
    assert_near,
    check_steps,
    draw,
    grads_for,
    odd_tree,
    plain_tree,
)
from tests.turns import in_turns


class DoubleBackend(Backend):
    """Torch's operators, leaf by leaf, in double precision whatever the dtype of the leaf."""

    name = "double"

    def __init__(self):
        self.ran = []

    def treats(self, device):
        return device.type == "cpu"

    def compile(self, work, dtypes, scalars, group):
        self.ran.append(work.title)

        def run(group, reads, writes, scalars):
            totals = [
                self.leaf(k, work, reads, writes, scalars, group) for k in range(len(group.sizes))
            ]
            return torch.stack(totals) if work.takes else None

        return run

    def leaf(self, place, work, reads, writes, scalars, group):
        columns = {name: one.tensors[place] for name, one in zip(work.reads, reads, strict=True)}
        known = {i: columns[n].double() for i, n in work.sources.items() if n in columns}
        numbers = {name: scalars.find(name, group) for name in work.scalars}
        numbers = {n: one.value[place] if one.each else one.value for n, one in numbers.items()}
        values = evaluate(work.nodes, {}, numbers, known)
        for column, node in zip(writes, work.outputs.values(), strict=True):
            column.tensors[place].copy_(values[node.index])
        taken = [take.reduction.of_nothing(torch.zeros(1).double()) for take in work.takes]
        for number, take in enumerate(work.takes):
            if group.sizes[place]:
                taken[number] = take.reduction.whole(values[take.node.index].double())
        return torch.stack(taken) if taken else torch.zeros(0)


def test_a_backend_is_short():
    assert len(inspect.getsource(DoubleBackend).splitlines()) < 60


OF_MATRICES = {
    *(*matrices.__all__, *preconditioning.__all__),
    *("project_l1_ball", "project_simplex"),  # which subtract sums of whole leaves
}


OF_ELEMENTS = [
    name
    for name, make in RECIPES.items()
    if not OF_MATRICES & {rule.name for rule in make().rules if rule.scope == "leafwise"}
]


@pytest.mark.parametrize(("name", "donate"), in_turns(OF_ELEMENTS, [False, True]))
def test_another_backend_runs_every_recipe(name, donate):
    """What is computed in double precision and rounded once is nearest to the truth.

    But for rules of matrices, which torch runs in single precision, and which make more of a
    rounding than two.
    """
    opt, backend = RECIPES[name](), DoubleBackend()
    one = fuse(opt, donate=donate, backends=[backend])
    params, state = plain_tree(torch.float32), opt.init(plain_tree(torch.float32))
    for number in range(3):
        grads, before = grads_for(params, number), copy_of((params, state))
        wide = opt(*(as_double(tree) for tree in (copy_of(params), grads, before[1])))
        params, state = one(params, grads, state)
        assert_near((params, state), as_single(wide, before), before, ulps=2)
    assert bool(backend.ran) == (name != "identity")


def as_double(tree):
    def wide(leaf):
        return leaf.double() if leaf is not None and leaf.is_floating_point() else leaf

    return optree.tree_map(wide, tree, none_is_leaf=True)


def as_single(tree, like):
    return optree.tree_map(lambda leaf, other: leaf.to(other.dtype), tree, like)


def test_the_first_backend_that_treats_a_device_is_taken():
    class Elsewhere(DoubleBackend):
        def treats(self, device):
            return False

    here, elsewhere = DoubleBackend(), Elsewhere()
    check_steps(
        fs.sgd(), plain_tree(torch.float32), fused=fuse(fs.sgd(), backends=[elsewhere, here])
    )
    assert here.ran
    assert not elsewhere.ran


class Broken(DoubleBackend):
    """Fails when it is to compile."""

    name = "broken"

    def compile(self, work, dtypes, scalars, group):
        raise Unavailable("it is broken", self, "Mend it.")


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("opt", [fs.adamw(), chain(fs.clip_norm, fs.lamb())], ids=["one", "more"])
@pytest.mark.parametrize("other", [CBackend(), ForeachBackend()], ids=lambda one: one.name)
def test_where_a_backend_is_not_available_the_next_one_runs(other, opt, donate, monkeypatch):
    monkeypatch.setattr(available, "_warned", set())
    one = fuse(opt, donate=donate, backends=[Broken(), other])
    params = {"w": draw((3, 4), torch.float32, 1)}
    with pytest.warns(UserWarning, match="it is broken.* Mend it.") as caught:
        check_steps(opt, params, donate, fused=one, ulps=8)
    assert len(caught) == 1


def test_a_backend_that_fails_is_named_once_for_each_reason_and_where_it_was_asked(monkeypatch):
    """The warning points at the caller's line, of fuse or of a step; and says what is left."""
    monkeypatch.setattr(available, "_warned", set())
    params = [torch.ones(2)]
    broken = [Broken(), CBackend(), ForeachBackend()]
    one, other = (fuse(fs.sgd(lr=0.1), backends=broken) for _ in range(2))
    with pytest.warns(UserWarning, match="broken is left out; what is left is C, fore") as caught:
        one(params, params, one.init(params))
    assert [warning.filename for warning in caught] == [__file__]
    other(params, params, other.init(params))  # a second warning would be an error


def test_without_any_backend_the_error_says_why(monkeypatch):
    monkeypatch.setattr(available, "_warned", set())
    broken, none = (fuse(fs.sgd(), backends=own) for own in ([Broken()], []))
    params = [torch.ones(2)]
    with pytest.warns(UserWarning, match="it is broken"), pytest.raises(RuntimeError) as left:
        broken(params, params, broken.init(params))
    assert "no backend works for leaves on cpu (none is left). End backends=" in str(left.value)
    for call in (lambda: none(params, params, none.init(params)), lambda: none.explain(params)):
        with pytest.raises(RuntimeError, match="no backend works for leaves on cpu"):
            call()
    assert_same(params, [torch.ones(2)])


KINDS = [(torch.float32, False), (torch.float64, True), (torch.bfloat16, True)]


@pytest.mark.parametrize(("name", "kind"), in_turns(RECIPES, KINDS), ids=str)
def test_foreach_operators_give_what_the_chain_gives(name, kind):
    """Roots are torch's own on both sides, but not those of vectors of leaves; Adadelta squares the
    quotient of two.
    """
    opt, (dtype, donate) = RECIPES[name](), kind
    one = fuse(opt, donate=donate, backends=[ForeachBackend()])
    more = 8 if name in NUMBERS_OF_ROOTS else None
    ulps = 5 if name == "adadelta" else 3
    check_steps(opt, odd_tree(dtype), donate, fused=one, ulps=ulps, more=more)
