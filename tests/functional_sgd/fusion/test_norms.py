"""Norms of whole leaves, which kernels take as numbers: exact, in one pass, for the library's rules
and for users'.
"""

import contextlib
import io

import optree
import pytest
import torch
from functional_sgd.fusion.launch import Shape
from functional_sgd.fusion.norms import norms_by_torch, norms_on_cpu
from functional_sgd.fusion.source import SUPPORTED_DTYPES

import functional_sgd as fs
from functional_sgd import chain, fuse, leafwise, treewise

SIZES = (3, 0, 1, 200_003, 65_536, 31)


def leaves(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype) for size in SIZES]


def on_cpu(tensors: list[torch.Tensor]) -> torch.Tensor:
    shape = Shape([tensor.numel() for tensor in tensors])
    return norms_on_cpu(shape, tensors[0].dtype, [tensor.data_ptr() for tensor in tensors])


@pytest.mark.parametrize("dtype", sorted(SUPPORTED_DTYPES, key=str), ids=str)
def test_norms_are_those_of_double_precision(dtype: torch.dtype) -> None:
    tensors = leaves(dtype)
    wanted = torch.stack([tensor.double().norm() for tensor in tensors])
    torch.testing.assert_close(on_cpu(tensors), wanted, rtol=2e-13, atol=0)
    torch.testing.assert_close(norms_by_torch(tensors, torch.float64), wanted, rtol=2e-13, atol=0)


def test_by_hand() -> None:
    tensors = [
        torch.tensor([3.0, 4.0]),
        torch.tensor([]),
        torch.full((100,), 2.0),
        torch.tensor([1e30, 0.0]),
    ]
    assert on_cpu(tensors).tolist() == [5.0, 0.0, 20.0, float(torch.tensor(1e30))]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    tensors = [torch.ones(100_000), torch.ones(100_000)]
    tensors[1][77_777] = bad
    whole, broken = on_cpu(tensors)
    assert whole == 100_000**0.5
    assert not broken.isfinite()


def test_the_number_of_threads_does_not_matter() -> None:
    tensors, before = [torch.randn(1_000_000), torch.randn(5)], torch.get_num_threads()
    many = on_cpu(tensors)
    try:
        torch.set_num_threads(1)
        assert torch.equal(on_cpu(tensors), many)
    finally:
        torch.set_num_threads(before)


def explained(opt: fs.Chain) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        fuse(opt).explain()
    return out.getvalue()


@leafwise
def unit(update, *, gain=2.0):  # type: ignore[no-untyped-def]
    """A user's rule."""
    return dict(update=update * (gain / (torch.linalg.norm(update) + update.norm())))


def test_a_leafwise_rule_with_norms_is_part_of_a_kernel_that_is_called_with_them() -> None:
    opt = chain(fs.average_grad, unit, fs.sgd_step, lr=0.5)
    assert explained(opt) == "kernel  average_grad\nkernel  unit, sgd_step\n"
    assert "/* norm_of_update */" in fuse(opt).source()
    params = [torch.zeros(2), torch.zeros(2)]
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([0.0, 8.0])]
    new, _ = fuse(opt)(params, grads, opt.init(params))
    torch.testing.assert_close(new, [torch.tensor([-0.3, -0.4]), torch.tensor([0.0, -0.5])])


def test_a_norm_of_something_that_is_not_in_memory_is_taken_by_torch() -> None:
    @leafwise
    def shifted(param, update, *, wd=0.1):  # type: ignore[no-untyped-def]
        return dict(update=update / torch.linalg.vector_norm(update + wd * param))

    opt = chain(shifted, fs.sgd_step, lr=1.0)
    assert explained(opt) == "kernel  shifted, sgd_step\n"
    params, grads = [torch.tensor([10.0, 0.0])], [torch.tensor([2.0, 4.0])]
    new, _ = fuse(opt)(params, grads, opt.init(params))
    torch.testing.assert_close(new, [torch.tensor([10 - 0.4, -0.8])])


def test_an_elementwise_rule_may_not_take_a_norm() -> None:
    @fs.elementwise
    def wrong(update):  # type: ignore[no-untyped-def]
        return dict(update=update / torch.linalg.vector_norm(update))

    assert "torch   wrong: it takes a norm" in explained(chain(wrong, fs.sgd_step, lr=1.0))


def test_a_treewise_rule_may_reduce_each_leaf_to_its_own_number() -> None:
    @treewise
    def each(grad):  # type: ignore[no-untyped-def]
        return dict(grad=optree.tree_map(lambda leaf: leaf / torch.linalg.vector_norm(leaf), grad))

    opt = chain(each, fs.sgd_step, lr=1.0)
    assert explained(opt) == "kernel  each, sgd_step\n"
    params = {"a": torch.zeros(2), "b": torch.zeros(2)}
    grads = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 8.0])}
    new, _ = fuse(opt)(params, grads, opt.init(params))
    torch.testing.assert_close(
        new, {"a": torch.tensor([-0.6, -0.8]), "b": torch.tensor([0.0, -1.0])}
    )


def test_lamb_by_hand_where_torchs_own_norm_is_off() -> None:
    """Of 2 ** 22 equal numbers torch's float32 norm is 1e-3 off on some processors; the kernel's is
    not.
    """
    params, grads = {"w": torch.full((2**22,), 0.5)}, {"w": torch.full((2**22,), 0.1)}
    opt = chain(fs.trust_ratio, fs.sgd_step, lr=1.0, max_trust=10.0)
    new, _ = fuse(opt)(params, grads, opt.init(params))
    torch.testing.assert_close(new["w"], torch.zeros(2**22), rtol=0, atol=1e-7)
