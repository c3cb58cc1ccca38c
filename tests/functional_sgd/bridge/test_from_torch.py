"""from_torch and into_torch: switching between torch.optim and us in the middle of a run changes
nothing.
"""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from functional_sgd import adam, from_torch, fuse, into_torch, sgd
from tests.comparing import Untouched, assert_close, assert_same
from tests.functional_sgd.bridge.makers import GROUPED, MAKERS

O = torch.optim  # noqa: E741

pytestmark = pytest.mark.usefixtures("scalars_in_double")


class Net(nn.Module):
    """Four parameters, one of them 0-d."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"b": (3,), "a": (2, 3), "scale": (), "c": (4,)}.items():
            value = torch.randn(
                shape,
                generator=generator,
                dtype=torch.complex128 if dtype.is_complex else torch.float64,
            )
            setattr(self, name, nn.Parameter(value.to(dtype)))


def grads_of(model: Net, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(param.shape, generator=generator, dtype=param.dtype)
        for name, param in model.named_parameters()
    }


def their_steps(model: Net, optimizer: Any, seeds: range, idle: tuple[str, ...] = ()) -> None:
    for seed in seeds:
        for name, grad in grads_of(model, seed).items():
            getattr(model, name).grad = None if name in idle else grad
        optimizer.step()


def our_steps(
    model: Net, imported: Any, seeds: range, wrap: Any = lambda opt: opt
) -> tuple[Any, Any]:
    opt, params, state, hyper = imported
    for seed in seeds:
        params, state = wrap(opt)(params, grads_of(model, seed), state, hyper)
    return params, state


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def check_switching(model: Net, optimizer: Any, atol: float = 1e-12, before: int = 7) -> None:
    """Some steps there; twenty here and there; then back, and five more there."""
    their_steps(model, optimizer, range(before))
    imported = from_torch(optimizer, model.named_parameters())
    assert_same(imported.params, values_of(model))
    params, state = our_steps(model, imported, range(before, before + 20))

    copies = type(optimizer)([{**group} for group in optimizer.param_groups])
    copies.load_state_dict(optimizer.state_dict())
    their_steps(model, optimizer, range(before, before + 20))
    assert_close(params, values_of(model), atol=atol)

    copies.load_state_dict(into_torch(copies, model.named_parameters(), state))
    expected = values_of(model)
    their_steps(model, optimizer, range(100, 105))
    there = values_of(model)
    model.load_state_dict(expected)
    their_steps(model, copies, range(100, 105))
    assert_close(values_of(model), there, atol=atol)


@pytest.mark.parametrize("before", [0, 1, 7])
@pytest.mark.parametrize("name", MAKERS)
def test_switching_changes_nothing(name: str, before: int) -> None:
    model = Net()
    check_switching(model, MAKERS[name](model.parameters()), before=before)


@pytest.mark.parametrize("name", [name for name in MAKERS if not name.startswith("sgd")])
def test_what_goes_back_is_what_torch_keeps(name: str) -> None:
    """Entry by entry, with its shape; ASGD's rates and NAdam's product of momenta among them."""
    model = Net()
    optimizer = MAKERS[name](model.parameters())
    their_steps(model, optimizer, range(3))
    imported = from_torch(optimizer, model.named_parameters())
    there = into_torch(optimizer, model.named_parameters(), imported.state)["state"]
    assert_close(there, optimizer.state_dict()["state"], atol=1e-14)


@pytest.mark.parametrize("name", GROUPED)
def test_groups_with_hypers_of_their_own(name: str) -> None:
    model = Net()
    check_switching(model, GROUPED[name]([model.c, model.a], [model.scale, model.b]))


@pytest.mark.parametrize(
    "name", ["sgd momentum", "adamw", "rmsprop", "nadam", "adagrad all", "rprop", "asgd"]
)
def test_complex_parameters(name: str) -> None:
    model = Net(torch.complex128)
    check_switching(model, MAKERS[name](model.parameters()))


def test_half_precision_slots_become_float32() -> None:
    model = Net(torch.bfloat16)
    optimizer = MAKERS["adamw"](model.parameters())
    their_steps(model, optimizer, range(3))
    _, params, state, _ = from_torch(optimizer, model.named_parameters())
    assert params["a"].dtype == torch.bfloat16
    assert_same(state["grad_avg"]["a"], optimizer.state[model.a]["exp_avg"].float())


def test_state_is_taken_over_by_name_whatever_the_order() -> None:
    model = Net()
    optimizer = O.Adam([model.c, model.scale, model.a, model.b])
    their_steps(model, optimizer, range(3))
    _, _, state, _ = from_torch(optimizer, dict(model.named_parameters()))
    assert_same(state["step"], torch.tensor([3, 3, 3, 3]))
    for name, param in model.named_parameters():
        assert_same(state["grad_avg"][name], optimizer.state[param]["exp_avg"])
        assert_same(state["sqr_avg"][name], optimizer.state[param]["exp_avg_sq"])


def test_what_is_returned_shares_nothing_with_torch() -> None:
    model = Net()
    optimizer = MAKERS["adamw"](model.parameters())
    their_steps(model, optimizer, range(2))
    imported = from_torch(optimizer, model.named_parameters())
    snapshot = Untouched(imported.params, imported.state)
    their_steps(model, optimizer, range(2, 4))
    snapshot.check()
    there = into_torch(optimizer, model.named_parameters(), imported.state)
    before = Untouched(imported.state, optimizer.state_dict()["state"])
    for entry in there["state"].values():
        entry["exp_avg"].zero_()
    before.check()


def test_the_imported_chain_can_be_fused() -> None:
    model = Net()
    optimizer = MAKERS["adamw"](model.parameters())
    their_steps(model, optimizer, range(3))
    imported = from_torch(optimizer, model.named_parameters())
    params, _ = our_steps(model, imported, range(3, 23), wrap=fuse)
    their_steps(model, optimizer, range(3, 23))
    assert_close(params, values_of(model), atol=1e-12)


def test_frozen_parameters_need_no_state() -> None:
    model = Net()
    optimizer = MAKERS["adamw"](model.parameters())
    model.a.requires_grad_(False)
    their_steps(model, optimizer, range(3), idle=("a",))
    opt, params, state, hyper = from_torch(optimizer, model.named_parameters())
    assert_same(state["grad_avg"]["a"], torch.zeros(2, 3, dtype=torch.float64))
    after, _ = opt(params, {**grads_of(model, 3), "a": None}, state, hyper)
    their_steps(model, optimizer, range(3, 4), idle=("a",))
    assert_close(after, values_of(model), atol=1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_parameters_may_have_taken_different_numbers_of_steps(name: str) -> None:
    """None of them, three or five: each goes on from its own count, here and back there."""
    model = Net()
    optimizer = MAKERS[name](model.parameters())
    their_steps(model, optimizer, range(3), idle=("a", "c"))
    their_steps(model, optimizer, range(3, 5), idle=("a",))
    check_switching(model, optimizer, before=0)


def test_the_counts_of_parameters_are_taken_over_one_by_one() -> None:
    """In the order of the leaves: a, b, c, scale."""
    model = Net()
    optimizer = O.Adam(model.parameters())
    their_steps(model, optimizer, range(3), idle=("a", "c"))
    their_steps(model, optimizer, range(3, 5), idle=("a",))
    state = from_torch(optimizer, model.named_parameters()).state
    assert_same(state["step"], torch.tensor([0, 5, 2, 5]))


def test_sgd_does_not_count_so_a_parameter_has_begun_or_not() -> None:
    model = Net()
    optimizer = MAKERS["sgd dampening"](model.parameters())
    their_steps(model, optimizer, range(3), idle=("c",))
    state = from_torch(optimizer, model.named_parameters()).state
    assert_same(state["step"], torch.tensor([1, 1, 0, 1]))


def test_counts_go_back_one_by_one() -> None:
    """A parameter that has taken no step has no state there either."""
    model = Net()
    optimizer = O.Adam(model.parameters())
    their_steps(model, optimizer, range(3), idle=("a",))
    imported = from_torch(optimizer, model.named_parameters())
    there = into_torch(optimizer, model.named_parameters(), imported.state)["state"]
    counts = {list(values_of(model))[number]: own["step"].item() for number, own in there.items()}
    assert counts == {"b": 3, "scale": 3, "c": 3}


def test_a_state_with_other_counts_than_parameters_is_an_error() -> None:
    model = Net()
    optimizer = O.Adam(model.parameters())
    state = from_torch(optimizer, model.named_parameters()).state
    with pytest.raises(ValueError, match="one entry for each of the 4 leaves of params, got .3,"):
        into_torch(optimizer, model.named_parameters(), {**state, "step": state["step"][1:]})


def test_the_chain_has_the_hypers_of_the_groups() -> None:
    model = Net()
    opt, _, _, hyper = from_torch(
        O.AdamW(model.parameters(), weight_decay=0.0), model.named_parameters()
    )
    assert opt.hyper == {"lr": 1e-3, "mom": 0.9, "sqr_mom": 0.999, "eps": 1e-8, "wd": 0.0}
    assert hyper == {}
    opt, _, _, hyper = from_torch(
        GROUPED["sgd"]([model.c, model.a], [model.scale, model.b]), model.named_parameters()
    )
    assert hyper["lr"] == {"c": 0.1, "a": 0.1, "scale": 0.5, "b": 0.5}
    assert hyper.keys() == {"lr", "wd"}


def test_before_the_first_step_there_is_no_state_to_hand_back() -> None:
    """torch's first step with momentum is another than those with a buffer."""
    model = Net()
    optimizer = MAKERS["sgd dampening"](model.parameters())
    state = from_torch(optimizer, model.named_parameters()).state
    assert into_torch(optimizer, model.named_parameters(), state)["state"] == {}


def test_hypers_go_back() -> None:
    model = Net()
    optimizer = O.AdamW([{"params": [model.a, model.b]}, {"params": [model.c, model.scale]}])
    rates = {"a": 0.1, "b": 0.1, "c": 0.2, "scale": 0.2}
    state = from_torch(optimizer, model.named_parameters()).state
    there = into_torch(
        optimizer,
        model.named_parameters(),
        state,
        {"lr": rates, "mom": 0.5, "sqr_mom": 0.6, "wd": 0.7},
    )
    optimizer.load_state_dict(there)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.5, 0.6)] * 2
    assert optimizer.param_groups[0]["weight_decay"] == 0.7


def stepped(optimizer: Any, model: Net, idle: tuple[str, ...] = ()) -> Any:
    their_steps(model, optimizer, range(2), idle)
    return optimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: O.Adam([nn.Parameter(torch.ones(5))]),
            "parameter 0 of group 0, of shape \\(5,\\), has no name",
        ),
        (
            lambda m: O.RMSprop([{"params": [m.a]}, {"params": [m.b], "centered": True}]),
            "groups differ in 'centered'",
        ),
        (
            lambda m: O.Adam([{"params": [m.a]}, {"params": [m.b], "maximize": True}]),
            "groups differ in 'maximize'",
        ),
    ],
    ids=["no name", "switches", "maximize"],
)
def test_what_cannot_be_taken_over_is_an_error(make: Any, message: str) -> None:
    model = Net()
    optimizer = make(model)
    with pytest.raises(ValueError, match=message):
        from_torch(optimizer, model.named_parameters())


def test_a_slot_that_is_missing_is_named() -> None:
    model = Net()
    optimizer = stepped(O.AdamW(model.parameters()), model)
    del optimizer.state[model.c]["exp_avg_sq"]
    with pytest.raises(
        ValueError, match="the state of 'c' has no 'exp_avg_sq'; it has step, exp_avg"
    ):
        from_torch(optimizer, model.named_parameters())


def test_other_optimizers_are_an_error() -> None:
    model = Net()
    for who, call in (
        ("from_torch", from_torch),
        ("into_torch", lambda *args: into_torch(*args, {})),
    ):
        with pytest.raises(
            TypeError, match=f"{who}: expected an optimizer of torch.optim: .*SGD; got Adafactor"
        ):
            call(O.Adafactor(model.parameters()), model.named_parameters())


def test_wrong_states_and_hypers_are_errors_on_the_way_back() -> None:
    model = Net()
    optimizer = O.AdamW(model.parameters())
    state = from_torch(optimizer, model.named_parameters()).state
    with pytest.raises(ValueError, match="into_torch: state has no 'grad_avg'"):
        into_torch(optimizer, model.named_parameters(), sgd().init({}))
    partial = {**state, "grad_avg": {name: state["grad_avg"][name] for name in ("a", "c", "scale")}}
    with pytest.raises(ValueError, match="the state has no 'grad_avg' for 'b'; it has a, c, scale"):
        into_torch(optimizer, model.named_parameters(), partial)
    with pytest.raises(ValueError, match="no hyper of AdamW is 'momentum'"):
        into_torch(optimizer, model.named_parameters(), state, {"momentum": 0.9})
    with pytest.raises(
        ValueError, match="into_torch: the state has slots for 'a', which is no parameter"
    ):
        into_torch(O.AdamW([model.b, model.c, model.scale]), model.named_parameters(), state)
    with pytest.raises(ValueError, match="into_torch: 'lr' has no value for 'b'; it has a"):
        into_torch(optimizer, model.named_parameters(), state, {"lr": {"a": 0.1}})
    with pytest.raises(ValueError, match="into_torch: parameter 0 of group 0, .*has no name"):
        into_torch(optimizer, {}, state)
    rates = {"a": 0.1, "b": 0.2, "c": 0.1, "scale": 0.1}
    with pytest.raises(ValueError, match="'lr' has several values within one group"):
        into_torch(optimizer, model.named_parameters(), state, {"lr": rates})


def test_a_group_without_parameters_keeps_its_hypers() -> None:
    model = Net()
    optimizer = O.AdamW([{"params": [*model.parameters()]}, {"params": [], "lr": 0.5}])
    state = from_torch(optimizer, model.named_parameters()).state
    rates = {name: 0.1 for name, _ in model.named_parameters()}
    there = into_torch(optimizer, model.named_parameters(), state, {"lr": rates, "wd": 0.2})
    assert [(group["lr"], group["weight_decay"]) for group in there["param_groups"]] == [
        (0.1, 0.2),
        (0.5, 0.2),
    ]


def test_counts_of_an_ordered_dict_go_back_by_name() -> None:
    model = Net()
    optimizer = O.Adam(model.parameters())
    named = dict(model.named_parameters())
    params = OrderedDict((name, named[name].detach()) for name in ("scale", "c", "b", "a"))
    state = {**adam().init(params), "step": torch.tensor([1, 2, 3, 4])}
    there = into_torch(optimizer, named, state)["state"]
    counts = {name: there[number]["step"].item() for number, name in enumerate(named)}
    assert counts == {"scale": 1, "c": 2, "b": 3, "a": 4}
