"""Randomness as data: threefry's published vectors, moments, and what the numbers depend on."""

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from functional_sgd import (
    Chain,
    accumulate,
    average_params,
    chain,
    elementwise,
    identity,
    leafwise,
    normal,
    partition,
    rename,
    rules,
    seeded,
    sgd_step,
    treewise,
    uniform,
)
from functional_sgd.randomness import key_of, threefry
from tests.comparing import assert_same

COUNT = 200_000


def words(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value) for value in values)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), ("6b200159", "99ba4efe")),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), ("1cb996fc", "bb002be7")),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), ("c4923a9c", "483df7a0")),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_threefry_gives_the_published_vectors(
    key: tuple[int, int], counter: tuple[int, int], expected: tuple[str, str]
) -> None:
    """Random123, kat_vectors, threefry2x32 with 20 rounds."""
    found = threefry(words(*key), words(*counter))
    assert tuple(f"{word.item():08x}" for word in found) == expected


def test_threefry_of_a_vector_is_that_of_each_element() -> None:
    counters = torch.tensor([0, 1, 0xFFFFFFFF])
    found = threefry(words(7, 8), (counters, counters + 0))
    alone = [threefry(words(7, 8), (one, one)) for one in counters]
    assert_same(list(found), [torch.stack(column) for column in zip(*alone, strict=True)])


def key(seed: int = 0, step: int = 1, leaf: int = 0, position: int = 0) -> Any:
    return key_of(torch.tensor(seed), torch.tensor(step), leaf, position)


LIKE = torch.zeros(COUNT, dtype=torch.float64)


def test_uniform_numbers_lie_in_0_to_1_on_a_grid() -> None:
    found = uniform(key(), LIKE)
    assert 0 <= float(found.min()) < float(found.max()) < 1
    assert_same(found * 2**24, (found * 2**24).round())


def test_moments_of_uniform_numbers() -> None:
    """1/2, 1/3, 1/4: within five deviations of a mean of so many."""
    found = uniform(key(), LIKE)
    for power in (1, 2, 3):
        spread = math.sqrt(1 / (2 * power + 1) - 1 / (power + 1) ** 2)
        mean = float(found.pow(power).mean())
        assert mean == pytest.approx(1 / (power + 1), abs=5 * spread / math.sqrt(COUNT))


def test_moments_of_normal_numbers() -> None:
    """0, 1, 0, 3: within five deviations."""
    found = normal(key(), LIKE)
    for power, moment, spread in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        mean = float(found.pow(power).mean())
        assert mean == pytest.approx(moment, abs=5 * spread / math.sqrt(COUNT))


def test_shares_of_normal_numbers_are_those_of_the_bell_curve() -> None:
    """Also in the tail, where another formula takes over."""
    found = normal(key(), LIKE)
    for border in (-3.0, -2.0, -1.0, 0.0, 0.5, 1.5, 2.5, 3.5):
        share = 0.5 * (1 + math.erf(border / 2**0.5))
        spread = math.sqrt(share * (1 - share) / COUNT)
        assert float((found < border).double().mean()) == pytest.approx(share, abs=5 * spread)


def test_normal_numbers_are_those_of_the_quantile_function() -> None:
    """Within 3e-8 of themselves, also in the tail."""
    exact = -torch.special.ndtri(key().bits(LIKE, 1)[1])
    torch.testing.assert_close(normal(key(), LIKE).abs(), exact, rtol=3e-8, atol=0)


@pytest.mark.parametrize("draw", [uniform, normal])
def test_neighbouring_numbers_are_not_related(draw: Any) -> None:
    found = draw(key(), LIKE) - draw(key(), LIKE).mean()
    correlation = (found[1:] * found[:-1]).mean() / found.square().mean()
    assert abs(float(correlation)) < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_key_gives_the_same_numbers_again(draw: Any) -> None:
    assert_same(draw(key(), LIKE[:9]), draw(key(), LIKE[:9]))


OTHERS = {
    "seed": key(seed=1),
    "seed, high word": key(seed=2**32),
    "step": key(step=2),
    "leaf": key(leaf=1),
    "position": key(position=1),
}


@pytest.mark.parametrize("draw", [uniform, normal])
@pytest.mark.parametrize("name", OTHERS)
def test_another_key_gives_other_numbers(name: str, draw: Any) -> None:
    found, other = draw(key(), LIKE), draw(OTHERS[name], LIKE)
    related = ((found - found.mean()) * (other - other.mean())).mean() / found.var()
    assert abs(float(related)) < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize("draw", [uniform, normal])
def test_another_draw_gives_other_numbers(draw: Any) -> None:
    found, other = draw(key(), LIKE), draw(key(), LIKE, draw=1)
    related = ((found - found.mean()) * (other - other.mean())).mean() / found.var()
    assert abs(float(related)) < 5 / math.sqrt(COUNT)


def test_step_and_leaf_cannot_be_exchanged() -> None:
    assert not torch.equal(uniform(key(step=3, leaf=5), LIKE[:9]), uniform(key(5, 3), LIKE[:9]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("draw", [uniform, normal])
def test_numbers_have_shape_and_dtype_of_the_column(draw: Any, dtype: torch.dtype) -> None:
    found = draw(key(), torch.zeros(2, 3, dtype=dtype))
    assert (found.shape, found.dtype) == ((2, 3), dtype)


def test_uniform_numbers_are_the_same_in_both_precisions() -> None:
    assert_same(uniform(key(), LIKE[:99].float()).double(), uniform(key(), LIKE[:99]))


def test_an_element_has_the_number_of_its_place_whatever_the_layout() -> None:
    matrix = torch.zeros(3, 4)
    assert_same(uniform(key(), matrix.T.contiguous().T), uniform(key(), matrix))
    assert_same(uniform(key(), matrix).reshape(-1), uniform(key(), torch.zeros(12)))


@elementwise
def add_noise(update: Tensor, *, key: Any, std: float = 1.0) -> dict[str, Tensor]:
    return dict(update=update + std * normal(key, update))


NOISY = chain(add_noise, sgd_step, lr=1.0)
ZEROS = {"a": torch.zeros(4), "b": torch.zeros(4)}


def noise(opt: Chain = NOISY, steps: int = 1, start: Any = None) -> list[Any]:
    """What each step adds to params of zeros."""
    state, seen = start or opt.init(ZEROS), []
    for _ in range(steps):
        after, state = opt(ZEROS, ZEROS, state)
        seen.append(after)
    return seen


def test_a_chain_that_draws_keeps_a_seed() -> None:
    assert_same(NOISY.init(ZEROS), {"step": torch.tensor([0, 0]), "seed": torch.tensor(0)})
    assert "seed" not in identity().init(ZEROS)


def test_a_leaf_gets_the_numbers_of_its_key() -> None:
    (first,) = noise()
    assert_same(first["a"], -normal(key(step=1, leaf=0), ZEROS["a"]))
    assert_same(first["b"], -normal(key(step=1, leaf=1), ZEROS["b"]))


def test_every_step_and_every_leaf_draw_others() -> None:
    seen = [leaf for tree in noise(steps=3) for leaf in tree.values()]
    assert len({tuple(leaf.tolist()) for leaf in seen}) == 6


def test_the_seed_decides() -> None:
    other = {**NOISY.init(ZEROS), "seed": torch.tensor(5)}
    assert not torch.equal(noise(start=other)[0]["a"], noise()[0]["a"])
    assert_same(noise(start=other)[0]["a"], -normal(key(seed=5), ZEROS["a"]))


def test_two_rules_of_a_chain_draw_different_numbers() -> None:
    twice = chain(add_noise, rename(add_noise, std="other"), sgd_step, lr=1.0)
    alone, both = noise()[0]["a"], noise(twice)[0]["a"]
    assert not torch.equal(both, 2 * alone)
    assert_same(both, -(normal(key(), ZEROS["a"]) + normal(key(position=1), ZEROS["a"])))


def test_a_saved_run_goes_on_with_the_same_bits() -> None:
    expected = noise(steps=5)
    state = NOISY.init(ZEROS)
    for _ in range(2):
        _, state = NOISY(ZEROS, ZEROS, state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert_same(noise(steps=3, start=torch.load(file, weights_only=True)), expected[2:])


def test_a_leaf_without_gradient_draws_nothing_and_goes_on_where_it_was() -> None:
    state = NOISY.init(ZEROS)
    _, state = NOISY(ZEROS, {**ZEROS, "a": None}, state)
    after, _ = NOISY(ZEROS, ZEROS, state)
    assert_same(after["a"], noise()[0]["a"])


def test_torchs_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(3)
    before, first = torch.get_rng_state(), noise()
    assert_same(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert_same(noise(), first)


def test_members_of_an_ensemble_have_seeds_of_their_own() -> None:
    state = {"step": torch.zeros(3, 2, dtype=torch.int64), "seed": torch.tensor([0, 1, 0])}
    stacked = {name: leaf.expand(3, 4) for name, leaf in ZEROS.items()}
    after, _ = torch.func.vmap(NOISY)(stacked, stacked, state)
    assert_same(after["a"][0], noise()[0]["a"])
    assert_same(after["a"][2], after["a"][0])
    assert not torch.equal(after["a"][1], after["a"][0])


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_draws_the_same_numbers() -> None:
    fast = torch.compile(NOISY, fullgraph=True, backend="eager")
    state = NOISY.init(ZEROS)
    assert_same(fast(ZEROS, ZEROS, state), NOISY(ZEROS, ZEROS, state))


def test_half_precision_params_get_the_numbers_of_float32() -> None:
    params = torch.zeros(4, dtype=torch.bfloat16)
    after, _ = NOISY(params, params, NOISY.init(params))
    assert_same(after, noise()[0]["a"].bfloat16())


def test_leafwise_rules_draw_too() -> None:
    @leafwise
    def drop(update: Tensor, *, key: Any) -> dict[str, Tensor]:
        return dict(update=torch.where(uniform(key, update) < 0.5, update, 0.0))

    opt, params = chain(drop, sgd_step, lr=1.0), torch.zeros(3, 4)
    after, _ = opt(params, torch.ones(3, 4), opt.init(params))
    assert_same(after, -(uniform(key(), params) < 0.5).float())


def test_a_rule_of_whole_trees_has_no_key() -> None:
    with pytest.raises(TypeError, match="rule <lambda>: sees whole trees, so it has no 'key'"):
        treewise(lambda grad, *, key: dict(grad=grad))


def test_a_key_is_no_column() -> None:
    with pytest.raises(TypeError, match=r"'key' is a scalar; write it after a '\*'"):
        elementwise(lambda grad, key: dict(grad=grad))


def test_a_part_of_a_partition_has_a_seed_of_its_own() -> None:
    opt = partition({"x": NOISY, "y": NOISY}, {"a": "x", "b": "y"})
    parts = opt.init(ZEROS)["parts"]
    assert {"seed"} <= parts["x"].keys() & parts["y"].keys()


@elementwise
def plain_noise(param, *, key):
    return dict(param=param + normal(key, param))


def test_parts_of_a_partition_draw_different_numbers() -> None:
    noisy = chain(sgd_step, plain_noise, lr=0.1)
    opt = partition({"a": noisy, "b": noisy}, {"left": "a", "right": "b"})
    params = {"left": torch.zeros(4), "right": torch.zeros(4)}
    after, _ = opt(params, params, opt.init(params))
    assert not torch.equal(after["left"], after["right"])


def test_a_seed_reaches_what_is_inside_of_wrappers() -> None:
    opt = average_params(chain(sgd_step, plain_noise, lr=0.1))
    params = {"w": torch.zeros(4)}
    first, second = (opt(params, params, seeded(opt.init(params), seed))[0]["w"] for seed in (1, 2))
    assert not torch.equal(first, second)


def test_the_rules_around_an_optimizer_draw_other_numbers_than_it_does() -> None:
    """Were they the same, the param would go twice as far in the same direction."""
    inner = accumulate(chain(rules.add_noise, sgd_step, lr=1.0, noise=1.0), every=1)
    opt, zeros = chain(rules.add_noise, inner, noise=1.0), torch.zeros(1000)
    alone = inner(zeros, zeros, inner.init(zeros))[0]
    both = opt(zeros, zeros, opt.init(zeros))[0]
    assert 0.9 < float((both - alone).std()) < 1.1
    assert abs(float((both - alone) @ alone)) / 1000 < 0.1
