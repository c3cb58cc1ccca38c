"""Every torch function that a fused rule may use gives torch's numbers, special values included."""

import functools

import pytest
import torch

import functional_sgd as fs
from functional_sgd import chain, elementwise, fuse, rename
from functional_sgd.fusion.arithmetic import FUNCTIONS
from tests.functional_sgd.fusion.helpers import kinds

ROUNDED = 6.0  # ulps: torch's vectorised functions and the C library's are each an ulp or two off
SPECIAL = [
    float("nan"),
    float("inf"),
    -float("inf"),
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    2.5,
    -2.5,
    3.0,
    -7.0,
    1e-3,
    100.0,
]

EXACT = {  # x is the gradient, y the param, h a hyper (0.3), step the counter
    "radd": lambda x, y, h, step: 1 + x,
    "subtract": lambda x, y, h, step: torch.subtract(x, y),
    "rsub_operator": lambda x, y, h, step: 1 - x,
    "rsub": lambda x, y, h, step: torch.rsub(x, y),
    "mul": lambda x, y, h, step: torch.mul(x, h) * y,
    "multiply": lambda x, y, h, step: x.multiply(y),
    "div": lambda x, y, h, step: torch.div(x, y),
    "divide": lambda x, y, h, step: x.divide(h),
    "true_divide": lambda x, y, h, step: torch.true_divide(x, 3),
    "neg": lambda x, y, h, step: -x,
    "negative": lambda x, y, h, step: torch.negative(x),
    "abs": lambda x, y, h, step: abs(x),
    "absolute": lambda x, y, h, step: x.absolute(),
    "positive": lambda x, y, h, step: +x,
    "clone": lambda x, y, h, step: x.clone().detach().contiguous(),
    "square": lambda x, y, h, step: torch.square(x),
    "power_two": lambda x, y, h, step: x**2,
    "reciprocal": lambda x, y, h, step: x.reciprocal(),
    "sign": lambda x, y, h, step: x.sign(),
    "floor": lambda x, y, h, step: x.floor(),
    "ceil": lambda x, y, h, step: torch.ceil(x),
    "trunc": lambda x, y, h, step: x.trunc(),
    "round": lambda x, y, h, step: x.round(),
    "isnan": lambda x, y, h, step: torch.where(torch.isnan(x), 1.0, 2.0),
    "isfinite": lambda x, y, h, step: torch.where(x.isfinite(), x, y),
    "maximum": lambda x, y, h, step: torch.maximum(x, y),
    "minimum": lambda x, y, h, step: torch.minimum(x, y),
    "max": lambda x, y, h, step: torch.max(x, y),
    "min": lambda x, y, h, step: x.min(y),
    "clamp": lambda x, y, h, step: x.clamp(-h, h),
    "clamp_low": lambda x, y, h, step: torch.clamp(x, min=0.5),
    "clamp_high": lambda x, y, h, step: x.clip(max=y),
    "clamp_nothing": lambda x, y, h, step: x.clamp(min=1.0, max=-1.0),
    "clamp_min": lambda x, y, h, step: x.clamp_min(0.25),
    "clamp_max": lambda x, y, h, step: torch.clamp_max(x, y),
    "relu": lambda x, y, h, step: torch.relu(x),
    "eq": lambda x, y, h, step: torch.where(x == y, x, 5.0),
    "ne": lambda x, y, h, step: torch.where(x != y, 1, 0) * x,
    "lt": lambda x, y, h, step: torch.where(torch.lt(x, y), x, y),
    "le": lambda x, y, h, step: torch.where(x <= y, x, y),
    "gt": lambda x, y, h, step: torch.where(x > h, x, y),
    "ge": lambda x, y, h, step: torch.where(torch.ge(0.5 * y, x), x, y),
    "bool_times": lambda x, y, h, step: (x > y) * x,
    "bool_result": lambda x, y, h, step: x > y,
    "bool_sum": lambda x, y, h, step: ((x > 0) + (y > 0)) * torch.ones_like(x),
    "bool_quotient": lambda x, y, h, step: (x > 0) / (y > 0),
    "bool_square": lambda x, y, h, step: torch.square(x > 0) + (y > 0),
    "bool_where": lambda x, y, h, step: torch.where(x > 1, x > 0, y > 0) + (y > -1),
    "bool_where_constant": lambda x, y, h, step: torch.where(x > 1, y > 0, True) + (y > -1),
    "bool_maximum": lambda x, y, h, step: torch.maximum(x > 1, y > 0) + (y > -1),
    "bool_minimum": lambda x, y, h, step: torch.minimum(x > -1, y > 0) + (y > -1),
    "bool_and_constant": lambda x, y, h, step: ((x > 0) + True) * torch.ones_like(x),
    "nan_is_true": lambda x, y, h, step: torch.where(torch.logical_not(x), 1.0, 2.0),
    "and": lambda x, y, h, step: torch.where((x > 0) & (y > 0), x, y),
    "or": lambda x, y, h, step: torch.where((x > 0) | (y > 0), x, y),
    "not": lambda x, y, h, step: torch.where(~(x > 0), x, y),
    "logical": lambda x, y, h, step: torch.where(
        torch.logical_or(x > 2, torch.logical_and(x < 0, y < 0)), x, y
    ),
    "bitwise": lambda x, y, h, step: torch.where(
        torch.bitwise_or(x > 2, (y < 0).bitwise_not()), x, y
    ),
    "copysign": lambda x, y, h, step: torch.copysign(x, y),
    "copysign_number": lambda x, y, h, step: x.copysign(-1.0),
    "fmod": lambda x, y, h, step: torch.fmod(x, y),
    "remainder": lambda x, y, h, step: torch.remainder(x, y),
    "percent": lambda x, y, h, step: x % 3,
    "rpercent": lambda x, y, h, step: 5 % x,
    "zeros": lambda x, y, h, step: torch.zeros_like(x),
    "ones": lambda x, y, h, step: torch.ones_like(x) - y,
    "full": lambda x, y, h, step: torch.full_like(x, h),
    "nan_constant": lambda x, y, h, step: torch.where(x > 0, float("nan"), -float("inf")),
    "huge_constant": lambda x, y, h, step: x * 1e300,
    "tiny_constant": lambda x, y, h, step: x * 1e-46,
    "integer": lambda x, y, h, step: x + 16777217,
    "scalar_condition": lambda x, y, h, step: torch.where(step % 2 == 1, x, y),
    "scalar_chain": lambda x, y, h, step: x * torch.where((step > 1) | (step == 1), h**step, 0.0),
    "constant_tensor": lambda x, y, h, step: x * torch.tensor(0.1, dtype=torch.float64),
}
SPOILED = {  # functions whose last bits differ between libraries
    "sqrt": lambda x, y, h, step: x.sqrt(),
    "rsqrt": lambda x, y, h, step: torch.rsqrt(x),
    "rdiv": lambda x, y, h, step: 2 / x,
    "pow_half": lambda x, y, h, step: x**0.5,
    "pow_minus_half": lambda x, y, h, step: x**-0.5,
    "pow_three": lambda x, y, h, step: x.pow(3),
    "pow_minus": lambda x, y, h, step: x**-1.5,
    "pow_hyper": lambda x, y, h, step: torch.pow(x.abs(), h),
    "pow_element": lambda x, y, h, step: torch.pow(x, y),
    "rpow": lambda x, y, h, step: 2**x,
    "exp": lambda x, y, h, step: torch.exp(x),
    "expm1": lambda x, y, h, step: x.expm1(),
    "log": lambda x, y, h, step: x.log(),
    "log1p": lambda x, y, h, step: torch.log1p(x),
    "log2": lambda x, y, h, step: x.log2(),
    "sin": lambda x, y, h, step: x.sin(),
    "cos": lambda x, y, h, step: torch.cos(x),
    "tanh": lambda x, y, h, step: torch.tanh(x),
    "sigmoid": lambda x, y, h, step: x.sigmoid(),
    "atan2": lambda x, y, h, step: torch.atan2(x, y),
}
TERMS = {  # sums of products, which torch may round once: errors are measured at the largest term
    "add": lambda x, y, h, step: torch.add(x, y, alpha=2),
    "add_scalar": lambda x, y, h, step: x.add(1, alpha=h),
    "sub": lambda x, y, h, step: x.sub(y, alpha=0.5),
    "lerp_near": lambda x, y, h, step: torch.lerp(x, y, 0.25),
    "lerp_far": lambda x, y, h, step: x.lerp(y, h + 0.5),
    "lerp_element": lambda x, y, h, step: torch.lerp(x, y, (y > 0) * torch.ones_like(x)),
    "addcmul": lambda x, y, h, step: torch.addcmul(x, y, y, value=0.5),
    "addcdiv": lambda x, y, h, step: x.addcdiv(x, y, value=-h),
}
ALL = {**EXACT, **SPOILED, **TERMS}


@elementwise
def stay(param):
    """Something has to write param."""
    return dict(param=param)


def rule_of(name):
    function = ALL[name]

    @elementwise(result=torch.zeros_like)
    def under_test(grad, param, result, *, h=0.3, step):
        return dict(result=function(grad, param, h, step))

    return rename(under_test, result=name)


def table(dtype):
    """Every pair of special values, and some others."""
    info = torch.finfo(dtype)
    values = torch.tensor(
        [*SPECIAL, info.max, info.tiny, -info.tiny / 4, info.smallest_normal / 1024], dtype=dtype
    )
    x, y = torch.meshgrid(values, values, indexing="ij")
    generator = torch.Generator().manual_seed(0)
    more = [
        (3 * torch.randn(300, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)
    ]
    return torch.cat([x.reshape(-1), more[0]]), torch.cat([y.reshape(-1), more[1]])


@functools.cache
def results(dtype):
    """What the fused rules and torch find, for all expressions at once."""
    opt = chain(*map(rule_of, ALL), stay)
    x, y = table(dtype)
    state = opt.init([y])
    return [run([y], [x], state)[1] for run in (fuse(opt), opt)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_a_function_gives_what_torch_gives(name, dtype):
    assert kinds(fuse(chain(rule_of(name), stay))) == ["kernel"]
    (found,), (expected,) = (state[name] for state in results(dtype))
    assert_what_torch_gives(name, dtype, found, expected)


def assert_what_torch_gives(name, dtype, found, expected):
    """Equal, or as near as this function's rounding allows, for every pair in the table."""
    x, y = table(dtype)
    finite = expected.isfinite()
    size = torch.where(finite, expected, 1).abs()
    if name in TERMS:
        size = (
            torch.stack([size, x.abs(), y.abs(), y * y, (x / y).abs()]).nan_to_num(0, 1, 1).amax(0)
        )
    ulp = size - torch.nextafter(size, torch.full_like(size, -1.0))
    close = (found - expected).abs() <= (0 if name in EXACT else ROUNDED) * ulp
    good = torch.where(finite, close, (found == expected) | (found.isnan() & expected.isnan()))
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    if name in TERMS:  # products that overflow
        good |= (x.abs() == largest) | (y.abs() == largest)
    if name in (
        "fmod",
        "remainder",
        "rpercent",
    ):  # torch's own are wrong where the quotient overflows
        good |= (x / y).isinf() & x.isfinite()
        good |= torch.minimum(x.abs(), y.abs()) < smallest
        good |= (5 / x).isinf() | (x.abs() <= smallest) if name == "rpercent" else False
    seen = [
        f"x={x[i]:g} y={y[i]:g}: {found[i]:g}, torch {expected[i]:g}"
        for i in (~good).nonzero().flatten().tolist()
    ]
    assert not seen, f"{len(seen)} differ, such as {seen[:4]}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "name", ["neg", "mul", "div", "copysign", "round", "trunc", "ceil", "positive", "fmod"]
)
def test_zeros_keep_their_sign(name, dtype):
    (found,), (expected,) = (state[name] for state in results(dtype))
    zero = expected == 0
    assert torch.equal(found[zero].signbit(), expected[zero].signbit())


def test_every_function_that_can_be_fused_is_tried():
    """By calling each expression with a stand-in that notes the names."""
    called = set()

    class Spy(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            called.add(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    for function in ALL.values():
        function(
            torch.ones(2).as_subclass(Spy), torch.ones(2).as_subclass(Spy), 0.3, torch.tensor(1.0)
        )
    same = {"and": "bitwise_and", "or": "bitwise_or", "rsub": "__rsub__"}
    plain = {name for name in FUNCTIONS if not name.startswith("__")}
    missing = (
        plain
        - called
        - {same.get(name, name) for name in ALL}
        - {name.split("_")[0] for name in ALL}
    )
    # These are not torch's: tests/functional_sgd/test_rounding.py, test_eight_bit.py.
    own = {"rounded", "neighbour", "block_scale", "encoded", "decode"}
    assert missing - own <= {
        "detach",
        "contiguous",
        "clip",
        "bitwise_and",
        "logical_or",
        "logical_and",
        "logical_not",
    }


def test_an_expression_of_scalars_alone_is_computed_in_double_precision():
    @elementwise
    def shrink(update, *, step, mom=0.999):
        return dict(update=update * (1 - mom**step))

    opt = chain(shrink, fs.sgd_step, lr=1.0)
    found, _ = fuse(opt)([torch.zeros(1)], [torch.ones(1)], opt.init([torch.zeros(1)]))
    assert found[0].item() == pytest.approx(-0.001, rel=1e-6)
