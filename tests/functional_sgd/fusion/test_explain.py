"""`explain` says what really runs: the kernels and torch rules, in that order, on those leaves."""

import contextlib
import io

import optree
import pytest
import torch

import functional_sgd as fs
from functional_sgd import chain, elementwise, fuse, leafwise, rename
from functional_sgd.fusion import torch_rules
from functional_sgd.fusion.backends.c import launch
from tests.catalogue import RECIPES
from tests.comparing import assert_same, copy_of
from tests.functional_sgd.fusion.helpers import draw
from tests.turns import in_turns


def explained(opt, params=None):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        opt.explain(params)
    return out.getvalue().splitlines()


@pytest.fixture
def ran(monkeypatch):
    """A list that grows with everything that runs: kernels, and rules by torch."""
    done = []
    real = {name: getattr(torch_rules, name) for name in ("run_in_batches", "run_on_tree")}
    kernel = launch._Kernel.__call__

    def counted(self, *args):
        done.append("kernel")
        return kernel(self, *args)

    def noted(name, place):
        def note(*args):
            done.append(f"torch {args[place].rule!r}")
            return real[name](*args)

        return note

    monkeypatch.setattr(launch._Kernel, "__call__", counted)
    monkeypatch.setattr(torch_rules, "run_in_batches", noted("run_in_batches", 0))
    monkeypatch.setattr(torch_rules, "run_on_tree", noted("run_on_tree", 1))
    return done


@leafwise
def orthogonal(update):
    """A matrix rule, as Muon has one: X X^T X takes a matrix towards its nearest orthogonal one."""
    if update.dim() != 2:
        return dict(update=update)
    x = update / (update.norm() + 1e-7)
    return dict(update=1.5 * x - 0.5 * x @ x.T @ x)


@leafwise(rows=lambda param: param.new_zeros(param.shape[:1]))
def by_row(update, rows):
    return dict(update=update, rows=rows + 1)


@fs.treewise
def spread(grad):
    return dict(grad=optree.tree_map(lambda leaf: 2 * leaf, grad))


CHAINS = {
    **{name: make() for name, make in RECIPES.items()},
    "matrix in the middle": chain(fs.average_grad, orthogonal, fs.sgd_step, lr=0.1),
    "clipped matrix": chain(
        fs.clip_norm, fs.heavy_ball, orthogonal, fs.trust_ratio, fs.weight_decay, fs.sgd_step,
        lr=0.1,
    ),
    "two matrix rules": chain(
        fs.centralize, fs.average_grad, orthogonal, rename(fs.clip_norm, grad="update"),
        rename(fs.centralize, grad="update"), fs.sgd_step, fs.sync_slow_params, lr=0.1,
    ),
    "tree and matrix": chain(spread, fs.clip_norm, orthogonal, fs.sgd_step, lr=0.1),
    "slot of another shape": chain(fs.average_grad, by_row, fs.sgd_step, lr=0.1),
}  # fmt: skip


def tree(dtype=torch.float32):
    return {"m": draw((4, 3), dtype, 1), "n": [draw((3, 3), dtype, 2), draw((5,), dtype, 3)]}


# Those of test_recipes.py in the same order, so that both have the same kernels.
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize(("name", "dtype"), in_turns(CHAINS, DTYPES), ids=str)
def test_what_runs_is_what_explain_prints(name, dtype, donate, ran):
    fused, params = fuse(CHAINS[name], donate=donate), tree(dtype)
    lines = explained(fused, params)
    table = lines[: lines.index("")]
    state, grads = fused.init(params), tree(dtype)
    for _ in range(2):
        ran.clear()
        params, state = fused(params, grads, state)
        printed = [" ".join(line.split(":")[0].split()) for line in table if "nothing" not in line]
        expected = ["kernel" if one.startswith("kernel") else one for one in printed]
        assert ran == expected
    passes = expected.count("kernel")
    words = "1 pass over" if passes == 1 else f"{passes} passes over"
    assert lines[len(table) + 1].startswith(
        f"3 leaves of {str(dtype)[6:]} on cpu: C, {words} memory, "
    )


def test_a_slot_of_another_shape_takes_no_leaf_out_of_the_kernels():
    lines = explained(fuse(CHAINS["slot of another shape"]), tree())
    assert [line.split()[0] for line in lines[:3]] == ["kernel", "torch", "kernel"]
    assert lines[3:] == [
        "",
        "3 leaves of float32 on cpu: C, 2 passes over memory, 10.0 bytes moved for each byte of "
        "params",
    ]


def test_a_rule_that_reads_a_slot_of_another_shape_is_left_to_torch():
    @elementwise(writes=("update",))
    def scaled(update, rows):
        return dict(update=update * (rows.sum() + 1))

    lines = explained(fuse(chain(by_row, scaled, fs.sgd_step, lr=0.1)))
    assert lines[1].startswith("torch   scaled: it reads 'rows', which may have another shape")


def test_leaves_that_no_kernel_treats_are_named(ran):
    """Those around them run in kernels all the same, if no number is made of all of them."""
    params = {**tree(), "z": draw((2,), torch.complex64, 4), "s": draw((6,), torch.float32, 5)[::2]}
    opt = fuse(fs.adamw())
    lines = explained(opt, params)
    assert lines[2].startswith("3 leaves of float32 on cpu: C, 1 pass over memory")
    assert lines[3].startswith("2 leaves without kernels, leaf by leaf: kernels cannot treat s, z")
    opt(params, params, opt.init(params))
    assert ran == ["kernel"]


def test_where_one_leaf_keeps_all_from_the_kernels_that_is_said(ran):
    params = {**tree(), "z": draw((2,), torch.complex64, 4)}
    opt = fuse(chain(fs.clip_norm, fs.sgd(lr=0.1)))
    (line,) = explained(opt, params)
    assert line.startswith("All 4 leaves run leaf by leaf: kernels cannot treat z (dtype, layout")
    opt(params, params, opt.init(params))
    assert ran == []


def test_a_donated_slot_that_lies_otherwise_than_its_param_keeps_its_leaf_from_kernels(ran):
    """A kernel would write a copy of it. What `init` gives lies as params do."""
    plain, params = fs.momentum(), {"w": draw((3, 4), torch.float32, 1)}
    opt, slot = fuse(plain, donate=True), torch.zeros(4, 3).T
    state = {**opt.init(params), "grad_avg": {"w": slot}}
    expected = plain(copy_of(params), copy_of(params), {**state, "grad_avg": {"w": slot.clone()}})
    found = opt(params, copy_of(params), state)
    assert_same(found, expected)
    assert found[1]["grad_avg"]["w"] is slot
    assert ran == []


BYTES = {"sgd": 3.0, "sgd_mom": 5.0, "adamw": 7.0, "lamb": 10.0, "clip_norm_adam": 8.0, "lion": 5.0}


@pytest.mark.parametrize("whole", [True, False], ids=["fused", "parts fused"])
def test_a_side_without_rules_is_left_out(whole):
    inner = fs.accumulate(fs.sgd(lr=0.1), every=2)
    opt = fuse(chain(fs.clip_norm, inner)) if whole else chain(fs.clip_norm, fuse(inner))
    lines = explained(opt)
    assert not [line for line in lines if "nothing to run" in line]
    assert any("clip_norm" in line for line in lines)
    assert any("sgd_step" in line for line in lines)


@pytest.mark.parametrize("name", BYTES)
def test_the_bytes_that_are_moved(name):
    """Every column that is read or written counts once a pass."""
    line = explained(fuse(RECIPES[name]()), tree())[-1]
    assert line.endswith(f", {BYTES[name]:.1f} bytes moved for each byte of params")


def test_columns_in_half_precision_move_half_as_much():
    line = explained(fuse(fs.adamw()), tree(torch.bfloat16))[-1]
    assert line.endswith(f", {(3 * 2 + 4 * 4) / 2:.1f} bytes moved for each byte of params")


def test_the_backends_that_will_run_are_named():
    from functional_sgd.fusion.backends.foreach import ForeachBackend

    opt = fuse(fs.adamw(), backends=[ForeachBackend()])
    assert "on cpu: foreach, 1 pass" in explained(opt, tree())[-1]


def test_what_has_to_be_passed_need_not_be_there():
    @elementwise
    def curved(grad, bend):
        return dict(update=grad * bend)

    opt = fuse(chain(curved, fs.sgd_step))
    assert opt.required == ("lr", "bend")
    assert "4.0 bytes moved" in explained(opt, tree())[-1]


def test_nothing_to_run_is_said():
    assert explained(fuse(fs.identity())) == ["nothing to run"]


def test_a_branch_on_a_value_is_called_one():
    @elementwise
    def halves(update, *, rate=2.0):
        if rate > 1:
            return dict(update=update / 2)
        return dict(update=update)

    first, _ = explained(fuse(chain(halves, fs.sgd_step)))
    assert "halves: it branches on a value" in first
    assert "use torch.where" in first
