"""What a GPU kernel is called with: tables that are sent once, scalars that stay where they are,
memory for results.
"""

import gc
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch

import functional_sgd as fs
from functional_sgd import by_path, fuse
from functional_sgd.call import take_apart
from functional_sgd.fusion.backends import available
from functional_sgd.fusion.backends.c.launch import CBackend
from functional_sgd.fusion.backends.foreach import ForeachBackend
from functional_sgd.fusion.backends.triton import launch, tables
from functional_sgd.fusion.backends.triton.launch import (
    BLOCK,
    LONGEST,
    PROGRAMS,
    TritonBackend,
    _kind,
    _on_device,
    _Programs,
)
from functional_sgd.fusion.backends.triton.tables import KEPT, Tables
from functional_sgd.fusion.buffers import apart
from functional_sgd.fusion.chunks import cut_up
from functional_sgd.fusion.column import Column
from functional_sgd.fusion.group import Group, signatures
from functional_sgd.fusion.kernel import Dtypes
from functional_sgd.fusion.scalars import Scalars
from tests.catalogue import RECIPES
from tests.comparing import assert_close
from tests.functional_sgd.fusion.helpers import check_steps, draw

CPU = torch.device("cpu")


@pytest.fixture
def capturing(monkeypatch):
    """A switch for whether a graph is being captured; while it is, nothing may be pinned."""
    now, real = [], tables._pinned

    def pinned(size, device):
        assert not now, "asks for pinned memory during a capture, for which the host would wait"
        return real(size, device)

    monkeypatch.setattr(tables, "_capturing", lambda device: bool(now))
    monkeypatch.setattr(tables, "_pinned", pinned)
    return now


def test_a_table_is_sent_once():
    known, array = Tables(), np.arange(6, dtype=np.int64).reshape(2, 3)
    sent = known.put(array, CPU)
    assert sent.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert known.put(array.copy(), CPU) is sent
    array[0, 0] = 7
    assert sent[0, 0] == 0
    assert known.put(array, CPU)[0, 0] == 7
    assert known.put(array.reshape(3, 2), CPU).shape == (3, 2)
    assert known.put(array.astype(np.float64), CPU).dtype == torch.float64


def test_a_table_with_a_name_is_not_compared():
    known, name = Tables(), object()
    sent = known.put(np.zeros(3), CPU, name)
    assert known.put(np.ones(3), CPU, name) is sent
    assert known.put(np.ones(3), CPU, object()).tolist() == [1, 1, 1]


def test_only_the_last_tables_are_remembered():
    known, arrays = Tables(), [np.full(3, number) for number in range(3 * KEPT)]
    first = known.put(arrays[0], CPU)
    for array in arrays:
        known.put(array, CPU)
        assert known.put(arrays[0], CPU) is first
    assert len(known._known) == KEPT


def test_a_captured_table_is_the_graphs_own(capturing):
    """It is sent at every replay, from memory that nobody else writes to; what was sent before may
    be gone by then.
    """
    known, array = Tables(), np.arange(3)
    before, spares = known.put(array, CPU), list(known._spare[array.nbytes])
    capturing.append(True)
    captured = [known.put(array, CPU) for _ in range(2)]
    assert all(one.tolist() == [0, 1, 2] for one in captured)
    assert len({one.data_ptr() for one in (before, *captured)}) == 3
    kept = {one.data_ptr() for one in known._captured}
    assert {one.data_ptr() for one in (*spares, *captured)} <= kept
    capturing.clear()
    assert known.put(array, CPU) is before


def test_a_capture_copies_from_pinned_memory_that_was_there_before(capturing, monkeypatch):
    """Torch refuses to copy from other memory during a capture, and pinning would wait."""
    sent, real = [], tables._sent
    monkeypatch.setattr(tables, "_sent", lambda *args: sent.append(args[2]) or real(*args))
    known, array = Tables(), np.arange(4)
    known.put(array, CPU)
    spares = {one.data_ptr() for one in known._spare[array.nbytes]}
    assert len(spares) == 2, "two tables of one size may be needed in one capture"
    capturing.append(True)
    sent.clear()
    known.put(array, CPU)
    known.put(array + 1, CPU)
    assert {one.data_ptr() for one in sent} == spares


def test_a_capture_without_pinned_memory_is_an_error_that_says_what_to_do(capturing):
    known, array = Tables(), np.arange(3)
    capturing.append(True)
    with pytest.raises(RuntimeError, match="there is no pinned memory of 24 bytes left.*Take an"):
        known.put(array, CPU)
    capturing.clear()
    known.put(array, CPU)
    capturing.append(True)
    for _ in range(2):
        known.put(array, CPU)
    with pytest.raises(RuntimeError, match="Take an ordinary step"):
        known.put(array, CPU)


def test_an_ordinary_step_makes_room_for_another_capture(capturing):
    """Though it is just like those before it, and sends nothing."""
    known, array = Tables(), np.arange(3)
    for _ in range(3):
        known.put(array, CPU)
        capturing.append(True)
        for _ in range(2):
            known.put(array, CPU)
        capturing.clear()
    assert len(known._captured) == 12


def test_there_is_room_for_as_many_tables_as_a_step_has(capturing):
    """Such as several hypers that differ by leaf."""
    known, arrays = Tables(), [np.arange(3) + number for number in range(5)]
    for array in arrays:
        known.put(array, CPU)
    capturing.append(True)
    assert [known.put(array, CPU).tolist() for array in arrays] == [a.tolist() for a in arrays]


def test_tables_of_a_graph_live_as_long_as_the_kernel_and_no_longer(capturing):
    known, array = Tables(), np.arange(3)
    known.put(array, CPU)
    capturing.append(True)
    held = weakref.ref(known.put(array, CPU))
    assert held() is not None
    del known
    gc.collect()
    assert held() is None


@pytest.mark.parametrize(
    "sizes", [[], [0], [5], [BLOCK], [3, 0, BLOCK + 1, 2 * BLOCK * PROGRAMS], [10**8]]
)
def test_chunks_cover_every_leaf_once(sizes):
    programs = _Programs(sizes)
    ends = [0] * len(sizes)
    for leaf, start, count in programs.table.T.tolist():
        assert start == ends[leaf]
        assert start % BLOCK == 0
        assert 0 < count <= LONGEST * BLOCK
        ends[leaf] += count
    assert ends == sizes
    leaf, bounds = programs.table[0].tolist(), programs.ends.tolist()
    assert (bounds[0], bounds[-1]) == (0, programs.count)
    for number, (first, last) in enumerate(pairwise(bounds)):
        assert leaf[first:last] == [number] * leaf.count(number)


def test_chunks_of_a_small_tree_are_short_and_of_a_large_one_long():
    assert _Programs([100_000]).table[2].max() == BLOCK
    assert _Programs([10**8]).table[2].max() == LONGEST * BLOCK
    assert cut_up([5, 2], 2)[2].tolist() == [2, 2, 1, 2]


def test_results_of_a_gpu_lie_apart_in_one_buffer():
    shapes = [(3, 5), (), (0, 2), (16,), (2, 17)]
    found = apart([torch.empty(shape) for shape in shapes], torch.float64)
    assert [tuple(one.shape) for one in found] == shapes
    assert all(one.dtype == torch.float64 and one.is_contiguous() for one in found)
    assert len({one.untyped_storage().data_ptr() for one in found}) == 1
    assert all(
        (one.data_ptr() - found[0].data_ptr()) % (16 * 8) == 0 for one in found if one.numel()
    )
    for number, one in enumerate(found):
        one.fill_(number)
    assert all((one == number).all() for number, one in enumerate(found))


def call(hyper, count=3):
    """A call over a few leaves, and their group."""
    opt = fs.sgd()
    params = [torch.ones(2) for _ in range(count)]
    leaves = take_apart(opt.plan, params, params, opt.init(params), dict(lr=hyper), {})
    needs = fuse(opt).needs()
    (group,), _ = Group.split(signatures(leaves, needs), needs.columns, leaves)
    return Scalars(leaves), group


def seen(scalars, group, name="lr"):
    """What a kernel gets for a scalar."""
    return _on_device(scalars.find(name, group), CPU)


@pytest.mark.parametrize(
    ("hyper", "kind", "expected"),
    [
        (0.5, None, 0.5),
        (2, None, 2.0),
        (torch.tensor(0.5), torch.float64, 0.5),
        ([0.1, 0.2, 0.3], torch.float64, [0.1, 0.2, 0.3]),
        ([0.1, torch.tensor(0.2, dtype=torch.float64), 0.3], torch.float64, [0.1, 0.2, 0.3]),
    ],
)
def test_a_scalar_is_a_number_or_memory_of_the_device(hyper, kind, expected):
    found = seen(*call(hyper))
    assert _kind(found) == kind
    assert (found if kind is None else found.tolist()) == expected


def test_a_number_that_was_made_stays_on_the_device():
    """As it is, if it is the same for all leaves."""
    scalars, group = call(0.1)
    number, vector = torch.tensor(3.0), torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64)
    scalars.of_tree["n"] = number
    assert seen(scalars, group, "n") is number
    scalars.of_leaves["v", id(group)] = vector
    assert seen(scalars, group, "v") is vector
    scalars.of_tree["n"] = number.bfloat16()
    assert seen(scalars, group, "n").dtype == torch.float64
    assert seen(scalars, group, "step").tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "name", ["adamw", "radam", "lookahead_sgd", "sgd_dampening", "clip_value_adamw", "lamb"]
)
def test_foreach_operators_leave_scalars_where_they_are(name):
    """On the meta device, which has no numbers: reading one would be an error."""
    opt, meta = RECIPES[name](), torch.device("meta")
    params = [torch.empty(3, device=meta), torch.empty(2, 2, device=meta)]
    hyper = dict(lr=torch.empty((), dtype=torch.float64, device=meta))
    leaves = take_apart(opt.plan, params, params, opt.init(params), hyper, {})
    fused = fuse(opt)
    needs = fused.needs()
    (group,), _ = Group.split(signatures(leaves, needs), needs.columns, leaves)
    scalars = Scalars(leaves)
    table = {"param": params, "grad": params, **leaves.slots}
    for work in fused.program.steps:
        reads = [Column(torch.float32, table[key]) for key in work.reads]
        writes = [
            Column(torch.float32, [torch.empty_like(one) for one in params]) for _ in work.outputs
        ]
        dtypes = Dtypes(
            (torch.float32,) * len(reads),
            (torch.float32,) * len(writes),
            torch.float32,
            torch.float32,
        )
        run = ForeachBackend().compile(work, dtypes, scalars, group)
        totals = run(group, reads, writes, scalars)
        for place, take in enumerate(work.takes):
            assert totals.shape == (2, len(work.takes))
            scalars.of_leaves[take.name, id(group)] = totals[:, place]
        table.update(zip(work.outputs, (column.tensors for column in writes), strict=True))


STAYING = ["adamw", "lamb", "clip_norm_adam", "radam", "ranger", "sgd_dampening", "centralize_sgd"]

WAITS = "Leaves._advanced in call.py sends which leaves have a gradient at every step"


@pytest.mark.parametrize(
    "idle", [False, pytest.param(True, marks=pytest.mark.xfail(reason=WAITS))], ids=["all", "idle"]
)
@pytest.mark.parametrize("name", STAYING)
def test_the_host_neither_waits_for_a_device_nor_sends_what_was_sent(name, idle, monkeypatch):
    """The meta device has no numbers: to read one is an error; and so is `torch.tensor` here."""
    opt = fuse(RECIPES[name](), backends=[ForeachBackend()])
    shapes = {"a": (3, 4), "b": (5,), "c": (2,)}
    params = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    state, grads = opt.init(params), {**params, **({"c": None} if idle else {})}
    params, state = opt(params, grads, state)
    real = torch.tensor

    def sends(data, *args, device=None, **more):
        assert device is None or torch.device(device).type != "meta", "the host would wait"
        return real(data, *args, device=device, **more)

    monkeypatch.setattr(torch, "tensor", sends)
    rate = torch.full((), 0.1, device="meta", dtype=torch.float64)
    trees = [by_path(params, {"a": 0.1, "*": 0.2}), by_path(params, {"a": rate, "*": 0.2})]
    for lr in (0.1, rate, *trees):
        params, state = opt(params, grads, state, dict(lr=lr))
    assert params["a"].is_meta


def test_without_triton_there_is_one_warning_and_foreach(monkeypatch):
    """The leaves of the CPU stand for those of a GPU."""

    def missing(source, function):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(TritonBackend, "treats", lambda self, device: True)
    monkeypatch.setattr(CBackend, "treats", lambda self, device: False)
    monkeypatch.setattr(launch, "loaded", missing)
    monkeypatch.setattr(available, "_warned", set())
    opt, params = (
        fuse(fs.adamw()),
        {"a": draw((5,), torch.float32, 1), "b": draw((3, 3), torch.float32, 2)},
    )
    with pytest.warns(UserWarning, match="No module named 'triton'.*Install triton") as caught:
        found = opt(params, params, opt.init(params))
    assert len(caught) == 1
    assert_close(found, fs.adamw()(params, params, opt.init(params)), rtol=1e-6)
    assert [one.name for one in opt.working()] == ["C", "foreach"]
    check_steps(fs.adamw(), params, fused=opt)
    check_steps(
        fs.adamw(), params, fused=opt, lr=torch.tensor(0.1), mom={"a": 0.5, "b": torch.tensor(0.6)}
    )
    for name in ("lamb", "clip_norm_adam"):
        check_steps(RECIPES[name](), params, fused=fuse(RECIPES[name]()))
