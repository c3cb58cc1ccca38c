"""to_torch: what is kept of a parameter is where torch.optim has it: in optimizer.state[param]."""

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as dcp

import functional_sgd as fs
from functional_sgd import adamw, chain, clip_norm, sgd, to_torch
from functional_sgd.bridge.slots import layout_of
from tests.catalogue import OPTIMIZERS, small_tree
from tests.comparing import assert_same
from tests.functional_sgd.bridge.helpers import batch, network, train, values_of


def partly(model: nn.Module) -> Any:
    """A clipped AdamW for the matrices, its average kept, and momentum for the first bias."""
    parts = {"matrices": fs.average_params(adamw(lr=0.1)), "bias": sgd(lr=0.1, mom=0.9)}
    opt = fs.partition(parts, {"*.weight": "matrices", "0.bias": "bias", "*": None})
    return to_torch(opt, model.named_parameters())


MAKERS: dict[str, Any] = {
    "adamw": lambda model: to_torch(adamw(lr=0.1), model.parameters()),
    "clipped": lambda model: to_torch(chain(clip_norm, adamw(lr=0.1)), model.named_parameters()),
    "donating": lambda model: to_torch(fs.fuse(adamw(lr=0.1), donate=True), model.parameters()),
    "averaged": lambda model: to_torch(fs.average_params(adamw(lr=0.1)), model.parameters()),
    "of parts": partly,
    "of torch": lambda model: to_torch(fs.torch_optimizer(torch.optim.NAdam), model.parameters()),
    "without slots": lambda model: to_torch(sgd(lr=0.1), model.parameters()),
}


def test_the_slots_of_a_parameter_have_their_names() -> None:
    model = network()
    optimizer = to_torch(adamw(), model.parameters())
    train(model, optimizer, 2)
    own = optimizer.state[model[2].weight]
    assert set(own) == {"step", "grad_avg", "sqr_avg"}
    assert own["step"] == 2
    assert_same(own["grad_avg"], optimizer.opt_state["grad_avg"]["2"])


def test_parts_and_wrappers_have_the_slots_of_what_is_inside() -> None:
    model = network()
    optimizer = partly(model)
    train(model, optimizer, 1)
    kept = {name: set(optimizer.state[param]) for name, param in model.named_parameters()}
    assert kept["2.bias"] == {"calls"}
    assert kept["0.bias"] == {"calls", "step", "velocity"}
    averaged = {"calls", "parts.matrices.calls", "average", "weight"}
    assert kept["0.weight"] == averaged | {"step", "grad_avg", "sqr_avg"}


def test_writing_to_a_slot_counts_in_the_next_step() -> None:
    """In place, by assignment, or of the whole parameter."""
    models = [network() for _ in range(4)]
    optimizers = [to_torch(sgd(lr=0.1, mom=0.9), model.parameters()) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 2)
    owns = [o.state[m[0].weight] for o, m in zip(optimizers, models, strict=True)]
    owns[0]["velocity"].zero_()
    owns[1]["velocity"] = torch.zeros(4, 3)
    optimizers[2].state[models[2][0].weight] = {"velocity": torch.zeros(4, 3)}
    pairs = zip(models, optimizers, strict=True)
    first, second, third, other = (train(model, opt, 1, start=2) for model, opt in pairs)
    assert_same(first, second)
    assert_same(first, third)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_what_is_kept_follows_the_steps() -> None:
    """Also what was looked up before them, and before the first one."""
    model = network()
    optimizer = to_torch(adamw(), model.parameters())
    own = optimizer.state[model[0].weight]
    assert own["step"] == 0
    assert not own["grad_avg"].any()
    train(model, optimizer, 3)
    assert own["step"] == 3
    assert own["grad_avg"].all()


def test_a_model_may_be_converted_before_the_first_step() -> None:
    model = network()
    optimizer = to_torch(adamw(), model.parameters())
    assert optimizer.state[model[0].weight]["grad_avg"].dtype == torch.float64
    model.float()
    assert optimizer.opt_state["grad_avg"]["0"].dtype == torch.float32


def test_slots_are_neither_added_nor_taken_away() -> None:
    model = network()
    optimizer = to_torch(adamw(), model.parameters())
    with pytest.raises(ValueError, match="'exp_avg' of '0' is not kept here; there are 'step'"):
        optimizer.state[model[0].weight]["exp_avg"] = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"has the shape \(2,\), expected \(4, 3\)"):
        optimizer.state[model[0].weight]["grad_avg"] = torch.zeros(2)
    with pytest.raises(TypeError, match="cannot be taken away"):
        optimizer.state.clear()
    with pytest.raises(KeyError, match="no parameter of this optimizer"):
        optimizer.state[torch.ones(1)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_everything_in_a_state_is_found_once_and_under_one_name(name: str) -> None:
    opt, params = OPTIMIZERS[name](), small_tree()
    state = opt.init(params)
    found: dict[int, set[Any]] = {}
    for own in layout_of(opt, state, params).values():
        for place in own.values():
            value: Any = state
            for key in place.keys:
                value = value[key]
            found.setdefault(id(value), set()).add(place.entry)
    leaves = optree.tree_leaves(state)
    every = {id(leaf): leaf for leaf in leaves if leaf.numel()}
    assert found.keys() == every.keys()
    for number, entries in found.items():
        if entries != {None}:
            assert entries == set(range(len(every[number])))


@pytest.mark.parametrize("name", MAKERS)
def test_distributed_checkpoint_goes_on_as_if_never_stopped(name: str) -> None:
    """Its state dicts by parameter names, through a file, into a fresh model and optimizer."""
    model = network()
    optimizer = MAKERS[name](model)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save(dcp.get_state_dict(model, optimizer), file)
    expected = train(model, optimizer, 3, start=3)
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    other = network(seed=1)
    resumed = MAKERS[name](other)
    dcp.set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=saved)
    assert_same(train(other, resumed, 3, start=3), expected)


@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoint_by_parameter_names(flat: bool) -> None:
    model = network()
    optimizer = to_torch(adamw(lr=0.1), model.parameters())
    train(model, optimizer, 2)
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    saved: Any = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    found = saved["state.0.bias.grad_avg"] if flat else saved["state"]["0.bias"]["grad_avg"]
    assert_same(found, optimizer.state[model[0].bias]["grad_avg"])
    saved = copy.deepcopy(saved)
    expected = train(model, optimizer, 1)
    other = network()
    train(other, to_torch(adamw(lr=0.1), other.parameters()), 2)
    fresh = to_torch(adamw(lr=0.5), other.parameters())
    dcp.set_optimizer_state_dict(other, fresh, saved, options=options)
    assert_same(train(other, fresh, 1), expected)


def test_distributed_checkpoint_reads_a_folder_into_a_fresh_optimizer(tmp_path: Path) -> None:
    """It writes into the slots that it has asked for."""
    model, other = network(), network(seed=1)
    optimizer, fresh = (to_torch(adamw(), m.named_parameters()) for m in (model, other))
    train(model, optimizer, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one process
        saved: Any = dcp.get_optimizer_state_dict(model, optimizer)
        checkpoint.save({"optim": saved}, checkpoint_id=tmp_path)
        found: Any = {"optim": dcp.get_optimizer_state_dict(other, fresh)}
        checkpoint.load(found, checkpoint_id=tmp_path)
    dcp.set_optimizer_state_dict(other, fresh, found["optim"])
    assert_same(fresh.opt_state, optimizer.opt_state)


def test_distributed_checkpoint_takes_no_step_to_find_the_slots() -> None:
    """As it does with optimizers that are empty at first: a decay by a schedule would move."""
    model = network()
    optimizer = to_torch(fs.scheduled(adamw(wd=0.5), lr=lambda step: 0.1), model.parameters())
    start = values_of(model)
    saved: Any = dcp.get_optimizer_state_dict(model, optimizer)
    assert_same(values_of(model), start)
    assert saved["state"]["0.weight"]["step"] == 0


def test_half_precision_slots_stay_float32_when_they_are_loaded() -> None:
    """torch would round what it loads to the dtype of the parameter."""
    model = network().bfloat16()
    optimizer = to_torch(adamw(), model.parameters())
    for param in model.parameters():
        param.grad = torch.full_like(param, 0.1)
    optimizer.step()
    other = to_torch(adamw(), model.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(other.opt_state, optimizer.opt_state)
    assert other.state[model[0].weight]["grad_avg"].dtype == torch.float32


def test_a_parameter_of_which_nothing_was_saved_begins_afresh() -> None:
    model = network()
    optimizer = to_torch(adamw(), model.parameters())
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][1]
    optimizer.load_state_dict(saved)
    assert optimizer.opt_state["step"].tolist() == [2, 0, 2, 2]


def test_a_state_dict_of_an_earlier_version_is_an_error() -> None:
    optimizer = to_torch(adamw(), network().parameters())
    old = {**optimizer.state_dict(), "state": {"functional_sgd": optimizer.opt_state}}
    with pytest.raises(ValueError, match=r"got 'functional_sgd'\. Was it saved by an earlier"):
        optimizer.load_state_dict(old)


def test_hooks_see_what_is_loaded() -> None:
    model = network()
    optimizer = to_torch(adamw(), model.parameters())
    train(model, optimizer, 2)
    saved, seen = copy.deepcopy(optimizer.state_dict()), []
    fresh = to_torch(adamw(), model.parameters())
    fresh.register_load_state_dict_pre_hook(lambda o, given: seen.append(given["state"][0]["step"]))
    fresh.register_load_state_dict_post_hook(lambda o: seen.append(o.opt_state["step"][0]))
    fresh.load_state_dict(saved)
    assert [int(step) for step in seen] == [2, 2]


def test_another_state_may_be_put_in_its_place() -> None:
    """optimizer.state = {} begins afresh, as it does in torch.optim."""
    model = network()
    optimizer = to_torch(adamw(), model.parameters())
    train(model, optimizer, 2)
    optimizer.state = {}
    model(batch(0)).sum().backward()
    optimizer.step()
    assert optimizer.opt_state["step"].tolist() == [1] * 4


def test_a_loaded_state_goes_with_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was loaded before the model was converted is converted too."""
    model = network()
    optimizer = to_torch(adamw(), model.parameters())
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does in its constructor
    model.float()
    x: Tensor = batch(0).float()
    model(x).sum().backward()
    optimizer.step()
    assert optimizer.opt_state["grad_avg"]["0"].dtype == torch.float32


@pytest.mark.parametrize("name", ["adamw", "clipped", "averaged", "of parts", "without slots"])
def test_a_state_that_is_assigned_goes_on(name: str) -> None:
    """That of another optimizer with the same parameters, which does not notice."""
    whole, model = network(), network()
    first, second = MAKERS[name](whole), MAKERS[name](model)
    train(whole, first, 3)
    model.load_state_dict(whole.state_dict())
    second.opt_state = first.opt_state
    kept = copy.deepcopy(first.opt_state)
    ours = train(model, second, 3, start=3)
    assert_same(first.opt_state, kept)
    assert_same(train(whole, first, 3, start=3), ours)


def test_a_run_of_torch_goes_on_behind_to_torch() -> None:
    whole, model = network(), network()
    theirs = torch.optim.AdamW(whole.parameters(), lr=0.1, weight_decay=0.3)
    train(whole, theirs, 3)
    model.load_state_dict(whole.state_dict())
    opt, _, state, hyper = fs.from_torch(theirs, whole.named_parameters())
    optimizer = to_torch(opt, model.named_parameters(), **hyper)
    optimizer.opt_state = state
    ours = train(model, optimizer, 3, start=3)
    torch.testing.assert_close(train(whole, theirs, 3, start=3), ours, rtol=1e-12, atol=1e-14)


def test_a_state_of_another_optimizer_or_of_other_names_is_not_taken() -> None:
    model = network()
    train(model, given := to_torch(adamw(), model.named_parameters()), 1)
    kept = copy.deepcopy(given.opt_state)
    others = sgd(mom=0.9).init(values_of(model)), adamw().init(list(model.parameters())), None
    for other in others:
        with pytest.raises(ValueError, match="to_torch: the state does not fit. .*named_param"):
            given.opt_state = other  # type: ignore[assignment]
    assert_same(given.opt_state, kept)


def of_two(opt: Any) -> Any:
    """After a step of "w" alone, along 1."""
    params = {name: nn.Parameter(torch.zeros(1)) for name in ("w", "b")}
    optimizer = to_torch(opt, params.items())
    params["w"].sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return optimizer, params


AROUND: dict[str, Any] = {
    "rules after a wrapper": fs.lookahead(fs.average_params(sgd(lr=1.0, mom=0.5))),
    "rules in front of one": chain(clip_norm, fs.average_params(sgd(lr=1.0, mom=0.5))),
    "rules in front of parts": chain(clip_norm, fs.partition({"a": sgd(lr=1.0, mom=0.5)}, "a")),
    "sam": fs.sam(fs.partition({"a": sgd(lr=1.0, mom=0.5)}, "a")),
}


@pytest.mark.parametrize("name", AROUND)
def test_every_parameter_has_its_own_slots(name: str) -> None:
    opt = AROUND[name]
    params = {name: torch.zeros(1) for name in ("w", "b")}
    own = layout_of(opt, opt.init(params), params)["w"]
    assert own["velocity"].keys[-1] == "w"
    assert not any("b" in place.keys for place in own.values())


def test_of_rules_around_a_wrapper_a_parameter_has_what_was_kept_of_it() -> None:
    """Of SGD with momentum 0.5, after one gradient of 1 by w."""
    optimizer, params = of_two(fs.lookahead(fs.average_params(sgd(lr=1.0, mom=0.5))))
    assert [optimizer.state[params[name]]["velocity"].item() for name in "wb"] == [1.0, 0.0]
    assert [optimizer.state[params[name]]["inner.inner.step"].item() for name in "wb"] == [1, 0]


def test_of_rules_around_a_wrapper_a_parameter_of_which_nothing_was_saved_begins_afresh() -> None:
    optimizer, params = of_two(fs.lookahead(fs.average_params(sgd(lr=1.0, mom=0.5))))
    saved = optimizer.state_dict()
    del saved["state"][0]
    optimizer.load_state_dict(saved)
    assert optimizer.state[params["w"]]["velocity"].item() == 0.0


def test_a_vector_of_the_whole_tree_may_have_as_many_entries_as_there_are_parameters() -> None:
    names = ("f", "e", "d", "c", "b", "a")
    params = {name: nn.Parameter(torch.ones(2)) for name in names}
    opt = fs.mechanize(sgd(lr=1.0))
    optimizer = to_torch(opt, params.items())
    for param in params.values():
        param.square().sum().backward()
    optimizer.step()
    state = optimizer.opt_state
    again = to_torch(opt, params.items())
    again.load_state_dict(optimizer.state_dict())
    assert_same(again.opt_state, state)
    for param in params.values():
        assert_same(optimizer.state[param]["rate"], state["rate"])
