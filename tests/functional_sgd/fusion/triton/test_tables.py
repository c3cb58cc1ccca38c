"""What a GPU kernel is called with: tables that are sent once, scalars that stay where they are,
memory for results.
"""

import numpy as np
import pytest
import torch
from functional_sgd.fusion.device import BLOCK, LONGEST, PROGRAMS, Chunks, Tables, kind_of
from functional_sgd.fusion.foreach import run_foreach
from functional_sgd.fusion.launch import cut_up

import functional_sgd as fs
from functional_sgd import fuse
from functional_sgd.call import take_apart
from functional_sgd.fusion import device, fused, scalars
from functional_sgd.fusion.buffers import apart
from functional_sgd.fusion.group import Group, signatures
from tests.catalogue import RECIPES
from tests.comparing import assert_close
from tests.functional_sgd.fusion.helpers import check_steps, draw

CPU = torch.device("cpu")


def test_a_table_is_sent_once():
    tables, array = Tables(), np.arange(6, dtype=np.int64).reshape(2, 3)
    sent = tables.put(array, CPU)
    assert sent.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tables.put(array.copy(), CPU) is sent
    array[0, 0] = 7
    assert sent[0, 0] == 0
    assert tables.put(array, CPU)[0, 0] == 7
    assert tables.put(array.reshape(3, 2), CPU).shape == (3, 2)
    assert tables.put(array.astype(np.float64), CPU).dtype == torch.float64


def test_a_table_with_a_name_is_not_compared():
    tables, name = Tables(), object()
    sent = tables.put(np.zeros(3), CPU, name)
    assert tables.put(np.ones(3), CPU, name) is sent
    assert tables.put(np.ones(3), CPU, object()).tolist() == [1, 1, 1]


def test_only_the_last_tables_are_remembered():
    tables, arrays = Tables(), [np.full(3, number) for number in range(3 * device.KEPT)]
    first = tables.put(arrays[0], CPU)
    for array in arrays:
        tables.put(array, CPU)
        assert tables.put(arrays[0], CPU) is first
    assert len(tables._known) == device.KEPT


def test_a_captured_table_is_the_graphs_own(monkeypatch):
    """It is sent at every replay, from memory that nobody else writes to; what was sent before may
    be gone by then.
    """
    tables, array = Tables(), np.arange(3)
    before, spare = tables.put(array, CPU), tables._spare[array.nbytes]
    monkeypatch.setattr(device, "_capturing", lambda where: True)
    monkeypatch.setattr(device, "_pinned", lambda *_: pytest.fail("asks for pinned memory"))
    captured = [tables.put(array, CPU) for _ in range(2)]
    assert all(one.tolist() == [0, 1, 2] for one in captured)
    assert len({one.data_ptr() for one in (before, *captured)}) == 3
    kept = {one.data_ptr() for one in device._KEPT_FOR_GRAPHS}
    assert {spare.data_ptr(), *(one.data_ptr() for one in captured)} <= kept
    monkeypatch.undo()
    assert tables.put(array, CPU) is before
    assert tables._spare == {}


@pytest.mark.parametrize(
    "sizes", [[], [0], [5], [BLOCK], [3, 0, BLOCK + 1, 2 * BLOCK * PROGRAMS], [10**8]]
)
def test_chunks_cover_every_leaf_once(sizes):
    chunks = Chunks(sizes)
    ends = [0] * len(sizes)
    for leaf, start, count in chunks.table.T.tolist():
        assert start == ends[leaf]
        assert start % BLOCK == 0
        assert 0 < count <= LONGEST * BLOCK
        ends[leaf] += count
    assert ends == sizes


def test_chunks_of_a_small_tree_are_short_and_of_a_large_one_long():
    assert Chunks([100_000]).table[2].max() == BLOCK
    assert Chunks([10**8]).table[2].max() == LONGEST * BLOCK
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
    (group,) = Group.split(signatures(leaves), leaves)
    return leaves, group


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
    leaves, group = call(hyper)
    (found,) = scalars.on_device(["lr"], leaves, {}, group)
    assert kind_of(found) == kind
    assert (found if kind is None else found.tolist()) == expected


def test_a_number_that_a_rule_has_made_stays_on_the_device():
    """As it is, if it is the same for all leaves."""
    leaves, group = call(0.1)
    number = torch.tensor(3.0)
    (found,) = scalars.on_device(["n"], leaves, {"n": dict.fromkeys(range(3), number)}, group)
    assert found is number
    (found,) = scalars.on_device(["n"], leaves, {"n": {k: number + k for k in range(3)}}, group)
    assert found.tolist() == [3, 4, 5]
    (found,) = scalars.on_device(
        ["n"], leaves, {"n": dict.fromkeys(range(3), number.bfloat16())}, group
    )
    assert found.dtype == torch.float64


@pytest.mark.parametrize(
    "name", ["adamw", "radam", "lookahead_sgd", "sgd_dampening", "clip_value_adamw"]
)
def test_foreach_operators_leave_scalars_where_they_are(name):
    """On the meta device, which has no numbers: reading one would be an error."""
    (segment,) = fuse(RECIPES[name]()).segments
    columns = {
        key: [torch.empty(3, device="meta"), torch.empty(2, 2, device="meta")]
        for key in segment.columns
    }
    rows = {key: [torch.empty((), dtype=torch.float64, device="meta")] for key in segment.hypers}
    rows["lr"] = [0.1]
    found = run_foreach(segment.graph, segment.outputs, columns, rows)
    assert {tuple(one.shape) for values in found.values() for one in values} == {(3,), (2, 2)}
    assert {(one.dtype, one.device.type) for values in found.values() for one in values} == {
        (torch.float32, "meta")
    }


def test_without_triton_there_is_one_warning_and_foreach(monkeypatch):
    """The leaves of the CPU stand for those of a GPU."""

    def missing(source):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(device, "treats", lambda where: True)
    monkeypatch.setattr(device, "_loaded", missing)
    monkeypatch.setattr(fused, "_warned", set())
    opt, params = (
        fuse(fs.adamw()),
        {"a": draw((5,), torch.float32, 1), "b": draw((3, 3), torch.float32, 2)},
    )
    with pytest.warns(UserWarning, match="No module named 'triton'.*Install triton") as caught:
        found = opt(params, params, opt.init(params))
    assert len(caught) == 1
    assert_close(found, fs.adamw()(params, params, opt.init(params)), rtol=1e-6)
    assert opt.compiled
    check_steps(fs.adamw(), params, fused=opt)
    check_steps(
        fs.adamw(), params, fused=opt, lr=torch.tensor(0.1), mom={"a": 0.5, "b": torch.tensor(0.6)}
    )
    lamb = fuse(RECIPES["lamb"]())
    lamb.triton = False
    check_steps(RECIPES["lamb"](), params, fused=lamb)
