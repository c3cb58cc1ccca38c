"""Slots of 8 bits: codes by hand, the mean of what is decoded, and the same bits everywhere."""

import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import functional_sgd as fs
from functional_sgd import (
    Chain,
    adamw,
    chain,
    eight_bit,
    elementwise,
    fuse,
    momentum,
    norm,
    sgd_step,
)
from functional_sgd.blocks import OFFSET, block_scale, decode, encode, encoded
from functional_sgd.fusion.backends.foreach import ForeachBackend
from functional_sgd.randomness import BLOCK, FACTOR, factor_of, key_of
from tests.comparing import assert_same
from tests.functional_sgd.fusion.helpers import ExactRoots, draw, kinds
from tests.turns import LONG

KEY = key_of(torch.tensor(0), torch.tensor(1), leaf=0, position=0)
NOTHING = torch.zeros(1, dtype=torch.int32)
signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


# Codes.


def test_codes_by_hand() -> None:
    """Of -6 in a block whose scale is 4: 1.5 + 2**-14 lies in [1.5, 1.625), which is the number
    4 + 8 * 14 of floats from 2**-14 on; and the sign is 128.
    """
    scale = block_scale(torch.tensor([-6.0]))
    assert_same(scale, torch.tensor([4.0]))
    code = encoded(torch.tensor([-6.0]), scale, NOTHING, True)
    assert code.item() == 128 + 4 + 8 * 14
    assert_same(decode(code, scale, True), torch.tensor([-4 * (1.5 - 2.0**-14)]))


@signs
def test_what_a_code_stands_for_has_that_code(signed: bool) -> None:
    """Whatever the random bits, but for rounding in the addition, where there is no sign."""
    codes = torch.arange(121 if signed else 249, dtype=torch.uint8)
    codes = torch.cat([codes, codes[1:] + 128]) if signed else codes
    scale = torch.full((1,), 2.0**-20)
    values = decode(codes, scale, signed)
    for random in (0, 0x8000, 0xFF00):
        short = torch.full(codes.shape, random, dtype=torch.int32)
        assert_same(encoded(values, scale, short, signed), codes)


STEPS = 2000 if LONG else 500


@signs
def test_the_mean_of_what_is_decoded_is_the_value(signed: bool) -> None:
    """Down to the smallest code: without a sign, a ten thousand millionth of the largest."""
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** -torch.arange(BLOCK).remainder(7 if signed else 9)
    values = torch.randn(BLOCK, generator=generator) * sizes
    values = values if signed else values.abs().clamp(min=3e-9)
    total = torch.zeros(BLOCK, dtype=torch.float64)
    for step in range(STEPS):
        key = key_of(torch.tensor(1), torch.tensor(step), leaf=0, position=0)
        scale = block_scale(values)
        total += decode(encode(values, scale, key, 0, signed), scale, signed)
    spacing = (values.abs() + OFFSET[signed] * scale).double() / 8
    assert ((total / STEPS - values).abs() / spacing).max() < 5 * 0.5 / STEPS**0.5


def test_without_a_sign_what_is_not_zero_never_becomes_zero() -> None:
    values = torch.tensor([1.0, 1e-12, 1e-30, 0.0])
    scale = block_scale(values)
    found = decode(encoded(values, scale, NOTHING.expand(4), False), scale, False)
    assert (found[:3] > 0).all()
    assert found[3] == 0


def test_each_block_has_its_own_scale() -> None:
    values = torch.ones(2 * BLOCK + 1)
    values[BLOCK:] = 1e-9
    values[-1] = 0
    assert_same(block_scale(values), torch.tensor([1.0, 2.0**-30, 0.0]))


@signs
@pytest.mark.parametrize("spoiled", [float("inf"), float("nan")])
def test_what_is_not_finite_shows_in_its_block_only(spoiled: float, signed: bool) -> None:
    values = torch.ones(2 * BLOCK)
    values[3] = spoiled
    scale = block_scale(values)
    found = decode(encode(values, scale, KEY, 0, signed), scale, signed)
    assert not found[:BLOCK].isfinite().any()
    assert_same(found[BLOCK:], decode(encode(values, scale, KEY, 0, signed), scale, signed)[BLOCK:])
    assert found[BLOCK:].isfinite().all()


# Draws.


def test_multiples_of_short_draws_are_not_related() -> None:
    """The three roundings of a chain: of two means, and of the params."""
    like = torch.zeros(100_000)
    found = [
        key_of(torch.tensor(0), torch.tensor(1), leaf=0, position=place).short(like, draw_)
        for place, draw_ in ((1, 4), (2, 4), (6, 0), (6, 1))
    ]
    numbers = torch.stack(found).double() / 2**16
    assert numbers.mean(1).sub(0.5).abs().max() < 0.005
    related = torch.corrcoef(numbers) - torch.eye(4)
    assert related.abs().max() < 5 / 100_000**0.5


def test_factors_are_odd_and_few() -> None:
    assert factor_of(0, 0) == FACTOR
    assert all(factor_of(place, 0) % 2 for place in range(50))
    with pytest.raises(ValueError, match="0 to 7, got draw=8"):
        factor_of(0, 8)


# Rules and chains.


def test_a_slot_becomes_codes_and_scales() -> None:
    opt = eight_bit(adamw())
    state = opt.init({"w": torch.ones(3, 100, dtype=torch.bfloat16)})
    assert list(state) == [
        "step", "grad_avg_codes", "grad_avg_scales", "sqr_avg_codes", "sqr_avg_scales", "seed",
    ]  # fmt: skip
    assert state["sqr_avg_codes"]["w"].dtype == torch.uint8
    assert state["sqr_avg_codes"]["w"].shape == (3, 100)
    assert state["sqr_avg_scales"]["w"].shape == (2,)
    assert opt.hyper == adamw().hyper
    assert "eight_bit(average_grad), eight_bit(average_sqr_grad), debias" in repr(opt)


def test_a_chain_of_a_chain_is_a_chain_and_a_rule_a_rule() -> None:
    rule = eight_bit(fs.average_grad)
    assert isinstance(rule, fs.Rule)
    assert isinstance(eight_bit(fs.part(fs.average_grad)), fs.Part)
    assert chain(rule, sgd_step, lr=0.1) == eight_bit(chain(fs.average_grad, sgd_step, lr=0.1))
    assert rule == eight_bit(fs.average_grad)
    assert rule != fs.average_grad
    assert pickle.loads(pickle.dumps(eight_bit(adamw()))) == eight_bit(adamw())


def test_names_in_the_chain_are_those_of_the_slot() -> None:
    slow = fs.rename(fs.average_grad, grad="update", grad_avg="slow_avg", mom="slow_mom")
    opt = eight_bit(chain(fs.average_grad, slow, sgd_step, lr=0.1), "slow_avg")
    state = opt.init(torch.ones(3))
    assert list(state) == ["step", "grad_avg", "slow_avg_codes", "slow_avg_scales", "seed"]


def test_copies_of_params_stay_unless_they_are_named() -> None:
    opt = fs.lookahead(fs.sgd(lr=0.1, mom=0.9))
    assert list(eight_bit(opt).init(torch.ones(2))) == [
        "step", "velocity_codes", "velocity_scales", "slow_param", "seed",
    ]  # fmt: skip
    named = eight_bit(opt, "slow_param")
    assert {"velocity", "slow_param_codes"} <= named.init(torch.ones(2)).keys()


def test_a_name_that_no_rule_keeps_is_refused() -> None:
    with pytest.raises(ValueError, match="keeps a slot 'sqr_avgs'.*sqr_avg"):
        eight_bit(adamw(), "sqr_avgs")


def test_a_slot_that_is_needed_as_it_is_is_refused() -> None:
    @fs.elementwise(held=torch.zeros_like)
    def held_norm(grad: Tensor, held: Tensor, *, size: Tensor = norm("held")) -> dict[str, Tensor]:
        return dict(update=grad / (1 + size), held=grad)

    with pytest.raises(ValueError, match="held_norm makes a number of it, so 'held' must stay"):
        eight_bit(held_norm, "held")
    assert eight_bit(held_norm) == held_norm
    opt = fs.adopt()
    with pytest.raises(ValueError, match="keeps what is read before it has run, so 'sqr_avg'"):
        eight_bit(opt, "sqr_avg")
    assert {"sqr_avg", "grad_avg_codes"} <= eight_bit(opt).init(torch.ones(2)).keys()


def test_a_rule_sees_what_it_wrote_before_it_is_rounded() -> None:
    opt = eight_bit(momentum(lr=1.0, mom=0.9))
    params, grads = torch.zeros(300), draw((300,), torch.float32, 1)
    plain = momentum(lr=1.0, mom=0.9)
    expected, _ = plain(params, grads, plain.init(params))
    assert_same(opt(params, grads, opt.init(params))[0], expected)


def test_a_mean_that_moves_by_a_thousandth_in_a_step_still_moves() -> None:
    """Gradients of 1, then of 0: after 1000 steps each, 1 - 0.37 and 0.37 of that."""
    opt: Any = fuse(eight_bit(chain(fs.average_sqr_grad, sgd_step, lr=0.0, sqr_mom=0.999)))
    params = torch.zeros(4096)
    state = opt.init(params)
    means = []
    for grad in (1.0, 0.0):
        for _ in range(1000):
            _, state = opt(params, torch.full_like(params, grad), state)
        found = decode(state["sqr_avg_codes"], state["sqr_avg_scales"], False)
        means.append(float(found.mean()))
    assert means == pytest.approx([0.632, 0.2325], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_every_executor_gives_the_same_bits(dtype: torch.dtype, donate: bool) -> None:
    """Leaves that are cut into chunks, end within a block, lie on odd addresses, or are numbers.
    Without roots, in which foreach operators are an ulp off on some processors.
    """
    opt = chain(eight_bit(momentum(lr=1e-3)), fs.round_stochastically)
    shapes = {"long": (70_001,), "odd": (7, 100), "one": (), "none": (0, 3)}
    params = {name: draw(shape, dtype, 1) for name, shape in shapes.items()}
    params["odd"] = params["odd"][1:]
    grads = {name: draw(leaf.shape, dtype, 3) for name, leaf in params.items()}
    runs = []
    for other in (opt, fuse(opt, donate), fuse(opt, donate, backends=[ForeachBackend()])):
        own: Any = {name: leaf.clone() for name, leaf in params.items()}
        state: Any = other.init(own)
        for _ in range(3):
            own, state = other(own, grads, state)
        runs.append((own, state))
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])


LAYOUTS = {
    "turned": lambda: draw((100, 7), torch.float32, 1).T,
    "strided": lambda: draw((300, 2), torch.float32, 1)[:, 0],
    "complex": lambda: draw((300,), torch.complex64, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout_gives_the_same_bits(layout: str) -> None:
    opt, params = eight_bit(adamw(lr=1e-3)), LAYOUTS[layout]()
    grads = torch.ones_like(params)
    with ExactRoots():
        expected = opt(params, grads, opt.init(params))
        assert_same(fuse(opt)(params, grads, opt.init(params)), expected)


def test_adamw_is_one_pass() -> None:
    """Its slots are a quarter as large: 3 columns of bfloat16 and 4 of a byte are moved, and the
    scales.
    """
    fused = fuse(chain(eight_bit(adamw()), fs.round_stochastically))
    assert kinds(fused) == ["kernel"]


def test_norms_between_two_rules_make_two_passes() -> None:
    """LAMB needs the length of its update: what the first pass has, the second one reads again."""
    opt = eight_bit(fs.lamb(lr=0.1))
    fused, params = fuse(opt), {"w": draw((1000,), torch.float32, 1)}
    assert kinds(fused) == ["kernel", "kernel"]
    state = opt.init(params)
    with ExactRoots():
        expected, found = (one(params, params, state) for one in (opt, fused))
    assert_same({**found[1]}, {**expected[1]})
    torch.testing.assert_close(found[0], expected[0])


def test_a_clipped_gradient_is_averaged_in_a_later_pass() -> None:
    opt: Chain = chain(fs.clip_norm, eight_bit(momentum(lr=0.1)), max_norm=0.1)
    params = {"w": draw((1000,), torch.bfloat16, 1)}
    found, expected = (one(params, params, opt.init(params)) for one in (fuse(opt), opt))
    torch.testing.assert_close(found[0], expected[0])


def test_a_saved_run_goes_on_with_the_same_bits() -> None:
    opt = fuse(chain(eight_bit(adamw(lr=1e-2)), fs.round_stochastically))
    params: Any = draw((1000,), torch.bfloat16, 1)

    def run(params: Any, state: Any, steps: int) -> Any:
        for _ in range(steps):
            params, state = opt(params, params, state)
        return params, state

    file = io.BytesIO()
    torch.save(run(params, opt.init(params), 3), file)
    file.seek(0)
    assert_same(run(*torch.load(file, weights_only=True), 3), run(params, opt.init(params), 6))


def test_it_finds_the_minimum_of_a_bowl() -> None:
    target = draw((1000,), torch.float32, 1)
    opt: Any = fuse(chain(eight_bit(adamw(lr=0.01, wd=0.0)), fs.round_stochastically))
    params: Any = torch.zeros(1000, dtype=torch.bfloat16)
    state = opt.init(params)
    for _ in range(500):
        params, state = opt(params, (params.float() - target).bfloat16(), state)
    assert (params.float() - target).abs().mean() < 0.01


def test_rows_cannot_be_left_alone() -> None:
    with pytest.raises(ValueError, match="'grad_avg' is kept in 8 bits"):
        fs.lazy_rows(eight_bit(adamw()))


def test_torchs_optimizers_show_codes_and_load_them_again() -> None:
    module = torch.nn.Linear(30, 20).bfloat16()
    opt = fs.to_torch(eight_bit(adamw(lr=1e-2)), module.named_parameters())
    module(torch.ones(2, 30).bfloat16()).sum().backward()
    opt.step()
    first = opt.state[module.weight]
    assert first["sqr_avg_codes"].shape == (20, 30)
    assert first["sqr_avg_scales"].shape == (3,)
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    assert_same(opt.state_dict()["state"], saved["state"])


@elementwise(evaluate="average", average=torch.clone, velocity=torch.zeros_like)
def keep_both(
    param: Tensor, update: Tensor, average: Tensor, velocity: Tensor
) -> dict[str, Tensor]:
    """A rule with a slot that is evaluated and one that begins at zero."""
    velocity = velocity / 2 + update
    return dict(param=param - velocity, average=(average + param) / 2, velocity=velocity)


def test_what_is_to_be_evaluated_stays_that() -> None:
    opt = eight_bit(chain(keep_both))
    assert opt.averages
    params = torch.ones(2)
    _, state = opt(params, params, opt.init(params))
    assert_same(opt.evaluated(2 * params, state), params)


@pytest.mark.parametrize(
    ("rule", "slots"),
    [
        (fs.average_sqr_grad_from_one, ("sqr_avg",)),
        (fs.follow_leader_step, ("sqr_sum",)),
        (fs.resilient_step, ("step_size",)),
        (fs.limit_by_past_rates, ("rate_avg",)),
        (fs.nesterov_average, ("mom_product",)),
        (fs.average_with_inertia, ("mom_product",)),
        (fs.bet_coins, ("largest_grad", "abs_sum", "reward")),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_slots_that_are_never_negative_need_no_sign(rule: Any, slots: tuple[str, ...]) -> None:
    assert rule.declared.positive == slots


@pytest.mark.parametrize("make", [fs.muon, fs.adam_mini, fs.novograd, fs.sm3, fs.kron])
def test_leafwise_rules_of_a_chain_see_complex_leaves_and_no_codes(make: Any) -> None:
    """Params as they are without 8 bits, in the first step: what is kept is not read yet."""
    params, grads = draw((6, 4), torch.complex64, seed=0), draw((6, 4), torch.complex64, seed=1)
    opt = make(lr=0.1)
    expected, _ = opt(params, grads, opt.init(params))
    small = eight_bit(opt)
    after, state = small(params, grads, small.init(params))
    assert after.dtype == params.dtype
    assert_same(after, expected)
    small(after, grads, state)
