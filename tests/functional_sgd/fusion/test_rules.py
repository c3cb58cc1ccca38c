"""Users' rules: what can be traced is a kernel, what cannot is reported and done with torch; all
give right results.
"""

import contextlib
import io
import re

import optree
import pytest
import torch

import functional_sgd as fs
from functional_sgd import chain, elementwise, fuse, leafwise, rename, treewise
from tests.functional_sgd.fusion.helpers import (
    REDUCING,
    check_steps,
    draw,
    plain_tree,
    then_step,
)

donating = pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])


def explained(opt):
    """The lines that `explain` prints, without what is read and written."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        fuse(opt).explain()
    return [re.split(r"\s+reads ", line)[0].rstrip() for line in out.getvalue().splitlines()]


def named(function):
    return pytest.mark.parametrize("rule", function, ids=lambda rule: rule.name)


@elementwise
def branches(update, *, lr):
    return dict(update=update if lr > 0.05 else 2 * update)


@elementwise
def takes_item(update, *, step):
    return dict(update=update * step.item())


@elementwise
def sums_products(update):
    return dict(update=torch.stack([update, update]).sum(0))


@elementwise
def unknown_function(update):
    return dict(update=torch.erf(update))


@elementwise
def unknown_method(update):
    return dict(update=update.sinh())


@elementwise
def floors(update):
    return dict(update=(2 * update) // 1)


@elementwise
def asks_the_dtype(update):
    return dict(update=update.to(torch.float64).to(update.dtype))


@elementwise
def tensor_of_more(update):
    return dict(update=(update[..., None] * torch.tensor([1.0, 2.0], dtype=update.dtype)).sum(-1))


@elementwise
def writes_in_place(update):
    new = update.clone()
    new += 1
    new.mul_(2)
    return dict(update=new)


@elementwise
def rounds_half(update):
    return dict(update=torch.round(update, decimals=1))


@elementwise
def divides_down(update):
    return dict(update=torch.div(update, 0.3, rounding_mode="floor"))


UNTRACED = [
    branches,
    takes_item,
    sums_products,
    unknown_function,
    unknown_method,
    floors,
    asks_the_dtype,
]
UNTRACED += [tensor_of_more, writes_in_place, rounds_half, divides_down]


@donating
@named(UNTRACED)
def test_a_rule_that_cannot_be_traced(rule, donate):
    opt = chain(fs.heavy_ball, rule, fs.sgd_step, lr=0.1)
    lines = explained(opt)
    assert lines[0] == "kernel  heavy_ball"
    if rule is not writes_in_place:  # whether that one can be traced is the tracer's business
        assert lines[1].startswith(f"torch   {rule.name}: ")
        assert len(lines[1]) > len(f"torch   {rule.name}: ") + 8
        assert lines[2:] == ["kernel  sgd_step"]
    check_steps(opt, plain_tree(torch.float32), donate, more=8)


def test_matrices_and_running_sums_are_for_leafwise_rules():
    @leafwise
    def whiten(update):
        return dict(update=update @ update.T @ update / 10 if update.dim() == 2 else update)

    @leafwise
    def running(update):
        return dict(update=update.cumsum(0) / 10)

    for rule in (whiten, running):
        check_steps(
            then_step(rule),
            {"m": draw((3, 4), torch.float32, 1), "v": draw((5,), torch.float32, 2)},
        )


@leafwise
def unit(update):
    return dict(update=update / (update.norm() + 1e-6))


@leafwise
def relative_to_mean(update):
    return dict(update=(update - update.mean()) / (1 + update.abs().max()))


@leafwise
def unit_float(update):
    return dict(update=update / (1 + float(update.norm())))


@leafwise
def clip_if_large(update):
    return dict(update=update / update.norm() if update.norm() > 2 else update)


@leafwise
def by_shape(update):
    return dict(
        update=update - update.mean(0)
        if update.dim() > 1
        else 2 * update[:1] + len(update) * update
    )


@leafwise
def by_type(update):
    return dict(
        update=update / update.norm()
        if isinstance(update, torch.Tensor) and update.numel()
        else update
    )


@leafwise
def over_elements(update):
    return dict(update=update + sum(float(x) for x in update.reshape(-1)[:3]))


@leafwise
def flips(update):
    return dict(update=update.flip(0) + update)


@leafwise(size=lambda leaf: torch.zeros(()))
def keeps_a_number(update, size):
    size = 0.9 * size + 0.1 * update.norm()
    return dict(update=update / (1 + size), size=size)


@leafwise(seen=torch.zeros_like)
def keeps_a_leaf(update, seen):
    return dict(update=update + seen * update.norm(), seen=update)


@treewise
def by_path_tree(grad):
    def change(path, leaf):
        return leaf * 2 if path[0] == "b" else leaf / (1 + leaf.norm())

    return dict(grad=optree.tree_map_with_path(change, grad))


@treewise
def mean_of_all(update):
    leaves = optree.tree_leaves(update)
    mean = sum(leaf.sum() for leaf in leaves) / sum(leaf.numel() for leaf in leaves)
    return dict(update=optree.tree_map(lambda leaf: leaf - mean, update))


@treewise
def largest_only(update):
    sizes = [float(leaf.norm()) for leaf in optree.tree_leaves(update)]
    return dict(
        update=optree.tree_map(
            lambda leaf: leaf if float(leaf.norm()) == max(sizes) else 0 * leaf, update
        )
    )


@treewise
def first_of_all(update):
    first = optree.tree_leaves(update)[0].reshape(-1)[:1]
    return dict(update=optree.tree_map(lambda leaf: leaf + first.sum().to(leaf.dtype), update))


@treewise(pace=lambda leaf: torch.zeros(()))
def keeps_numbers(update, pace):
    pace = optree.tree_map(lambda leaf, old: 0.5 * old + leaf.norm(), update, pace)
    return dict(update=optree.tree_map(lambda leaf, p: leaf / (1 + p), update, pace), pace=pace)


@leafwise
def scaled_by_param(param, update):
    return dict(update=update * param.norm(), param=0.9 * param)


WHOLE = [
    unit,
    relative_to_mean,
    unit_float,
    clip_if_large,
    by_shape,
    by_type,
    over_elements,
    flips,
    keeps_a_number,
]
WHOLE += [
    keeps_a_leaf,
    by_path_tree,
    mean_of_all,
    largest_only,
    first_of_all,
    keeps_numbers,
    scaled_by_param,
]


def small(dtype):
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (4, 3), "b": (5,), "c": (1,), "d": (2, 3, 2)}
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()
    }


def some_grads(params, number):
    """Sizes that change from step to step; no gradient for one leaf or another."""
    scale = [0.1, 10.0, 1.0, 0.01][number]
    leave_out = [None, "b", "a", None][number]
    return {
        name: None
        if name == leave_out
        else scale * draw(leaf.shape, leaf.dtype, 7 * number + leaf.dim())
        for name, leaf in params.items()
    }


@donating
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@named(WHOLE)
def test_rules_that_see_whole_leaves(rule, dtype, donate):
    if dtype.is_complex and rule.name in ("over_elements", "relative_to_mean", "first_of_all"):
        pytest.skip("not for complex numbers")
    before = [] if "grad" in rule.columns else [fs.heavy_ball]
    for rules in (
        [rule],
        [*before, rule, cautious] if before else [rule, fs.heavy_ball],
        [*before, rule, unit],
    ):
        check_steps(
            then_step(*rules), small(dtype), donate, steps=4, grads=some_grads, more=4 * REDUCING
        )


@donating
def test_a_rule_that_looks_at_types(donate):
    """A symbol must not take the branch for things that are no tensors."""

    @elementwise
    def doubled(update):
        return dict(update=2 * update if isinstance(update, torch.Tensor) else update)

    check_steps(then_step(doubled), small(torch.float32), donate, grads=some_grads)


@donating
def test_many_barriers_in_a_row(donate):
    rules = (
        fs.clip_norm,
        fs.centralize,
        fs.average_grad,
        unit,
        fs.trust_ratio,
        keeps_a_leaf,
        mean_of_all,
    )
    check_steps(
        then_step(*rules),
        small(torch.float32),
        donate,
        steps=4,
        grads=some_grads,
        more=4 * REDUCING,
    )


@donating
def test_one_rule_twice(donate):
    twice = chain(
        fs.clip_norm,
        fs.average_grad,
        rename(fs.clip_norm, grad="update", max_norm="max_update"),
        unit,
        rename(fs.clip_norm, grad="update", max_norm="max_last"),
        fs.sgd_step,
        lr=0.1, max_norm=0.5, max_update=0.1, max_last=0.05,
    )  # fmt: skip
    check_steps(twice, small(torch.float32), donate, steps=4, grads=some_grads, more=REDUCING)


@elementwise
def cautious(grad, update):
    return dict(update=torch.where(grad * update > 0, update, 0.0))


@elementwise(ema=torch.clone)
def average_params(param, ema, *, ema_mom=0.99):
    return dict(ema=torch.lerp(param, ema, ema_mom))


@donating
def test_a_chain_of_many_ideas_is_one_pass_after_the_norm(donate):
    adam = (fs.weight_decay, fs.average_grad, fs.average_sqr_grad, fs.debias, fs.scale_by_rms)
    opt = chain(fs.clip_norm, *adam, cautious, fs.sgd_step, average_params, lr=0.1, sqr_mom=0.999)
    # torch's lerp takes 1 - ema_mom in float32, kernels in double precision
    check_steps(opt, plain_tree(torch.float32), donate, ulps=10)
    names = ["clip_norm", *(rule.name for rule in adam), "cautious", "sgd_step", "average_params"]
    assert explained(opt) == ["kernel  takes grad_norm", f"kernel  {', '.join(names)}"]


def test_the_source_can_be_read():
    code = fuse(fs.adamw()).source()
    for word in (
        "/* lr */",
        "/* mom */",
        "/* step */",
        "in_grad_avg",
        "out_sqr_avg",
        "weight_decay, average_grad",
    ):
        assert word in code
    assert "uint16_t *in_param" in fuse(fs.adamw()).source(torch.bfloat16)
    assert "double *in_param" in fuse(fs.adamw()).source(torch.float64)
