"""Modules that run code again for the gradient, write to their tensors, or are called twice."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, linear
from torch.utils.checkpoint import checkpoint

from functional_sgd import apply, compile_step, placing, sgd, split, value_and_grad
from tests.comparing import Untouched, assert_close, assert_same

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


class Checkpointed(nn.Module):
    """A network whose middle is computed again for the gradient."""

    def __init__(self, reentrant: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.middle, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.reentrant, self.dropout = reentrant, nn.Dropout(dropout)

    def inner(self, x: Tensor) -> Tensor:
        found: Tensor = self.dropout(self.middle(x).tanh())
        return found

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        found: Tensor = self.last(checkpoint(self.inner, hidden, use_reentrant=self.reentrant))
        return found


def doubled(module: nn.Module) -> tuple[Any, Any]:
    """Twice the module's own params, so that nobody takes the two for each other; its buffers."""
    params, buffers = split(module)
    return {name: 2 * value for name, value in params.items()}, buffers


def loss_of(module: nn.Module, buffers: Any, x: Tensor = X) -> Any:
    return lambda params: apply(module, params, buffers, x)[0].square().mean()


def by_autograd(module: nn.Module, params: Any) -> dict[str, Tensor | None]:
    """The gradients of the same loss by backward(), the params loaded into the module."""
    module.load_state_dict(params, strict=False)
    module(X).square().mean().backward()
    return {name: value.grad for name, value in module.named_parameters()}


def test_checkpointed_layers_see_the_params_of_the_gradient() -> None:
    params, buffers = doubled(Checkpointed())
    _, grads = value_and_grad(loss_of(Checkpointed(), buffers))(params)
    assert_close(grads, by_autograd(Checkpointed(), params), rtol=1e-6)


def test_reentrant_checkpointing_is_an_error_that_names_the_cure() -> None:
    params, buffers = doubled(Checkpointed())
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        value_and_grad(loss_of(Checkpointed(reentrant=True), buffers))(params)


def test_backward_hooks_see_the_params_of_the_gradient() -> None:
    module, seen = Checkpointed(), []
    module.middle.register_full_backward_hook(
        lambda layer, *_: seen.append(layer.weight.detach().clone())
    )
    params, buffers = doubled(module)
    value_and_grad(loss_of(module, buffers))(params)
    assert_same(seen[0], params["middle.weight"])


def test_hooks_on_parameters_change_the_gradient() -> None:
    module, params, buffers = nn.Linear(3, 2), *doubled(nn.Linear(3, 2))
    _, expected = value_and_grad(loss_of(module, buffers))(params)
    handle = module.weight.register_hook(lambda grad: 3 * grad)
    _, grads = value_and_grad(loss_of(module, buffers))(params)
    assert_close(grads["weight"], 3 * expected["weight"], rtol=1e-6)
    assert_same(grads["bias"], expected["bias"])
    handle.remove()
    assert_same(value_and_grad(loss_of(module, buffers))(params)[1], expected)


def test_the_module_has_its_own_tensors_after_the_gradient_and_after_an_error() -> None:
    module = Checkpointed()
    own = dict(module.named_parameters())
    params, buffers = doubled(module)
    value_and_grad(loss_of(module, buffers))(params)
    with pytest.raises(ValueError, match="0-d"):
        value_and_grad(lambda p: apply(module, p, buffers, X)[0])(params)
    assert all(value is own[name] for name, value in module.named_parameters())


def test_two_calls_with_other_params_are_right_where_no_layer_is_called_again() -> None:
    module, (params, buffers) = nn.Linear(3, 2), doubled(nn.Linear(3, 2))

    def loss(p: Any) -> Tensor:
        halves = {name: value / 2 for name, value in p.items()}
        one, other = apply(module, p, buffers, X)[0], apply(module, halves, buffers, X)[0]
        return (one * other).mean()

    _, grads = value_and_grad(loss)(params)
    _, expected = value_and_grad(lambda p: linear(X, p["weight"], p["bias"]).square().mean() / 2)(
        params
    )
    assert_close(grads, expected, rtol=1e-5, atol=1e-7)


def test_two_calls_with_other_params_are_an_error_where_layers_are_called_again() -> None:
    module = Checkpointed()
    params, buffers = doubled(module)

    def loss(p: Any) -> Tensor:
        halves = {name: value / 2 for name, value in p.items()}
        one, other = apply(module, p, buffers, X)[0], apply(module, halves, buffers, X)[0]
        return (one * other).mean()

    with pytest.raises(RuntimeError, match="called with different params.*deepcopy"):
        value_and_grad(loss)(params)


def test_a_teacher_under_no_grad_does_not_disturb_checkpointing() -> None:
    module = Checkpointed()
    params, buffers = doubled(module)
    teacher, _ = split(module)

    def loss(p: Any) -> Tensor:
        output = apply(module, p, buffers, X)[0]
        with torch.no_grad():
            apply(module, teacher, buffers, X)
        return output.square().mean()

    _, grads = value_and_grad(loss)(params)
    assert_close(grads, by_autograd(Checkpointed(), params), rtol=1e-6)


def test_a_second_derivative_of_checkpointed_layers_is_an_error() -> None:
    params, buffers = doubled(Checkpointed())
    tracked = {name: value.requires_grad_() for name, value in params.items()}
    with pytest.raises(RuntimeError, match="differentiated again"):
        value_and_grad(loss_of(Checkpointed(), buffers))(tracked)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_compiled_step_takes_checkpointing_without_chance_and_refuses_it_with() -> None:
    opt = sgd(lr=1.0)
    params, buffers = doubled(Checkpointed())
    step = compile_step(loss_of(Checkpointed(), buffers), opt)
    _, after, _ = step(params, opt.init(params), None)
    grads = by_autograd(Checkpointed(), params)
    assert_close(after["middle.weight"], params["middle.weight"] - grads["middle.weight"])
    step = compile_step(loss_of(Checkpointed(dropout=0.5), buffers), opt)
    with pytest.raises(RuntimeError, match="the gradient draws random numbers"):
        step(params, opt.init(params), None)


class Writing(nn.Module):
    """A module that writes to whatever it has, in training and in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 2, max_norm=0.1)
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("var", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls.add_(1)
            self.frozen.add_(1)
        found: Tensor = self.embedding(x) * self.frozen
        batch_norm(found.detach(), self.mean, self.var, training=True)
        return found


@pytest.mark.parametrize("training", [True, False])
def test_what_a_module_writes_to_is_copied(training: bool) -> None:
    module, x = Writing().train(training), torch.tensor([0, 1, 1])
    params, buffers = split(module)
    untouched = Untouched(params, buffers, dict(module.state_dict()))
    first, _ = apply(module, params, buffers, x)
    second, after = apply(module, params, buffers, x)
    untouched.check()
    assert_same(first, second)
    assert_same((after["calls"], after["frozen"]), (torch.tensor(1.0), torch.ones(2)))
    assert not torch.equal(after["mean"], buffers["mean"])


def test_what_is_not_written_to_is_not_copied() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    params, buffers = split(module)
    seen: list[Tensor] = []
    module[0].register_forward_hook(lambda layer, *_: seen.append(layer.weight))
    for _ in range(2):
        _, after = apply(module, params, buffers, X)
    assert seen[1] is params["0.weight"]
    assert after["1.running_mean"].data_ptr() == buffers["1.running_mean"].data_ptr()


class Late(nn.Module):
    """A module that writes from its third call on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(2)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 2:
            with torch.no_grad():
                self.weight.mul_(2)
        return x * self.weight


def test_a_module_that_writes_later_is_an_error_that_names_the_tensor() -> None:
    module = Late()
    params, buffers = split(module)
    for _ in range(2):
        apply(module, params, buffers, torch.ones(2))
    with pytest.raises(RuntimeError, match=r"\['weight'\] in this forward pass"):
        apply(module, params, buffers, torch.ones(2))


def test_apply_works_in_inference_mode() -> None:
    module = Writing().eval()
    params, buffers = split(module)
    untouched = Untouched(params, buffers)
    with torch.inference_mode():
        apply(module, params, buffers, torch.tensor([0, 1]))
        apply(module, params, buffers, torch.tensor([0, 1]))
    untouched.check()


def test_a_module_at_work_in_another_thread_is_an_error_and_stays_whole() -> None:
    module = nn.Linear(3, 2)
    own = dict(module.named_parameters())
    params, buffers = split(module)
    errors: list[Exception] = []

    def elsewhere() -> None:
        try:
            apply(module, params, buffers, X)
        except RuntimeError as error:
            errors.append(error)

    def loss(p: Any) -> Tensor:
        output = apply(module, p, buffers, X)[0]
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return output.square().mean()

    value_and_grad(loss)(params)
    assert "another thread" in str(errors[0])
    assert all(value is own[name] for name, value in module.named_parameters())


def test_tied_weights_may_be_given_under_both_names_and_not_as_two() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    weight, x = 2 * torch.eye(2), torch.ones(1, 2)
    both = {"0.weight": weight, "1.weight": weight}
    assert_same(apply(module, both, {}, x)[0], torch.full((1, 2), 4.0))
    assert_same(apply(module, {"1.weight": weight}, {}, x)[0], torch.full((1, 2), 4.0))
    with pytest.raises(RuntimeError, match="two were given"):
        apply(module, {**both, "1.weight": weight.clone()}, {}, x)


def test_inputs_may_have_names() -> None:
    module = nn.Bilinear(2, 2, 1)
    one, other = torch.ones(1, 2), torch.zeros(1, 2)
    named = apply(module, *split(module), input1=one, input2=other)[0]
    assert_same(named.detach(), module(one, other).detach())


def test_preparing_a_gradient_that_fails_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(placed: placing.Placed) -> Any:
        raise RuntimeError("not now")

    layer = nn.Linear(3, 1)
    next(iter(layer.parameters())).register_hook(lambda grad: grad)
    one = placing.Placed(layer, dict(layer.named_parameters()))
    monkeypatch.setattr(placing, "_hooked", fail)
    try:
        with pytest.raises(RuntimeError, match="not now"):
            placing.made_ready([one], again=True)
        layer(X)  # a hook that refuses calls would raise
    finally:
        one.put_back()
