"""torch_optimizer: classes of torch.optim as optimizers of ours, with torch's numbers and pure
calls.
"""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_sgd as fs
from functional_sgd import Optimizer, accumulate, adamw, by_path, fuse, partition, torch_optimizer
from loop import DataLoaders, Learner, State, fit, load, save
from tests.catalogue import random_like, sample_tree
from tests.comparing import Untouched, assert_close, assert_same, copy_of

O = torch.optim  # noqa: E741
Steps = list[dict[str, Tensor | None]]

CLASSES: dict[str, Any] = {
    "nadam": (O.NAdam, dict(lr=0.01, weight_decay=0.1)),
    "adagrad": (O.Adagrad, dict(lr=0.1, initial_accumulator_value=0.5, lr_decay=0.1)),
    "rprop": (O.Rprop, dict(lr=0.01)),
    "rmsprop": (O.RMSprop, dict(lr=0.01, momentum=0.9, centered=True)),
    "sgd": (O.SGD, dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)),
    "sgd plain": (O.SGD, dict(lr=0.1)),
    "adam": (O.Adam, dict(amsgrad=True, maximize=True)),
    "adamw": (O.AdamW, dict(foreach=True)),
    "adamax": (O.Adamax, {}),
    "adadelta": (O.Adadelta, {}),
    "adafactor": (O.Adafactor, {}),
    "asgd": (O.ASGD, {}),
    "radam": (O.RAdam, {}),
}


@pytest.fixture(params=CLASSES)
def made(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    kind, options = CLASSES[request.param]
    return kind, options


def leaves(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    tree = sample_tree(dtype=dtype)
    return {
        "matrix": tree["body"][0],
        "conv": tree["conv"],
        "scalar": tree["ends"][0],
        "vector": tree["ends"][1],
    }


def gradients(steps: int, dtype: torch.dtype = torch.float64) -> Steps:
    """Of each leaf for each step; the vector has none in the steps 0, 1 and 5."""
    found: Steps = [dict(random_like(leaves(dtype), seed)) for seed in range(steps)]
    for number in {0, 1, 5} & {*range(steps)}:
        found[number]["vector"] = None
    return found


def theirs(
    kind: Any, options: dict[str, Any], steps: Steps, groups: Any = None
) -> dict[str, Tensor]:
    """Params after steps of torch; `groups` are options for each leaf."""
    params = {name: nn.Parameter(leaf) for name, leaf in leaves().items()}
    own = [{"params": [param], **(groups or {}).get(name, {})} for name, param in params.items()]
    optimizer = kind(own, **options)
    for grads in steps:
        for name, param in params.items():
            param.grad = None if grads[name] is None else grads[name].clone()
        optimizer.step()
    return {name: param.detach() for name, param in params.items()}


def ours(opt: Optimizer, steps: Steps, hyper: Any = None, start: Any = None) -> tuple[Any, Any]:
    params, state = start or (leaves(), opt.init(leaves()))
    for grads in steps:
        params, state = opt(params, grads, state, hyper)
    return params, state


def test_twenty_steps_are_those_of_torch(made: Any) -> None:
    """Bit for bit, also where a leaf begins later than the others."""
    steps = gradients(20)
    assert_same(ours(torch_optimizer(made[0], **made[1]), steps)[0], theirs(*made, steps))


def test_a_copied_state_goes_on_as_if_never_stopped(made: Any) -> None:
    """In a fresh optimizer, from other memory; and the first half can be left twice."""
    steps = gradients(20)
    half = ours(torch_optimizer(made[0], **made[1]), steps[:9])
    copied = copy_of(half)
    expected = ours(torch_optimizer(made[0], **made[1]), steps)
    for start in (half, copied, half):
        assert_same(ours(torch_optimizer(made[0], **made[1]), steps[9:], start=start), expected)


def test_arguments_are_untouched_and_the_structure_stays(made: Any) -> None:
    opt, params = torch_optimizer(made[0], **made[1]), leaves()
    state = opt.init(params)
    for grads in gradients(3):
        snapshot = Untouched(params, grads, state)
        params, after = opt(params, grads, state)
        snapshot.check()
        assert_close(after, state, atol=float("inf"))
        state = after


def test_a_leaf_without_gradient_is_left_alone() -> None:
    opt = torch_optimizer(O.NAdam)
    params, state = ours(opt, gradients(3))
    after, new = opt(params, dict.fromkeys(params), state)
    assert all(after[name] is params[name] for name in params)
    assert_same(new, {**state, "calls": state["calls"] + 1})


def test_its_numbers_are_hypers_by_our_names() -> None:
    assert torch_optimizer(O.NAdam, lr=0.1, betas=(0.8, 0.99)).hyper == {
        "lr": 0.1, "mom": 0.8, "sqr_mom": 0.99, "eps": 1e-8, "wd": 0, "momentum_decay": 4e-3
    }  # fmt: skip
    assert torch_optimizer(O.SGD, lr=0.1, momentum=0.9).hyper == {
        "lr": 0.1,
        "mom": 0.9,
        "dampening": 0,
        "wd": 0,
    }


@pytest.mark.parametrize(
    "value", [0.7, torch.tensor(0.7, dtype=torch.float64)], ids=["number", "tensor"]
)
def test_hypers_may_change_at_every_call(value: Any) -> None:
    opt, steps = torch_optimizer(O.NAdam, betas=(0.9, 0.95)), gradients(4)
    expected = theirs(O.NAdam, dict(lr=0.5, betas=(0.7, 0.95)), steps)
    assert_same(ours(opt, steps, {"lr": 0.5, "mom": value})[0], expected)


def test_hypers_may_differ_by_leaf() -> None:
    steps = gradients(4)
    expected = theirs(
        O.Adagrad, {}, steps, {"conv": dict(lr=0.5, weight_decay=0.1), "vector": dict(lr=0.2)}
    )
    rates = by_path(leaves(), {"conv": 0.5, "vector": 0.2, "*": 0.01})
    decays = by_path(leaves(), {"conv": 0.1, "*": 0})
    assert_same(ours(torch_optimizer(O.Adagrad), steps, {"lr": rates, "wd": decays})[0], expected)


def test_half_precision_is_stepped_in_float32_and_rounded_once() -> None:
    opt, params = torch_optimizer(O.Adagrad, lr=0.1), leaves(torch.bfloat16)
    grads = gradients(1, torch.bfloat16)[0]
    after, state = opt(params, grads, opt.init(params))
    wide = {name: leaf.float() for name, leaf in params.items()}
    expected, _ = opt(
        wide, {n: None if g is None else g.float() for n, g in grads.items()}, opt.init(wide)
    )
    assert_same(after, {name: leaf.bfloat16() for name, leaf in expected.items()})
    assert state["kept"]["matrix"]["sum"].dtype == torch.float32


def test_complex_leaves() -> None:
    opt, params = torch_optimizer(O.SGD, lr=0.5, momentum=0.9), torch.tensor([1 + 2j])
    after, _ = opt(params, torch.tensor([2j]), opt.init(params))
    assert_same(after, torch.tensor([1 + 1j]))


def test_an_empty_tree() -> None:
    opt = torch_optimizer(O.NAdam)
    assert_same(
        opt({}, {}, opt.init({})), ({}, {"calls": torch.tensor(1), "begun": {}, "kept": {}})
    )


def test_wrappers_go_around_it_and_fuse_leaves_it() -> None:
    """Muon for matrices, AdamW for the others, every second call: each part as if it were alone."""
    matrices = torch_optimizer(O.Muon, lr=0.1)
    opt = fuse(
        accumulate(
            partition({"m": matrices, "rest": adamw(lr=0.1)}, {"matrix": "m", "*": "rest"}), every=2
        )
    )
    grads = random_like(leaves(), 0)
    after, _ = ours(opt, [grads, grads])
    alone = {"matrix": leaves()["matrix"]}
    expected, _ = matrices(alone, {"matrix": grads["matrix"]}, matrices.init(alone))
    assert_same(after["matrix"], expected["matrix"])


def learner_with(opt: Optimizer) -> Learner:
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return Learner(
        model, DataLoaders(train=[(x, 3 * x + 1), (-x, 1 - 3 * x)]), nn.functional.mse_loss, opt
    )


@pytest.mark.parametrize("name", ["nadam", "adagrad", "rprop", "rmsprop", "sgd"])
def test_a_run_of_the_loop_is_that_of_torch_also_when_saved_between(
    name: str, tmp_path: Path
) -> None:
    kind, options = CLASSES[name]
    learner = learner_with(torch_optimizer(kind, **options))
    model = copy.deepcopy(learner.model)
    optimizer = kind(model.parameters(), **options)
    for _ in range(10):
        for x, y in learner.data.train:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    half: State = fit(learner, learner.init(), 4)
    fork = load(save(half, tmp_path / "half"), like=learner.init())
    for state in (half, fork):
        after = fit(learner, state, 6)
        assert_close(
            after.params,
            {n: p.detach() for n, p in model.named_parameters()},
            rtol=1e-12,
            atol=1e-12,
        )
    assert_same(fit(learner, fork, 6).params, fit(learner, half, 6).params)


def test_it_can_be_compared_copied_and_printed() -> None:
    opt = torch_optimizer(O.NAdam, lr=0.1)
    assert (
        opt
        == torch_optimizer(O.NAdam, lr=0.1)
        == copy.deepcopy(opt)
        == pickle.loads(pickle.dumps(opt))
    )
    assert hash(opt) == hash(torch_optimizer(O.NAdam, lr=0.1))
    assert opt != torch_optimizer(O.NAdam, lr=0.2)
    assert repr(opt) == "torch_optimizer(NAdam, lr=0.1)"
    assert isinstance(opt, Optimizer)


class Counting(O.SGD):
    """Keeps a number in its groups, which no state of ours has."""

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1
        return super().step(closure)


class Listing(O.SGD):
    """Keeps a list of a parameter."""

    def step(self, closure: Any = None) -> Any:
        for param in self.param_groups[0]["params"]:
            self.state[param]["history"] = []
        return super().step(closure)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (O.LBFGS, "LBFGS computes the loss several times in a step, which needs a closure"),
        (Counting, "Counting keeps something that is not of one parameter"),
        (Listing, "Listing keeps 'history' as list; only tensors can be kept"),
        (adamw, "expected a class such as torch.optim.NAdam"),
        (adamw(), "expected a class such as torch.optim.NAdam"),
    ],
    ids=["closure", "number in a group", "list", "recipe", "chain"],
)
def test_what_cannot_be_run_is_an_error(kind: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"torch_optimizer: {message}"):
        torch_optimizer(kind).init(leaves())


def test_wrong_arguments_are_errors() -> None:
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        torch_optimizer(O.SGD, lr=-1)
    opt, params = torch_optimizer(O.NAdam), leaves()
    with pytest.raises(ValueError, match="torch_optimizer: no rule reads 'weight_decay'"):
        opt(params, params, opt.init(params), {"weight_decay": 0.1})
    with pytest.raises(ValueError, match="torch_optimizer: state has no 'calls'"):
        opt(params, params, adamw().init(params))
    with pytest.raises(ValueError, match="the gradient of 'conv' must have its shape"):
        opt(params, {**params, "conv": torch.ones(2)}, opt.init(params))


def test_hypers_that_change_what_is_kept_are_an_error() -> None:
    opt, params = torch_optimizer(O.SGD, lr=0.1), leaves()
    with pytest.raises(
        ValueError,
        match=r"keeps \['momentum_buffer'\] of a leaf, but \[\] with those it was made with",
    ):
        opt(params, params, opt.init(params), {"mom": 0.9})


def test_transforms_are_an_error() -> None:
    opt, params = torch_optimizer(O.NAdam), torch.ones(2, 3)
    state = opt.init(params[0])
    with pytest.raises(TypeError, match="cannot be compiled, mapped over or differentiated"):
        torch.func.vmap(lambda p: opt(p, p, state)[0])(params)
    with pytest.raises(TypeError, match="cannot be compiled, mapped over or differentiated"):
        torch.func.vmap(opt.init)(params)


def test_it_is_exported() -> None:
    assert fs.torch_optimizer is torch_optimizer
