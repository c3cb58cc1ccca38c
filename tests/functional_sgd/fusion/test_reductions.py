"""Numbers made of columns: exact, taken in the pass that has the columns at hand."""

import contextlib
import io
import math

import optree
import pytest
import torch

import functional_sgd as fs
from functional_sgd import (
    all_finite,
    chain,
    elementwise,
    fuse,
    largest,
    mean,
    norm,
    sgd_step,
    total,
    treewise,
)
from functional_sgd.call import take_apart
from functional_sgd.fusion.backends.backend import Backend
from functional_sgd.fusion.backends.c.launch import CBackend
from functional_sgd.fusion.backends.foreach import ForeachBackend
from functional_sgd.fusion.column import Column
from functional_sgd.fusion.group import Group, Needs, signatures
from functional_sgd.fusion.kernel import SUPPORTED_DTYPES, Dtypes
from functional_sgd.fusion.passes import Pass
from functional_sgd.fusion.planning import make_program
from functional_sgd.fusion.scalars import Scalars
from functional_sgd.state import working_dtype
from tests.catalogue import RECIPES
from tests.functional_sgd.fusion.helpers import check_steps, kinds, odd_tree, plain_tree

SIZES = (3, 0, 1, 200_003, 65_536, 31)


@elementwise
def reduces(
    param,
    grad,
    *,
    length=norm("grad"),
    dot=total(lambda grad, param: grad * param),
    average=mean(lambda grad: grad.abs()),
    top=largest(lambda grad: grad - 1),
    fine=all_finite("grad", over="leaf"),
):
    """Every kind of number; each counts."""
    return dict(param=param - grad * (length + dot + average + top) * fine)


def leaves(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype) for size in SIZES]


def taken(
    backend: Backend, params: list[torch.Tensor], grads: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What a backend makes of columns: a number for each leaf, before it is finished."""
    plan = chain(reduces).plan
    work = make_program(plan).steps[0]
    assert isinstance(work, Pass)
    parts = take_apart(plan, params, grads, chain(reduces).init(params), None, {})
    (group,), _ = Group.split(signatures(parts, Needs((), False, False)), (), parts)
    dtypes = Dtypes(
        (grads[0].dtype, params[0].dtype), (), working_dtype(params[0]), params[0].dtype
    )
    assert set(work.reads) == {"grad", "param"}
    scalars = Scalars(parts)
    columns = {"grad": Column(grads[0].dtype, grads), "param": Column(params[0].dtype, params)}
    run = backend.compile(work, dtypes, scalars, group)
    totals = run(group, [columns[name] for name in work.reads], [], scalars)
    assert totals is not None
    assert totals.dtype == torch.float64
    return {take.name: totals[:, place] for place, take in enumerate(work.takes)}


def wanted(params: list[torch.Tensor], grads: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same from torch, in double precision."""
    pairs = [(param.double(), grad.double()) for param, grad in zip(params, grads, strict=True)]
    each = {
        "length": [grad.square().sum() for _, grad in pairs],
        "dot": [(param * grad).sum() for param, grad in pairs],
        "average": [grad.abs().sum() for _, grad in pairs],
        "top": [(grad - 1).max() if len(grad) else torch.tensor(-math.inf) for _, grad in pairs],
        "fine": [grad.isfinite().all().double() for _, grad in pairs],
    }
    return {name: torch.stack([v.double() for v in values]) for name, values in each.items()}


backends = pytest.mark.parametrize("backend", [CBackend(), ForeachBackend()], ids=lambda b: b.name)


@backends
@pytest.mark.parametrize("dtype", sorted(SUPPORTED_DTYPES, key=str), ids=str)
def test_numbers_of_columns_are_those_of_double_precision(
    backend: Backend, dtype: torch.dtype
) -> None:
    params, grads = leaves(dtype), leaves(dtype)[::-1]
    params = [torch.linspace(0.5, 2, len(grad)).to(dtype) for grad in grads]
    found, expected = taken(backend, params, grads), wanted(params, grads)
    for name in ("length", "average", "top", "fine"):
        torch.testing.assert_close(found[name], expected[name], rtol=2e-13, atol=0)
    torch.testing.assert_close(found["dot"], expected["dot"], rtol=0, atol=2e-13 * 200_003)


@backends
def test_by_hand(backend: Backend) -> None:
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([]), torch.full((100,), 2.0)]
    grads.append(torch.tensor([1e30, 0.0]))
    params = [torch.ones_like(grad) for grad in grads]
    found = taken(backend, params, grads)
    huge = float(torch.tensor(1e30))
    assert found["length"].tolist() == [25.0, 0.0, 400.0, huge**2]
    assert found["dot"].tolist() == [7.0, 0.0, 200.0, huge]
    assert found["top"].tolist() == [3.0, -math.inf, 1.0, float(torch.tensor(1e30) - 1)]
    assert found["fine"].tolist() == [1.0, 1.0, 1.0, 1.0]


@backends
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(backend: Backend, bad: float) -> None:
    grads = [torch.ones(100_000), torch.ones(100_000)]
    grads[1][77_777] = bad
    found = taken(backend, [torch.ones(100_000)] * 2, grads)
    for name, (whole, broken) in ((n, v.tolist()) for n, v in found.items()):
        assert math.isfinite(whole), name
        assert broken == 0 if name == "fine" else not math.isfinite(broken), name
    assert math.isnan(found["top"][1]) == math.isnan(bad), "a maximum hands NaN on"


def test_the_number_of_threads_does_not_matter() -> None:
    before, tensors = torch.get_num_threads(), [torch.randn(1_000_000), torch.randn(5)]
    many = taken(CBackend(), tensors, tensors)
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        again = taken(CBackend(), tensors, tensors)
    finally:
        torch.set_num_threads(before)
    for name, value in many.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("name", ["lamb", "larc", "clip_norm_adam"])
def test_steps_with_norms_are_the_same_for_any_number_of_threads(name: str) -> None:
    opt, params = RECIPES[name](), {"w": torch.randn(300_000), "b": torch.randn(7)}
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(fuse(opt)(params, params, opt.init(params)))
        finally:
            torch.set_num_threads(before)
    (one, _), (two, _) = results
    assert all(torch.equal(one[key], two[key]) for key in params)


def explained(opt: fs.Chain) -> list[list[str]]:
    """The lines of `explain`: kind, what it does, what it reads and writes."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        fuse(opt).explain()
    lines = [line.replace("  reads", "   reads") for line in out.getvalue().splitlines()]
    return [[part.strip() for part in line.split("  ") if part.strip()] for line in lines]


def test_a_number_is_taken_in_the_pass_that_makes_its_columns() -> None:
    """LAMB: Adam's pass takes both norms, and a second pass moves the params."""
    assert explained(fs.lamb()) == [
        [
            "kernel",
            "weight_decay, average_grad, average_sqr_grad, debias, scale_by_rms, takes size, "
            "takes length",
            "reads param, grad, grad_avg, sqr_avg; writes grad_avg, sqr_avg",
        ],
        [
            "kernel",
            "weight_decay, debias, scale_by_rms, trust_ratio, sgd_step",
            "reads param, grad_avg, sqr_avg; writes param",
        ],
    ]


def test_clipping_reads_the_gradient_once_more_and_writes_nothing() -> None:
    first, second = explained(chain(fs.clip_norm, fs.adamw()))
    assert first == ["kernel", "takes grad_norm", "reads grad"]
    assert second[1].startswith("clip_norm, weight_decay, average_grad")


def test_several_numbers_of_the_same_columns_are_taken_together() -> None:
    assert [line[1] for line in explained(chain(reduces))] == [
        "takes length, takes dot, takes average, takes top, takes fine",
        "reduces",
    ]


def test_as_many_passes_as_there_are_numbers_that_need_each_other() -> None:
    opt = chain(fs.clip_norm, fs.average_grad, fs.trust_ratio, fs.sgd_step, lr=0.1)
    assert kinds(fuse(opt)) == ["kernel", "kernel", "kernel"]
    last = fs.rename(fs.clip_norm, grad="update", max_norm="max_update", grad_norm="update_norm")
    again = chain(fs.clip_norm, fs.average_grad, last, fs.sgd_step, lr=0.1, max_update=0.1)
    assert kinds(fuse(again)) == ["kernel", "kernel", "kernel"]


@elementwise
def unit(update, *, length=norm("update"), gain=2.0):
    """A user's rule."""
    return dict(update=update * (gain / (2 * length)))


def test_a_rule_with_a_norm_is_part_of_a_kernel_that_is_called_with_it() -> None:
    opt = chain(fs.average_grad, unit, fs.sgd_step, lr=0.5)
    assert [line[1] for line in explained(opt)] == ["average_grad, takes length", "unit, sgd_step"]
    assert "/* length */" in fuse(opt).source()
    params = [torch.zeros(2), torch.zeros(2)]
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([0.0, 8.0])]
    new, _ = fuse(opt)(params, grads, opt.init(params))
    torch.testing.assert_close(new, [torch.tensor([-0.3, -0.4]), torch.tensor([0.0, -0.5])])


def test_a_norm_of_something_that_is_in_no_column_is_taken_in_passing() -> None:
    @elementwise
    def shifted(
        param, update, *, square=total(lambda param, update: (update + 0.1 * param).square())
    ):  # type: ignore[no-untyped-def]
        return dict(update=update / square.sqrt())

    opt = chain(shifted, fs.sgd_step, lr=1.0)
    assert kinds(fuse(opt)) == ["kernel", "kernel"]
    params, grads = [torch.tensor([10.0, 0.0])], [torch.tensor([2.0, 4.0])]
    new, _ = fuse(opt)(params, grads, opt.init(params))
    torch.testing.assert_close(new, [torch.tensor([10 - 0.4, -0.8])])


def test_an_elementwise_rule_may_not_take_a_norm_by_itself() -> None:
    @elementwise
    def wrong(update):  # type: ignore[no-untyped-def]
        return dict(update=update / torch.linalg.vector_norm(update))

    with pytest.raises(TypeError, match="wrong: is called elementwise, but .* norm\\('update'\\)"):
        chain(wrong, fs.sgd_step, lr=1.0)


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_every_kind_of_number_in_a_step(dtype: torch.dtype, donate: bool) -> None:
    check_steps(chain(reduces), odd_tree(dtype), donate, ulps=16)


@elementwise(best=-1.0, spread=0.0)
def whole(
    grad,
    update,
    *,
    best,
    spread,
    top=largest(lambda grad: grad.abs(), over="tree"),
    average=mean(lambda update: update * update, over="tree"),
    fine=all_finite("grad"),
):
    """Every kind of number of the whole tree, kept as numbers of the tree."""
    best = torch.where(top > best, top, best)
    return dict(update=update * fine / (1 + best), best=best, spread=average)


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_numbers_of_the_tree_are_made_of_all_leaves(donate: bool) -> None:
    """Of several dtypes, and so in several groups."""
    params = {str(t): plain_tree(t) for t in (torch.float32, torch.float64, torch.bfloat16)}
    _, state = check_steps(chain(whole, fs.sgd_step, lr=0.1), params, donate)
    assert 3 < state["best"] < 10
    assert state["spread"] == pytest.approx(1, rel=0.05)


def test_a_tree_without_gradients_keeps_its_numbers() -> None:
    opt, params = chain(whole, fs.sgd_step, lr=0.1), {"w": torch.ones(2)}
    state = opt.init(params)
    _, after = fuse(opt)(params, {"w": None}, state)
    assert (float(after["best"]), float(after["spread"])) == (-1.0, 0.0)


def test_a_gradient_that_is_not_finite_stops_all_leaves() -> None:
    opt, params = chain(whole, fs.sgd_step, lr=0.1), [torch.ones(2), torch.ones(3)]
    grads = [torch.ones(2), torch.tensor([1.0, 2.0, float("inf")])]
    new, state = fuse(opt)(params, grads, opt.init(params))
    assert torch.equal(new[0], params[0])
    assert state["best"] == math.inf


def test_lamb_by_hand_where_torchs_own_norm_is_off() -> None:
    """Of 2 ** 22 equal numbers torch's float32 norm is 1e-3 off on some processors; the kernel's is
    not.
    """
    params, grads = {"w": torch.full((2**22,), 0.5)}, {"w": torch.full((2**22,), 0.1)}
    opt = chain(fs.trust_ratio, fs.sgd_step, lr=1.0, max_trust=10.0)
    new, _ = fuse(opt)(params, grads, opt.init(params))
    torch.testing.assert_close(new["w"], torch.zeros(2**22), rtol=0, atol=1e-7)


def test_the_norm_of_a_huge_gradient_is_exact_to_double_precision() -> None:
    """Ten million elements, whose squares a float32 sum gets wrong in the fourth digit."""
    opt, size = chain(fs.clip_norm, fs.sgd_step, lr=1.0, max_norm=1.0), 10_000_000
    grad = torch.full((size,), 0.1)
    new, _ = fuse(opt)([torch.zeros(size)], [grad], opt.init([torch.zeros(size)]))
    exact = float(grad[0]) / (float(grad[0]) * math.sqrt(size) + 1e-6)
    assert float(new[0][0]) == pytest.approx(-exact, rel=2e-7)


@treewise(spread=0.0)
def centre(update, *, spread):
    leaves = optree.tree_leaves(update)
    middle = sum(leaf.sum() for leaf in leaves)
    moved = optree.tree_map(lambda leaf: leaf - middle, update)
    return dict(update=moved, spread=0.5 * spread + middle.abs())


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_a_treewise_rule_may_keep_a_number(donate):
    check_steps(chain(centre, sgd_step, lr=0.1), plain_tree(torch.float32), donate=donate)
