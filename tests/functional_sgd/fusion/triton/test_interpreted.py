"""What runs on a GPU, run by Triton's interpreter: fused chains do what they do leaf by leaf."""

import optree
import pytest
import torch

import functional_sgd as fs
from functional_sgd import by_path, chain, elementwise, fuse, sgd_step
from functional_sgd.fusion.backends.triton import launch
from functional_sgd.fusion.passes import Pass
from tests.catalogue import ELEMENTWISE_RECIPES, NARROW, RECIPES
from tests.comparing import Untouched, assert_same, copy_of
from tests.functional_sgd.fusion.helpers import (
    ExactRoots,
    assert_near,
    check_steps,
    draw,
    grads_for,
    kinds,
    memory_of,
    odd_tree,
    tolerance_of,
)
from tests.functional_sgd.fusion.triton.helpers import interpreted, odd_sizes  # noqa: F401 (a fixture)
from tests.turns import in_turns, of_turn

pytestmark = pytest.mark.usefixtures("interpreted")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
donating = pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])


def made(opt):
    """The kernels that a fused optimizer has compiled."""
    passes = {id(s): s for p in opt.programs.values() for s in p.steps if isinstance(s, Pass)}
    return [kernel for work in passes.values() for kernel in work.compiled.values()]


ALL_DTYPES = {"adamw", "lamb", "clip_norm_adam", "centralize_sgd", "ranger", "rmsprop_centered"}
"""Recipes that are tried in every dtype; the others in single or in half precision, in turns."""

TRIED = [
    *[(name, dtype) for name in RECIPES if name in ALL_DTYPES for dtype in DTYPES],
    *in_turns(
        of_turn([name for name in RECIPES if name not in ALL_DTYPES], 0, 2),
        [torch.float32, torch.bfloat16],
    ),
]


@pytest.mark.parametrize(("name", "dtype"), TRIED, ids=str)
def test_an_interpreted_recipe_equals_the_chain(name, dtype):
    opt = RECIPES[name]()
    fused = fuse(opt)
    params, state = check_steps(opt, odd_sizes(dtype), steps=2, fused=fused)
    assert {type(kernel) for kernel in made(fused)} <= {launch._Kernel}
    assert len(made(fused)) == kinds(fused).count("kernel")
    if name in ELEMENTWISE_RECIPES and name != "identity":
        assert len(made(fused)) == 1
    late = {**state, "step": torch.full_like(state["step"], 40)}  # where RAdam trusts its variance
    grads, before = grads_for(params, 9), copy_of((params, late))
    with ExactRoots():
        expected = opt(before[0], grads, before[1])
    assert_near(fused(params, grads, late), expected, before, **tolerance_of(opt))


EXACT = {"eight_bit_momentum", "stochastic_momentum"}
"""What has neither sums nor powers, and keeps nothing that the interpreter rounds otherwise."""


@pytest.mark.parametrize(("name", "dtype"), in_turns(NARROW, DTYPES, each=2), ids=str)
def test_an_interpreted_recipe_rounds_as_the_chain_does(name, dtype):
    """Bit for bit, but for sums, the powers of Adam's corrections, and what was lost, which the
    interpreter cuts off where GPUs round.
    """
    opt = NARROW[name]()
    fused = fuse(opt)
    check_steps(opt, odd_sizes(dtype), steps=2, fused=fused, ulps=0 if name in EXACT else 2)
    assert {type(kernel) for kernel in made(fused)} == {launch._Kernel}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_largest_numbers_are_rounded_as_the_chain_does(dtype):
    """A quarter of a step above the largest number, where it stays."""
    most = torch.finfo(dtype).max
    params = torch.full((100,), most, dtype=dtype)
    grads = torch.full((100,), -most * torch.finfo(dtype).eps / 8, dtype=dtype)
    opt = chain(fs.sgd(lr=1.0), fs.round_stochastically)
    fused = fuse(opt)
    assert_same(fused(params, grads, opt.init(params))[0], params)
    assert_same(opt(params, grads, opt.init(params))[0], params)
    assert {type(kernel) for kernel in made(fused)} == {launch._Kernel}


@pytest.mark.parametrize("name", ["adamw", "lamb", "clip_norm_adam", "centralize_sgd"])
def test_donated_buffers_are_overwritten(name):
    params = odd_tree(torch.float32)
    opt = fuse(RECIPES[name](), donate=True)
    check_steps(RECIPES[name](), params, donate=True, fused=opt)
    params = {"w": draw((5,), torch.float32, 1)}
    state = opt.init(params)
    where = memory_of((params, {**state, "step": None}))
    params, state = opt(params, {"w": draw((5,), torch.float32, 2)}, state)
    assert memory_of((params, {**state, "step": None})) == where


def test_a_pure_step_overwrites_nothing():
    opt = fuse(fs.adamw())
    params = odd_sizes(torch.float32)
    state, held = opt.init(params), []
    for number in range(3):
        grads = grads_for(params, number)
        held.append(Untouched(params, grads, state))
        params, state = opt(params, grads, state)
    for old in held:
        old.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_program_may_treat_several_blocks(dtype, monkeypatch):
    monkeypatch.setattr(launch, "PROGRAMS", 1)
    params = {"long": draw((9 * launch.BLOCK + 5,), dtype, 1), "short": draw((7,), dtype, 2)}
    opt = fuse(fs.adamw())
    check_steps(
        fs.adamw(),
        params,
        fused=opt,
        grads=lambda params, _: optree.tree_map(torch.ones_like, params),
    )
    ((group,), _) = next(iter(opt._groups.values()))
    assert group.prepared["programs"].table[2].max() == 8 * launch.BLOCK


@donating
def test_mixed_dtypes(donate):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
    params = {
        str(dtype): {"m": draw((3, 4), dtype, 1), "v": draw((), dtype, 3)} for dtype in dtypes
    }
    check_steps(fs.adamw(), params, donate=donate)


def test_gradients_of_another_dtype():
    def grads(params, number):
        return optree.tree_map(torch.Tensor.bfloat16, grads_for(params, number))

    check_steps(fs.adamw(), odd_sizes(torch.float32), grads=grads)


HYPERS = {
    "number": lambda params: 0.2,
    "integer": lambda params: 1,
    "tensor": lambda params: torch.tensor(0.3),
    "by_path": lambda params: by_path(params, {"b*": 1e-2, "*": 1e-3}),
    "tree_of_tensors": lambda params: optree.tree_map(
        lambda leaf: torch.tensor(0.01 + leaf.dim()), params
    ),
    "some_tensors": lambda params: by_path(params, {"b*": torch.tensor(0.1), "*": 0.5}),
}


@pytest.mark.parametrize("make", HYPERS.values(), ids=HYPERS)
@pytest.mark.parametrize("name", ["adamw", "lamb", "clip_norm_adam"])
def test_hypers_of_every_kind(name, make):
    params = odd_sizes(torch.float32)
    check_steps(RECIPES[name](), params, lr=make(params))


def test_other_values_make_no_other_kernel():
    opt, params = (
        fuse(fs.adamw()),
        {"a": draw((5,), torch.float32, 1), "b": draw((7,), torch.float32, 2)},
    )
    state = opt.init(params)
    kinds = (
        [0.1, 1, 0.0, 1e-300],
        [torch.tensor(0.1), torch.tensor(2.0), by_path(params, {"a": 0.1, "b": 0.2})],
    )
    for count, values in enumerate(kinds, start=1):
        for value in values:
            params, state = opt(params, params, state, dict(lr=value))
            assert len(made(opt)) == count


@pytest.mark.parametrize("name", ["adamw", "clip_norm_adam", "lamb"])
def test_as_many_kernels_for_many_leaves_as_for_few(name):
    counts = []
    for leaves in (2, 50):
        params = [torch.ones(3) for _ in range(leaves)]
        opt = fuse(RECIPES[name]())
        opt(params, params, opt.init(params))
        counts.append(len(made(opt)))
    assert counts[0] == counts[1] <= 2


def test_leaves_may_change():
    """Other leaves, fewer gradients, other addresses: tables of earlier calls are not taken for
    theirs.
    """
    opt, fused = fs.adamw(), fuse(fs.adamw())
    for shapes in [
        [(3,), (2, 2)],
        [(4,), (2, 2)],
        [(2, 2), (3,)],
        [(2, 2)],
        [(3,), (2, 2)],
        [],
        [(0,)],
    ]:
        params = [draw(shape, torch.float32, 3) for shape in shapes]
        check_steps(opt, params, steps=3, fused=fused)
        check_steps(
            opt,
            params,
            steps=1,
            fused=fused,
            grads=lambda params, _: [None, *params[1:]] if params else [],
        )


def test_what_nobody_reads_is_not_computed():
    """A pass that would write nothing is no kernel's work, nor an error."""

    @fs.elementwise
    def idle(grad):
        return dict(unused=2 * grad, grad=grad)

    opt = chain(idle, fs.centralize, fs.sgd(lr=0.1))
    params = {"w": torch.ones(2, 3)}
    assert kinds(fuse(opt)) == ["torch", "kernel"]
    assert_same(fuse(opt)(params, params, opt.init(params)), opt(params, params, opt.init(params)))


@elementwise
def both_conditions(grad, *, step, wait=3.0):
    return dict(grad=torch.where((grad.square() > 1.0) & (step >= wait), 0.0, grad))


@elementwise
def numbers_alone(grad, *, step, wait=3.0):
    return dict(grad=torch.where((step < 5) & (step >= wait), 0.0, grad))


@pytest.mark.parametrize("rule", [both_conditions, numbers_alone], ids=repr)
def test_a_condition_of_elements_and_one_of_numbers(rule):
    """A condition that is made of numbers alone reaches the elements as a number."""
    check_steps(chain(rule, sgd_step, lr=0.1), odd_sizes(torch.float32), steps=4)
