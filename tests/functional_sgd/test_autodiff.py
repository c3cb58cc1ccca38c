"""Gradients of trees, and modules as functions."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from functional_sgd import apply, sgd, split, value_and_grad
from tests.comparing import Untouched, assert_close, assert_same

T = torch.tensor


def half_square(params: Any, x: Tensor) -> Tensor:
    """Gradient: w * x**2."""
    return (params["w"] * x).square().sum() / 2


def test_value_and_gradient() -> None:
    value, grads = value_and_grad(half_square)({"w": T([3.0])}, T([2.0]))
    assert_same((value, grads), (T(18.0), {"w": T([12.0])}))


@pytest.mark.parametrize(
    ("params", "loss", "expected"),
    [
        (T(3.0), lambda p: p * p, T(6.0)),
        ((T(3.0), T(2.0)), lambda p: p[0] * p[1], (T(2.0), T(3.0))),
        ([T(3.0), {"b": T(2.0)}], lambda p: p[0] * p[1]["b"], [T(2.0), {"b": T(3.0)}]),
        ({"b": T(3.0), "a": T(2.0)}, lambda p: p["b"] ** 2 * p["a"], {"a": T(9.0), "b": T(12.0)}),
    ],
    ids=["tensor", "tuple", "list", "dict"],
)
def test_gradients_are_a_tree_like_params(params: Any, loss: Any, expected: Any) -> None:
    assert_same(value_and_grad(loss)(params)[1], expected)


def test_leaves_that_do_not_matter_have_none() -> None:
    assert value_and_grad(half_square)({"w": T([3.0]), "idle": T(1.0)}, T([2.0]))[1]["idle"] is None


def after_two_steps(lr: Tensor) -> Tensor:
    """The loss w**2 / 2 of w = 3 (1 - lr)**2, that is 4.5 (1 - lr)**4, by two steps of sgd."""
    params, opt = {"w": T([3.0])}, sgd()
    state = opt.init(params)
    for _ in range(2):
        _, grads = value_and_grad(half_square)(params, T([1.0]))
        params, state = opt(params, grads, state, dict(lr=lr))
    return value_and_grad(half_square)(params, T([1.0]))[0]


def test_the_gradient_by_a_tracked_lr_is_that_by_hand() -> None:
    """d/dlr 4.5 (1 - lr)**4 at .5 is -18 / 8."""
    lr = T(0.5, requires_grad=True)
    after_two_steps(lr).backward()
    assert_close(lr.grad, T(-2.25), rtol=1e-6)
    assert_close(lr.grad, torch.func.grad(after_two_steps)(T(0.5)), rtol=1e-6)


def test_the_gradient_by_tracked_first_params_is_that_by_hand() -> None:
    """w - .5 w**2, for a loss of w**3 / 3, has the slope 1 - w: -2 at w = 3."""
    first = T([3.0], requires_grad=True)
    _, grads = value_and_grad(lambda p: (p["w"] ** 3).sum() / 3)({"w": first})
    (first - 0.5 * grads["w"]).sum().backward()
    assert_same(first.grad, T([-2.0]))


def test_a_tracked_param_is_left_out_of_what_is_behind_it() -> None:
    """The second use of w comes in as a batch, so it counts as a constant."""
    first = T([3.0], requires_grad=True)
    _, grads = value_and_grad(lambda p, x: (p["w"] * x).sum())({"w": first}, 2 * first)
    assert_same(grads["w"].detach(), T([6.0]))


def test_under_no_grad_nothing_is_tracked() -> None:
    with torch.no_grad():
        value, grads = value_and_grad(half_square)({"w": T([3.0], requires_grad=True)}, T([2.0]))
    assert not value.requires_grad
    assert not grads["w"].requires_grad


def test_a_constant_loss_has_no_gradients() -> None:
    value, grads = value_and_grad(lambda params: T(1.0))({"w": T([3.0])})
    assert_same(value, T(1.0))
    assert grads == {"w": None}


def test_no_params_no_gradients() -> None:
    assert value_and_grad(lambda params: T(1.0))({}) == (T(1.0), {})


def test_what_else_the_loss_returns_comes_back() -> None:
    both = value_and_grad(
        lambda params: (params["w"].square(), {"twice": 2 * params["w"]}), has_aux=True
    )
    (value, aux), grads = both({"w": T(3.0)})
    assert_same((value, aux, grads), (T(9.0), {"twice": T(6.0)}, {"w": T(6.0)}))


def test_nothing_that_comes_back_has_a_graph() -> None:
    both = value_and_grad(
        lambda params: (params["w"].square(), {"twice": 2 * params["w"]}), has_aux=True
    )
    (value, aux), grads = both({"w": nn.Parameter(T(3.0))})
    assert not any(tensor.requires_grad for tensor in (value, aux["twice"], grads["w"]))


def test_what_else_may_be_no_tensor() -> None:
    (_, aux), _ = value_and_grad(
        lambda p: (p, {"note": "text", "count": 3, "nothing": None}), has_aux=True
    )(T(1.0))
    assert aux == {"note": "text", "count": 3, "nothing": None}


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda p: p["w"], r"a tensor of shape \(2,\)"),
        (lambda p: 3.0, "float"),
        (lambda p: None, "NoneType"),
    ],
    ids=["vector", "float", "None"],
)
def test_a_loss_must_be_one_number(loss: Any, found: str) -> None:
    with pytest.raises(
        ValueError,
        match=f"value_and_grad: the loss must be a 0-d tensor, got {found}. Take its mean",
    ):
        value_and_grad(loss)({"w": torch.ones(2)})


def test_params_are_untouched() -> None:
    params, x = {"w": T([3.0], requires_grad=True)}, T([2.0])
    snapshot = Untouched(params, x)
    value_and_grad(half_square)(params, x)
    snapshot.check()
    assert params["w"].grad is None


def test_works_inside_no_grad() -> None:
    with torch.no_grad():
        assert_same(value_and_grad(half_square)({"w": T([3.0])}, T([2.0]))[1], {"w": T([12.0])})


def test_works_inside_vmap() -> None:
    params, x = {"w": T([[1.0], [3.0]])}, T([[2.0], [2.0]])
    found = torch.func.vmap(value_and_grad(half_square))(params, x)
    assert_same(found, (T([2.0, 18.0]), {"w": T([[4.0], [12.0]])}))


def test_works_inside_grad() -> None:
    """The derivative of w * x**2 by w is x**2."""
    second = torch.func.grad(
        lambda params: value_and_grad(half_square)(params, T([2.0]))[1]["w"].sum()
    )
    assert_same(second({"w": T([3.0])}), {"w": T([4.0])})


@pytest.mark.usefixtures("fresh_compiler")
def test_works_inside_compile() -> None:
    fast = torch.compile(value_and_grad(half_square), fullgraph=True, backend="eager")
    assert_same(fast({"w": T([3.0])}, T([2.0])), (T(18.0), {"w": T([12.0])}))


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def batch() -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def test_gradients_of_a_module_are_those_of_autograd() -> None:
    module, x = network(), batch()
    params, buffers = split(module)
    value, grads = value_and_grad(lambda p: apply(module, p, buffers, x)[0].square().mean())(params)
    loss = module(x).square().mean()
    loss.backward()
    assert_close(value, loss.detach(), rtol=1e-6)
    assert_close(
        grads, {name: p.grad for name, p in module.named_parameters()}, rtol=1e-5, atol=1e-7
    )


def test_split_copies() -> None:
    module = network()
    params, buffers = split(module)
    mine = {tensor.data_ptr() for tensor in (*params.values(), *buffers.values())}
    assert not mine & {tensor.data_ptr() for tensor in module.state_dict().values()}
    assert not any(tensor.requires_grad for tensor in params.values())


def test_split_has_everything_that_the_module_has() -> None:
    module = network()
    params, buffers = split(module)
    assert_same({**params, **buffers}, dict(module.state_dict()))


def test_frozen_parameters_go_with_the_buffers() -> None:
    module = network()
    module[0].requires_grad_(False)
    params, buffers = split(module)
    assert not {"0.weight", "0.bias"} & params.keys()
    assert {"0.weight", "0.bias", "1.running_mean"} <= buffers.keys()


def test_frozen_parameters_take_part() -> None:
    module, x = network(), batch()
    module[0].requires_grad_(False)
    assert_close(apply(module, *split(module), x)[0], module(x).detach(), rtol=1e-6)


def test_split_and_load_back() -> None:
    module, other = network(seed=0), network(seed=1)
    params, buffers = split(module)
    other.load_state_dict({**params, **buffers}, strict=False)
    assert_same(dict(other.state_dict()), dict(module.state_dict()))


def test_apply_touches_neither_its_arguments_nor_the_module() -> None:
    module = network()
    params, buffers = split(module)
    snapshot = Untouched(params, buffers, dict(module.state_dict()))
    apply(module, params, buffers, batch())
    snapshot.check()


def test_apply_returns_the_buffers_of_a_training_batch() -> None:
    module, x = network(), batch()
    _, after = apply(module, *split(module), x)
    twin = copy.deepcopy(module)
    twin(x)
    assert_close(after, dict(twin.named_buffers()), rtol=1e-6)


def test_apply_in_evaluation_leaves_the_buffers() -> None:
    module = network().eval()
    params, buffers = split(module)
    output, after = apply(module, params, buffers, batch())
    assert_same(after, buffers)
    assert_close(output.detach(), module(batch()).detach(), rtol=1e-6)


def test_apply_touches_no_buffer_when_only_a_part_is_training() -> None:
    module = network().eval()
    module[1].train()
    params, buffers = split(module)
    snapshot = Untouched(buffers)
    apply(module, params, buffers, batch())
    snapshot.check()


class Counter(nn.Module):
    """A module that replaces its buffer instead of writing into it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return x


def test_buffers_that_are_replaced_come_out() -> None:
    module = Counter()
    _, after = apply(module, *split(module), batch())
    assert_same(after, {"calls": T(1.0)})
    assert_same(module.calls, T(0.0))


class Tied(nn.Module):
    """One matrix under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_tied_weights_are_one_parameter() -> None:
    """The sum of w w x has the slope 1 (w x)' + w' 1 x'."""
    module, x = Tied(), T([[1.0, 0.0]])
    params, buffers = split(module)
    assert list(params) == ["first.weight"]
    doubled = {"first.weight": 2 * torch.eye(2)}
    assert_same(apply(module, doubled, buffers, x)[0], T([[4.0, 0.0]]))
    _, grads = value_and_grad(lambda p: apply(module, p, buffers, x)[0].sum())(doubled)
    assert_same(grads, {"first.weight": T([[4.0, 0.0], [4.0, 0.0]])})


@pytest.mark.parametrize(
    "change",
    [lambda params: params.pop("0.weight"), lambda params: params.update(extra=torch.ones(1))],
    ids=["missing", "unknown"],
)
def test_apply_refuses_other_names(change: Any) -> None:
    module = network()
    params, buffers = split(module)
    change(params)
    with pytest.raises(RuntimeError, match=r"(0\.weight|extra)"):
        apply(module, params, buffers, batch())


def test_a_module_is_trained_from_outside() -> None:
    """Twenty steps bring the loss down, and the module itself has not moved."""
    module, x, opt = network(), batch(), sgd(lr=0.2)
    before = copy.deepcopy(dict(module.state_dict()))
    params, buffers = split(module)
    state, losses = opt.init(params), []

    def loss(p: Any, b: Any) -> Any:
        output, after = apply(module, p, b, x)
        return (output - 1).square().mean(), after

    for _ in range(20):
        (value, buffers), grads = value_and_grad(loss, has_aux=True)(params, buffers)
        params, state = opt(params, grads, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 4
    assert_same(dict(module.state_dict()), before)


@pytest.mark.usefixtures("fresh_compiler")
def test_params_of_a_compiled_call_stay_though_an_embedding_limits_its_norms() -> None:
    layer = nn.Embedding(3, 2, max_norm=0.1)
    params, buffers = split(layer)
    before = Untouched(params)
    fast = torch.compile(
        lambda params: apply(layer, params, buffers, T([0]))[0], fullgraph=True, backend="eager"
    )
    assert fast(params).norm() <= 0.1
    before.check()


class Tally(nn.Module):
    """Adds to a buffer, also in eval."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.seen.add_(x)


def test_buffers_of_a_mapped_call_stay_in_eval() -> None:
    buffers, layer = {"seen": torch.zeros(2, 1)}, Tally().eval()
    _, after = torch.func.vmap(lambda b, x: apply(layer, {}, b, x))(buffers, torch.ones(2, 1))
    assert_same((buffers["seen"], after["seen"]), (torch.zeros(2, 1), torch.ones(2, 1)))


def test_leaves_that_do_not_matter_have_zeros_inside_vmap() -> None:
    """Torch tells no difference there, as the docstring says."""
    params = {"w": torch.ones(2, 1), "v": torch.ones(2, 1)}
    grads = torch.func.vmap(value_and_grad(half_square))(params, torch.ones(2, 1))[1]
    assert_same(grads, {"w": torch.ones(2, 1), "v": torch.zeros(2, 1)})


@pytest.mark.parametrize("wrap", [lambda f: f, torch.func.vmap], ids=["eager", "vmap"])
def test_an_aux_that_is_missing_is_an_error(wrap: Any) -> None:
    compute = wrap(value_and_grad(lambda p: p.sum(), has_aux=True))
    with pytest.raises(TypeError, match=r"must return a pair \(0-d tensor, anything\), got Tensor"):
        compute(torch.ones(2, 1))


@pytest.mark.parametrize("wrap", [lambda f: f, torch.func.vmap], ids=["eager", "vmap"])
def test_a_leaf_of_integers_is_named(wrap: Any) -> None:
    params = {"w": torch.ones(2), "inner": {"n": T([1, 2])}}
    with pytest.raises(TypeError, match=r"'inner.n' must be a floating or complex tensor, got tor"):
        wrap(value_and_grad(lambda p: p["w"].sum()))(params)


def test_a_leaf_that_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match="'w' must be a floating or complex tensor, got float"):
        value_and_grad(half_square)({"w": 1.0}, T(1.0))
