"""A fused optimizer in a training loop, and a whole step as one graph."""

from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import functional_sgd as fs
from functional_sgd import by_path, chain, fuse, value_and_grad
from functional_sgd.compile.step import compile_step
from functional_sgd.schedules import Linear
from loop import DataLoaders, Learner, fit, fit_one_cycle
from tests.comparing import Untouched, assert_close, assert_same, copy_of


def batches(sizes=(8, 8, 3)):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 2, generator=generator), torch.randn(n, 1, generator=generator))
        for n in sizes
    ]


def learner(opt):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    return Learner(model, DataLoaders(batches(), batches()), mse_loss, opt)


@pytest.mark.parametrize(
    "opt",
    [fs.adamw(), fs.lamb(), chain(fs.clip_norm, fs.sgd(mom=0.9))],
    ids=["adamw", "lamb", "clip"],
)
def test_training_is_the_same(opt):
    def train(opt):
        return fit(learner(opt), learner(opt).init(), 3, lr=0.05)

    found, again, expected = train(fuse(opt)), train(fuse(opt)), train(opt)
    assert_close(found.params, expected.params, atol=1e-6)
    assert_same((found.params, found.opt_state), (again.params, again.opt_state))


def test_a_learner_refuses_an_optimizer_that_would_overwrite_its_states():
    with pytest.raises(
        ValueError, match=r"donate=True\) overwrites the state .* Use fuse\(opt\) without donate"
    ):
        learner(fuse(fs.adamw(), donate=True))


def test_a_schedule_makes_no_difference():
    def train(opt):
        return fit_one_cycle(learner(opt), learner(opt).init(), 3, lr=0.05)

    assert_close(train(fuse(fs.adamw())).params, train(fs.adamw()).params, atol=1e-6)


def test_a_state_can_be_forked():
    """The state that a pure run started from can be used again."""
    one = learner(fuse(fs.adamw()))
    middle = fit(one, one.init(), 1, lr=0.05)
    keep = Untouched(middle.params, middle.opt_state)
    first, second = fit(one, middle, 2), fit(one, middle, 2)
    keep.check()
    assert_same((first.params, first.opt_state), (second.params, second.opt_state))


def loss_of(params, x, y):
    hidden = torch.tanh(x @ params["first"]["w"] + params["first"]["b"])
    return mse_loss(hidden @ params["last"], y)


def net():
    generator = torch.Generator().manual_seed(1)
    return {
        "first": {"w": torch.randn(2, 8, generator=generator), "b": torch.zeros(8)},
        "last": torch.randn(8, 1, generator=generator),
    }


@pytest.fixture
def graphs(monkeypatch, fresh_compiler):
    """A list that grows with every graph that is compiled; graphs are run as they are."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph

    monkeypatch.setattr(torch._inductor, "compile", backend)
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: real(function, backend=backend, **options)
    )
    return made


OPTS = {
    "adamw": fs.adamw(lr=0.05),
    "clipped": chain(fs.clip_norm, fs.sgd(lr=0.05, mom=0.9)),
    "lamb": fs.lamb(lr=0.05),
    "ranger": fs.ranger(lr=0.05, sync_every=2),
}


@pytest.mark.parametrize("opt", OPTS.values(), ids=OPTS)
def test_a_whole_step_is_the_gradient_and_the_update(opt, graphs):
    whole = compile_step(loss_of, opt)
    params, state = net(), opt.init(net())
    for number, batch in enumerate(batches((8, 8, 8, 8, 5))):
        hyper = dict(
            lr=0.05 / (1 + number), **({"mom": 0.9 - 0.1 * number} if "mom" in opt.hyper else {})
        )
        value, grads = value_and_grad(loss_of)(params, *batch)
        expected = opt(params, grads, state, hyper)
        keep = Untouched(params, state)
        found, params, state = whole(params, state, hyper, *batch)
        keep.check()
        assert_close(found, value, rtol=1e-5)
        assert_close((params, state), expected, rtol=1e-4, atol=1e-6)
        assert not found.requires_grad
        if number == 3:
            assert len(graphs) == 1, "other values of hypers compile nothing again"
    assert len(graphs) <= 2


def test_batches_of_many_sizes_share_a_graph(graphs):
    opt = fs.sgd(lr=0.1)
    whole, params, state = compile_step(loss_of, opt), net(), fs.sgd().init(net())
    for batch in batches((8, 5, 7, 8, 3, 11, 2)):
        expected = opt(params, value_and_grad(loss_of)(params, *batch)[1], state)
        _, params, state = whole(params, state, None, *batch)
        assert_close((params, state), expected, rtol=1e-4, atol=1e-6)
    assert len(graphs) <= 3


WRAPPED = {
    "fused": fuse(fs.adamw(lr=0.05), donate=True),
    "partition": fuse(
        fs.partition({"a": fs.adamw(lr=0.05), "b": fs.sgd(lr=0.1)}, {"first*": "a", "*": "b"})
    ),
    "scheduled": fs.scheduled(fs.sgd(), steps=4, lr=Linear(0.1, 0.0)),
    "lookahead": fs.lookahead(fs.sgd(lr=0.1), sync_every=2),
    "accumulate": fs.accumulate(fs.sgd(lr=0.1), 2),
    "skip_nonfinite": fs.skip_nonfinite(fs.sgd(lr=0.1)),
    "average_params": fs.average_params(fs.sgd(lr=0.1)),
    "schedule_free": fs.schedule_free(fs.sgd(lr=0.1)),
}


@pytest.mark.parametrize("opt", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_and_fused_optimizers_are_part_of_the_graph(opt, graphs):
    whole, params, state = compile_step(loss_of, opt), net(), opt.init(net())
    for batch in batches((8, 8, 8)):
        grads = value_and_grad(loss_of)(params, *batch)[1]
        expected = copy_of(opt(copy_of(params), grads, copy_of(state)))
        keep = Untouched(params, state)
        _, params, state = whole(params, state, None, *batch)
        keep.check()
        assert_close((params, state), expected, rtol=1e-4, atol=1e-6)
    assert len(graphs) == 1


def test_a_loss_that_branches_on_values_cannot_be_compiled():
    def loss(params, x):
        return params["w"].sum() if x.sum() > 0 else params["w"].prod()

    step, params = compile_step(loss, fs.sgd(lr=0.1)), {"w": torch.ones(2)}
    with pytest.raises(Exception, match=".*") as found:
        step(params, fs.sgd().init(params), None, torch.ones(3))
    assert "compile_step: this step could not be compiled" in "".join(found.value.__notes__)


def test_aux_and_hypers_by_leaf(graphs):
    def loss_and_pred(params, x, y):
        return loss_of(params, x, y), {"mean": x.mean(), "twice": 2 * y}

    opt, params = fs.adamw(), net()
    hyper = dict(lr=by_path(params, {"last": 0.1, "*": 0.01}))
    batch = batches((8,))[0]
    (value, aux), params_after, _ = compile_step(loss_and_pred, opt, has_aux=True)(
        params, opt.init(params), hyper, *batch
    )
    expected, grads = value_and_grad(loss_of)(params, *batch)
    assert_close(value, expected, rtol=1e-5)
    assert_close(aux, {"mean": batch[0].mean(), "twice": 2 * batch[1]}, rtol=1e-6)
    assert_close(params_after, opt(params, grads, opt.init(params), hyper)[0], rtol=1e-4, atol=1e-6)


def test_a_whole_step_wants_an_optimizer():
    for wrong in (fs.adamw, None, torch.optim.AdamW):
        with pytest.raises(TypeError, match="expected an optimizer"):
            compile_step(loss_of, wrong)
    with pytest.raises(TypeError, match="works in place"):
        compile_step(loss_of, fs.accumulate(fs.torch_optimizer(torch.optim.NAdam), 2))


def test_one_real_compilation(fresh_compiler):
    opt, params = fs.sgd(lr=0.1, mom=0.9), net()
    state, batch = opt.init(params), batches((8,))[0]
    expected = opt(params, value_and_grad(loss_of)(params, *batch)[1], state)
    _, *found = compile_step(loss_of, opt)(copy_of(params), state, None, *batch)
    assert_close(tuple(found), expected, rtol=1e-4, atol=1e-6)


def test_numbers_in_a_batch_are_told_apart_by_their_type(graphs):
    def loss(params, x, number):
        return (params["w"] * x).sum() * (5 if isinstance(number, float) else 4)

    opt, params, x = fs.sgd(lr=0.1), {"w": torch.ones(2)}, torch.ones(2)
    step = compile_step(loss, opt)
    found = [step(params, opt.init(params), None, x, number)[0].item() for number in (1, 1.0, True)]
    assert found == [8.0, 10.0, 8.0]


def test_many_graphs_of_one_step_warn(graphs):
    opt, params = fs.sgd(lr=0.1), {"w": torch.ones(2)}
    step = compile_step(lambda params, x, number: (params["w"] * x).sum() * number, opt)

    def call(number):
        step(params, opt.init(params), None, torch.ones(2), number)

    for number in range(8):
        call(number)
    with pytest.warns(UserWarning, match=r"other arguments that are no tensors, \[8\] now"):
        call(8)
    call(9)  # a second warning would be an error


def test_a_hyper_of_none_is_refused_as_everywhere(graphs):
    opt, params = fs.sgd(lr=0.1), {"w": torch.ones(2)}
    step = compile_step(lambda params: params["w"].sum(), opt)
    with pytest.raises(ValueError, match="'lr' must be a number") as found:
        step(params, opt.init(params), dict(lr=None))
    with pytest.raises(ValueError) as plain:  # noqa: PT011, compared below
        opt(params, params, opt.init(params), dict(lr=None))
    assert str(found.value) == str(plain.value)


def test_one_rate_for_all_parts_of_a_partition_wins_in_a_compiled_step():
    opt = fs.partition({"a": fs.sgd(lr=1.0), "b": fs.sgd(lr=0.1)}, {"w": "a", "*": "b"})
    params = {"w": torch.full((1,), 5.0), "v": torch.full((1,), 5.0)}
    step = compile_step(lambda params: params["w"].sum() + params["v"].sum(), opt)
    _, moved, _ = step(params, opt.init(params), dict(lr=0.5))
    assert (moved["w"].item(), moved["v"].item()) == (4.5, 4.5)


ODD = {
    "UserDict": (UserDict(x=torch.ones(2)), r"a dict of tensors, dict\(batch\) of a UserDict"),
    "SimpleNamespace": (SimpleNamespace(x=torch.ones(2)), "Give a dict of tensors, or register"),
    "ndarray": (np.ones(2), r"Give numbers as tensors, torch\.from_numpy\(array\)"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_object_in_a_batch_that_may_change_is_refused(name, graphs):
    batch, cure = ODD[name]
    params, opt = {"w": torch.ones(2)}, fs.sgd(lr=0.1)
    step = compile_step(lambda params, batch: params["w"].sum(), opt)
    with pytest.raises(TypeError, match=f"compile_step: expected tensors, .* got {name}, .*{cure}"):
        step(params, opt.init(params), None, {"data": batch})
    assert not graphs


def test_plain_values_in_a_batch_are_constants(graphs):
    values = [None, True, 2, 1.5, "text", b"bytes", torch.float32, torch.device("cpu"), max, dict]
    params, opt = {"w": torch.ones(2)}, fs.sgd(lr=0.1)
    step = compile_step(lambda params, batch: params["w"].sum() * batch[2], opt)
    value, *_ = step(params, opt.init(params), None, values)
    step(params, opt.init(params), None, list(values))
    assert value == 4.0
    assert len(graphs) == 1


def test_another_number_of_numpy_as_a_hyper_compiles_nothing_again(graphs):
    params, opt = {"w": torch.ones(2)}, fs.sgd()
    step = compile_step(lambda params: params["w"].sum(), opt)
    for lr in (0.5, 0.25):
        _, found, _ = step(params, opt.init(params), {"lr": np.float64(lr)})
        assert_close(found, {"w": torch.full((2,), 1 - lr)})
    assert len(graphs) == 1
