"""to_torch: an optimizer of ours behind the interface of torch.optim."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_sgd as fs
from functional_sgd import (
    adamw,
    chain,
    clip_norm,
    elementwise,
    fuse,
    partition,
    sgd,
    sgd_step,
    to_torch,
)
from functional_sgd.schedules import Cosine
from tests.comparing import assert_close, assert_same
from tests.functional_sgd.bridge.helpers import batch, network, train, values_of

O = torch.optim  # noqa: E741


PAIRS: dict[str, Any] = {
    "sgd": (
        lambda p: O.SGD(p, 0.1, momentum=0.9, nesterov=True),
        fs.sgd(0.1, mom=0.9, nesterov=True),
    ),
    "adam": (lambda p: O.Adam(p, 0.01, weight_decay=0.1), fs.adam(0.01, wd=0.1)),
    "adamw": (lambda p: O.AdamW(p, 0.01), fs.adamw(0.01)),
    "rmsprop": (lambda p: O.RMSprop(p, 0.01, momentum=0.5), fs.rmsprop(0.01, mom=0.5)),
    "radam": (lambda p: O.RAdam(p, 0.01), fs.radam(0.01)),
}


@pytest.mark.parametrize("named", [False, True], ids=["plain", "named"])
@pytest.mark.parametrize("name", PAIRS)
def test_trains_like_torch(name: str, named: bool) -> None:
    """Float64, fifty steps, within 1e-12."""
    make, opt = PAIRS[name]
    theirs, ours = network(), network()
    params = ours.named_parameters() if named else ours.parameters()
    expected = train(theirs, make(theirs.parameters()), 50)
    assert_close(train(ours, to_torch(opt, params), 50), expected, atol=1e-12)


def test_values_are_those_of_the_optimizer_itself() -> None:
    """Also inside wrappers: bit for bit what opt does to a dict of the params."""
    opt = fs.skip_nonfinite(fs.average_params(chain(clip_norm, adamw(lr=0.1))))
    model = network()
    optimizer = to_torch(opt, model.named_parameters())
    params, state = values_of(model), opt.init(values_of(model))
    for seed in range(4):
        optimizer.zero_grad()
        model(batch(seed)).square().mean().backward()
        grads = {name: param.grad.clone() for name, param in model.named_parameters()}
        optimizer.step()
        params, state = opt(params, grads, state)
    assert_same(values_of(model), params)
    assert_same(optimizer.opt_state, state)


def test_groups_have_hypers_of_their_own() -> None:
    def groups(model: nn.Module, wd: str) -> list[dict[str, Any]]:
        return [
            {"params": model[0].parameters(), "lr": 0.1},
            {"params": model[2].parameters(), wd: 0.3},
        ]

    theirs, ours = network(), network()
    expected = train(theirs, O.AdamW(groups(theirs, "weight_decay"), lr=0.01), 20)
    assert_close(
        train(ours, to_torch(adamw(lr=0.01), groups(ours, "wd")), 20), expected, atol=1e-12
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda o: O.lr_scheduler.StepLR(o, 3, gamma=0.5),
        lambda o: O.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: O.lr_scheduler.OneCycleLR(o, 0.1, total_steps=30, cycle_momentum=False),
        lambda o: O.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (epoch + 1)),
    ],
    ids=["StepLR", "CosineAnnealingLR", "OneCycleLR", "LambdaLR"],
)
def test_schedulers_of_torch(make: Any) -> None:
    theirs, ours = network(), network()
    their, our = (
        O.AdamW(theirs.parameters(), lr=0.05),
        to_torch(adamw(), ours.parameters(), lr=0.05),
    )
    expected = train(theirs, their, 20, scheduler=make(their))
    assert_close(train(ours, our, 20, scheduler=make(our)), expected, atol=1e-12)


def test_grad_scaler_skips_steps_and_unscales() -> None:
    models = [network().float(), network().float()]
    optimizers = [O.AdamW(models[0].parameters()), to_torch(adamw(), models[1].parameters())]
    for model, optimizer in zip(models, optimizers, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
        for seed in range(6):
            optimizer.zero_grad()
            loss = model(batch(seed).float()).square().mean()
            scaler.scale(loss * (float("inf") if seed == 3 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**3
    assert_close(values_of(models[1]), values_of(models[0]), atol=1e-5)
    assert optimizers[1].opt_state["step"].tolist() == [5] * 4


def test_closures_are_run_with_gradients_on() -> None:
    model = network()
    optimizer = to_torch(sgd(lr=0.1), model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(batch(0)).square().mean()
        loss.backward()
        return loss

    before = model(batch(0)).square().mean().item()
    assert optimizer.step(closure).item() == before
    assert optimizer.step(closure).item() < before


def test_hooks_are_called() -> None:
    called, model = [], network()
    optimizer = to_torch(sgd(), model.parameters())
    optimizer.register_step_pre_hook(lambda *args: called.append("before"))
    optimizer.register_step_post_hook(lambda *args: called.append("after"))
    train(model, optimizer, 1)
    assert called == ["before", "after"]


def test_params_may_be_added_later() -> None:
    """What is kept of the others stays; the new ones begin with fresh slots."""
    model = network()
    optimizer = to_torch(adamw(lr=0.1), model[0].parameters())
    train(model, optimizer, 3)
    before = copy.deepcopy(optimizer.opt_state)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.5})
    after = optimizer.opt_state
    assert_same({name: after["grad_avg"][name] for name in ("0", "1")}, before["grad_avg"])
    assert_same(after["step"], torch.tensor([3, 3, 0, 0]))
    assert_same(after["grad_avg"]["2"], torch.zeros(2, 4, dtype=torch.float64))
    start = values_of(model)
    moved = train(model, optimizer, 1)
    assert not any(torch.equal(start[name], moved[name]) for name in start)


def test_a_param_without_gradient_is_left_alone() -> None:
    model = network()
    optimizer = to_torch(adamw(lr=0.1), model.parameters())
    start = values_of(model)
    model[0](batch(0)).sum().backward()
    optimizer.step()
    assert_same(values_of(model)["2.weight"], start["2.weight"])
    assert not torch.equal(values_of(model)["0.weight"], start["0.weight"])


def test_names_are_matched_by_patterns() -> None:
    model = network()
    optimizer = to_torch(
        partition({"all": sgd(lr=0.1)}, {"*.bias": None, "*": "all"}), model.named_parameters()
    )
    start = values_of(model)
    after = train(model, optimizer, 1)
    assert {name for name in start if torch.equal(start[name], after[name])} == {"0.bias", "2.bias"}


def test_clipping_sees_all_groups() -> None:
    theirs, ours = network(), network()
    groups = [{"params": ours[0].parameters()}, {"params": ours[2].parameters(), "lr": 0.5}]
    optimizer = to_torch(chain(clip_norm, sgd(lr=0.1), max_norm=1e-3), groups)
    for model in (theirs, ours):
        model(batch(0)).square().sum().backward()
    before, after = values_of(ours), (optimizer.step(), values_of(ours))[1]
    nn.utils.clip_grad_norm_(theirs.parameters(), 1e-3)
    for (name, param), lr in zip(theirs.named_parameters(), (0.1, 0.1, 0.5, 0.5), strict=True):
        assert_close(before[name] - after[name], lr * param.grad, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("debug", [False, True])
def test_a_fused_optimizer_that_donates_writes_into_the_params(debug: bool) -> None:
    plain, model = network(), network()
    expected = train(plain, to_torch(adamw(lr=0.1), plain.parameters()), 3)
    addresses = [param.data_ptr() for param in model.parameters()]
    optimizer = to_torch(fuse(adamw(lr=0.1), donate=True, debug=debug), model.parameters())
    assert_close(train(model, optimizer, 3), expected, rtol=1e-12, atol=1e-12)
    assert [param.data_ptr() for param in model.parameters()] == addresses


@pytest.mark.parametrize("donate", [False, True])
def test_a_backward_pass_through_params_that_were_overwritten_is_an_error(donate: bool) -> None:
    """As after a step of torch.optim, and not a wrong gradient."""
    weight = nn.Parameter(torch.ones(3))
    loss = weight.square().sum()
    weight.grad = torch.ones(3)
    to_torch(fuse(sgd(lr=0.1), donate=donate), [weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_backward_pass_through_params_that_stayed_is_fine() -> None:
    """A frozen parameter has not been written to."""
    weight = nn.Parameter(torch.ones(3))
    loss = weight.square().sum()
    weight.grad = torch.zeros(3)
    to_torch(fs.freeze(sgd(lr=0.1), "*"), [weight]).step()
    loss.backward()
    assert_same(weight.grad, torch.full((3,), 2.0))


@elementwise
def scale_by_loss(update: Tensor, *, value: Tensor) -> dict[str, Tensor]:
    """A rule with an extra."""
    return dict(update=update * value)


def test_extras_are_passed_to_step() -> None:
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    optimizer = to_torch(chain(scale_by_loss, sgd_step, lr=1.0), [weight])
    optimizer.step(value=torch.tensor(0.25))
    assert_same(weight.detach(), torch.tensor([0.75]))


def test_wrong_arguments_are_errors() -> None:
    weight = [nn.Parameter(torch.ones(1))]
    with pytest.raises(
        ValueError, match="no rule reads 'betas'. 'betas' is called mom and sqr_mom here"
    ):
        to_torch(adamw(), weight, betas=(0.9, 0.99))
    with pytest.raises(ValueError, match="'weight_decay' is called wd here"):
        to_torch(adamw(), [{"params": weight, "weight_decay": 0.1}])
    with pytest.raises(TypeError, match="to_torch: expected an optimizer such as adamw\\(\\)"):
        to_torch(adamw, weight)
    twice = [{"params": [("w", weight[0])]}, {"params": [("w", nn.Parameter(torch.ones(1)))]}]
    with pytest.raises(ValueError, match="two parameters have the name 'w'"):
        to_torch(adamw(), twice).step()


def test_a_hyper_that_only_some_groups_have_is_an_error() -> None:
    groups = [
        {"params": [nn.Parameter(torch.ones(1))], "lr": 0.1},
        {"params": [nn.Parameter(torch.ones(1))]},
    ]
    with pytest.raises(ValueError, match="group 1 has no 'lr', which other groups have"):
        to_torch(chain(sgd_step), groups).step()


def test_repr() -> None:
    assert repr(to_torch(sgd(lr=0.1), network().parameters())).startswith(
        "to_torch(chain(sgd_step, lr=0.1)):"
    )


def test_a_module_or_a_schedule_in_place_of_what_is_wanted_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"got a module. Pass module.named_parameters\(\)"):
        to_torch(adamw(), nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="to_torch: hyper 'lr' must be a number, got a function"):
        to_torch(adamw(), nn.Linear(1, 1).parameters(), lr=Cosine(0.1, 0.0))


def ones() -> nn.Parameter:
    return nn.Parameter(torch.ones(1))


def test_a_momentum_of_a_group_outdoes_the_default() -> None:
    """Though torch fills in the "betas" of the default."""
    optimizer = to_torch(adamw(), [{"params": [ones()], "mom": 0.5}, {"params": [ones()]}])
    assert optimizer.hyper()["mom"] == {"0": 0.5, "1": 0.9}
    assert [group["betas"] for group in optimizer.param_groups] == [(0.5, 0.999), (0.9, 0.999)]


def test_a_momentum_of_a_group_that_is_added_outdoes_the_default() -> None:
    optimizer = to_torch(sgd(mom=0.9), [ones()])
    optimizer.add_param_group({"params": [ones()], "mom": 0.5})
    assert optimizer.hyper()["mom"] == {"0": 0.9, "1": 0.5}


def test_betas_may_be_a_list() -> None:
    optimizer = to_torch(adamw(), [ones()])
    optimizer.param_groups[0]["betas"] = [0.8, 0.95]
    assert [optimizer.hyper()[name] for name in ("mom", "sqr_mom")] == [0.8, 0.95]


def test_betas_of_the_wrong_number_are_an_error() -> None:
    optimizer = to_torch(adamw(), [ones()])
    optimizer.param_groups[0]["betas"] = (0.8,)
    with pytest.raises(ValueError, match="'betas' of group 0 must have a number for each of mom"):
        optimizer.hyper()


@pytest.mark.parametrize("looked_at", [False, True])
def test_a_group_with_a_name_that_is_taken_is_not_added(looked_at: bool) -> None:
    optimizer = to_torch(adamw(lr=0.1), [("w", ones())])
    if looked_at:
        assert optimizer.opt_state["step"].tolist() == [0]
    with pytest.raises(ValueError, match="two parameters have the name 'w'"):
        optimizer.add_param_group({"params": [("w", ones())]})
    assert len(optimizer.param_groups) == 1
    optimizer.step()


def by_sam(weight: nn.Parameter) -> Any:
    """An optimizer that steps by 0.5 along the gradient taken 1 further up."""
    return to_torch(fs.sam(sgd(lr=0.5), rho=1.0), [weight])


def fourth_power(weight: nn.Parameter) -> Any:
    """A closure: its gradient is the cube."""

    def closure() -> Tensor:
        weight.grad = None
        loss = (weight**4).sum() / 4
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return closure


def test_sam_takes_the_gradient_of_the_closure_at_the_perturbed_params() -> None:
    """1 - 0.5 * 2**3, and the loss at 1."""
    weight = ones()
    loss = by_sam(weight).step(fourth_power(weight))
    assert (weight.item(), loss.item()) == (-3.0, 0.25)


def test_sam_without_a_closure_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"needs a closure; got none. Pass step\(closure\)"):
        by_sam(ones()).step()


def test_params_are_put_back_if_the_closure_fails_at_the_perturbed_params() -> None:
    weight = ones()
    computed = fourth_power(weight)

    def closure() -> Tensor:
        if weight.item() != 1.0:
            raise RuntimeError("not here")
        loss: Tensor = computed()
        return loss

    with pytest.raises(RuntimeError, match="not here"):
        by_sam(weight).step(closure)
    assert weight.item() == 1.0
