"""Rounding to what leaves are kept in: by hand, by its mean, and the same bits everywhere."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from functional_sgd import (
    Rule,
    adamw,
    chain,
    compensate_rounding,
    elementwise,
    fuse,
    momentum,
    round_stochastically,
    seeded,
    sgd,
    treewise,
)
from functional_sgd.fusion.backends.foreach import ForeachBackend
from functional_sgd.precision import HALVES
from functional_sgd.randomness import BLOCK, key_of
from functional_sgd.rounding import CUT, neighbour, rounded, rounded_randomly
from tests.comparing import assert_same
from tests.functional_sgd.fusion.helpers import ExactRoots, draw

KEY = key_of(torch.tensor(0), torch.tensor(1), leaf=0, position=0)
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)
STOCHASTIC = chain(adamw(lr=1e-3), round_stochastically)
COMPENSATED = chain(adamw(lr=1e-3), compensate_rounding)


def bits(number: int) -> Tensor:
    return torch.tensor([number], dtype=torch.int32)


# Short draws.


def test_four_elements_of_a_block_share_the_bits_of_a_counter() -> None:
    """Elements 0, 64, 128, 192 of a block: the low and the high half of both words."""
    found = KEY.short(torch.zeros(2 * BLOCK), 0)
    assert found.dtype == torch.int32
    assert 0 <= int(found.min()) < int(found.max()) < 2**16
    assert len(set(found.tolist())) > 0.9 * len(found)


def test_short_draws_are_uniform_and_not_related() -> None:
    found = KEY.short(torch.zeros(200_000), 0).double() / 2**16
    assert float(found.mean()) == pytest.approx(0.5, abs=0.004)
    assert float(found.var()) == pytest.approx(1 / 12, abs=0.002)
    for distance in (1, 64, 128, 256):
        first, later = found[:-distance] - 0.5, found[distance:] - 0.5
        assert abs(float((first * later).mean())) < 5 / 12 / 200_000**0.5


def test_another_draw_has_other_bits() -> None:
    like = torch.zeros(1000)
    assert (KEY.short(like, 0) == KEY.short(like, 1)).double().mean() < 0.01


# Rounding.


@halves
def test_what_a_dtype_has_stays(dtype: torch.dtype) -> None:
    numbers = draw((1000,), dtype, 1).float()
    numbers[:4] = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0])
    assert_same(rounded(numbers, dtype), numbers)
    assert_same(rounded_randomly(numbers, dtype, KEY), numbers)


@halves
@pytest.mark.parametrize("size", [1.0, 1e-3, 3e-5, 1e-7])
def test_the_mean_of_a_random_neighbour_is_the_number(dtype: torch.dtype, size: float) -> None:
    """Also below 6e-5, where float16 counts in steps of 6e-8."""
    number = torch.full((100_000,), 1.2345 * size)
    found = rounded_randomly(number, dtype, KEY)
    below, above = float(found.min()), float(found.max())
    assert below < float(number[0]) < above
    assert set(found.unique().tolist()) == {below, above}
    assert_same(found, found.to(dtype).float())
    next_up = torch.nextafter(torch.tensor(below, dtype=dtype), torch.tensor(9.0, dtype=dtype))
    assert float(next_up) == above
    mean = float(found.double().mean())
    assert mean == pytest.approx(float(number[0]), abs=5 * (above - below) / 2 / 100_000**0.5)


def test_random_bits_are_added_below_what_is_cut_off() -> None:
    """0x3f80_8000 is half way: from 0x8000 on the sum reaches the neighbour above."""
    half_way = bits(0x3F808000).view(torch.float32)
    assert neighbour(half_way, bits(0x7FFF), torch.bfloat16) == 1.0
    assert neighbour(half_way, bits(0x8000), torch.bfloat16) == 1.0078125
    assert neighbour(-half_way, bits(0x8000), torch.bfloat16) == -1.0078125


def test_a_nan_stays_one_whatever_its_bits() -> None:
    for pattern in (0x7F800001, 0x7FFFFFFF, -1):
        found = neighbour(bits(pattern).view(torch.float32), bits(0xFFFF), torch.bfloat16)
        assert found.isnan()


@halves
def test_a_number_becomes_infinite_only_where_the_nearest_is(dtype: torch.dtype) -> None:
    """From half way between the largest number and the next one on."""
    largest = torch.tensor(torch.finfo(dtype).max).view(torch.int32).item()
    half = 1 << (CUT[dtype] - 1)
    below, at = (bits(int(largest) + place).view(torch.float32) for place in (half - 1, half))
    for sign in (1.0, -1.0):
        found = neighbour(sign * below, bits(0xFFFF), dtype)
        assert_same(found, sign * bits(int(largest)).view(torch.float32))
        assert_same(found, rounded(sign * below, dtype))
        assert neighbour(sign * at, bits(0xFFFF), dtype).to(dtype).isinf()


@halves
def test_the_largest_numbers_have_the_same_bits_in_every_executor(dtype: torch.dtype) -> None:
    """A quarter of a step above the largest number, and three."""
    most = torch.finfo(dtype).max
    params = torch.full((1000,), most, dtype=dtype)
    grads = torch.full((1000,), -most * torch.finfo(dtype).eps / 8, dtype=dtype)
    grads[500:] *= 3
    opt = chain(sgd(lr=1.0), round_stochastically)
    runs = [
        other(params, grads, other.init(params))[0]
        for other in (opt, fuse(opt), fuse(opt, backends=[ForeachBackend()]))
    ]
    assert runs[0][:500].isfinite().all()
    assert 0 < runs[0][500:].isfinite().sum() < 500
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_other_dtypes_are_left_alone(dtype: torch.dtype) -> None:
    numbers = torch.tensor([1.2345])
    assert rounded_randomly(numbers, dtype, KEY) is numbers
    assert rounded(numbers, dtype) is numbers


def test_a_derivative_goes_through() -> None:
    numbers = torch.tensor([1.2345, -3.3], requires_grad=True)
    (slope,) = torch.autograd.grad(rounded_randomly(numbers, torch.bfloat16, KEY).sum(), numbers)
    assert_same(slope, torch.ones(2))


# Rules.


def test_steps_too_small_to_be_stored_arrive() -> None:
    """1 - 1000 * 1e-4 = 0.9: to nearest nothing moves, by chance and with what was lost it does."""
    ones = torch.ones(4000).bfloat16()
    found = {}
    rules = {"nearest": [], "random": [round_stochastically], "kept": [compensate_rounding]}
    for name, last in rules.items():
        opt: Any = fuse(chain(sgd(lr=1e-4), *last))
        params, state = ones, opt.init(ones)
        for _ in range(1000):
            params, state = opt(params, ones, state)
        found[name] = params.double()
    assert_same(found["nearest"], ones.double())
    assert float(found["random"].mean()) == pytest.approx(0.9, abs=2e-3)
    assert found["kept"].sub(0.9).abs().max() < 4e-3


def test_what_was_lost_is_kept_in_bfloat16() -> None:
    params = {
        "half": torch.ones(3).half(),
        "brain": torch.ones(3).bfloat16(),
        "full": torch.ones(3),
    }
    _, state = COMPENSATED(params, params, COMPENSATED.init(params))
    assert {leaf.dtype for leaf in state["lost"].values()} == {torch.bfloat16}
    assert not state["lost"]["full"].any()


@halves
@pytest.mark.parametrize("rule", [round_stochastically, compensate_rounding], ids=repr)
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_every_executor_gives_the_same_bits(rule: Rule, dtype: torch.dtype, donate: bool) -> None:
    """Leaves that are cut into chunks, end within a block, lie on odd addresses. Without roots, in
    which foreach operators are an ulp off on some processors.
    """
    opt = chain(momentum(lr=1e-3), rule)
    params: Any = {"long": draw((70_001,), dtype, 1), "odd": draw((3, 100), dtype, 2)[1:]}
    grads: Any = {name: draw(leaf.shape, dtype, 3) for name, leaf in params.items()}
    runs = []
    for other in (opt, fuse(opt, donate), fuse(opt, donate, backends=[ForeachBackend()])):
        own = {name: leaf.clone() for name, leaf in params.items()}
        state = other.init(own)
        with ExactRoots():
            for _ in range(3):
                own, state = other(own, grads, state)
        runs.append((own, state))
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])


@pytest.mark.parametrize("opt", [STOCHASTIC, COMPENSATED], ids=["random", "kept"])
def test_a_saved_run_goes_on_with_the_same_bits(opt: Any) -> None:
    params = draw((1000,), torch.bfloat16, 1)
    fused = fuse(opt)

    def run(params: Any, state: Any, steps: int) -> Any:
        for _ in range(steps):
            params, state = fused(params, params, state)
        return params, state

    file = io.BytesIO()
    torch.save(run(params, opt.init(params), 3), file)
    file.seek(0)
    restored = torch.load(file, weights_only=True)
    assert_same(run(*restored, 3), run(params, opt.init(params), 6))


def test_the_seed_decides() -> None:
    params = draw((1000,), torch.bfloat16, 1)
    one, other = (
        STOCHASTIC(params, params, seeded(STOCHASTIC.init(params), seed))[0] for seed in (1, 2)
    )
    assert not torch.equal(one, other)


def test_leaves_of_full_precision_are_those_of_the_chain_without_the_rule() -> None:
    params = {"full": draw((100,), torch.float32, 1), "half": draw((100,), torch.bfloat16, 2)}
    plain = adamw(lr=1e-3)
    expected, _ = plain(params, params, plain.init(params))
    for opt in (STOCHASTIC, COMPENSATED):
        found, _ = opt(params, params, opt.init(params))
        assert_same(found["full"], expected["full"])


def test_members_of_an_ensemble_are_those_of_a_loop() -> None:
    params = draw((3, 5), torch.bfloat16, 1)
    state = {
        "step": torch.zeros(3, 1, dtype=torch.int64),
        **{name: torch.zeros(3, 5) for name in ("grad_avg", "sqr_avg")},
        "seed": torch.tensor([0, 1, 2]),
    }
    found = torch.func.vmap(STOCHASTIC)(params, params, state)
    for number in range(3):
        own = {name: value[number] for name, value in state.items()}
        alone = STOCHASTIC(params[number], params[number], own)
        assert_same(found[0][number], alone[0])


def test_a_dtype_in_a_rule_is_that_of_its_leaf() -> None:
    seen = []

    @elementwise
    def look(param: Tensor, *, dtype: torch.dtype) -> dict[str, Tensor]:
        seen.append(dtype)
        return dict(param=rounded(param, torch.bfloat16))

    opt = chain(look)
    params = [torch.ones(1).half(), torch.full((1,), 1.001, dtype=torch.float64)]
    seen.clear()
    after, _ = opt(params, params, opt.init(params))
    assert seen == [torch.float16, torch.float64]
    assert_same(after, [torch.ones(1).half(), torch.ones(1).double()])
    assert_same(fuse(opt)(params, params, opt.init(params))[0], after)


def test_a_rule_of_whole_trees_has_no_dtype() -> None:
    with pytest.raises(TypeError, match="sees whole trees, so it has no 'dtype'"):
        treewise(lambda grad, *, dtype: dict(grad=grad))
