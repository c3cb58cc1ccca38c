"""step_in_backward: the numbers of steps after backward, without all gradients at once."""

import subprocess
import sys
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_sgd as fs
from functional_sgd import Chain, chain, step_in_backward
from tests.catalogue import RECIPES, SEPARABLE_RECIPES
from tests.comparing import assert_same


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2)).to(dtype)


def batch(seed: int) -> Tensor:
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(seed))


def ordinary(opt: Any, model: nn.Module, seeds: range, state: Any = None, **hyper: Any) -> Any:
    """Steps after backward; the state."""
    named = dict(model.named_parameters())
    state = (
        opt.init({name: leaf.detach() for name, leaf in named.items()}) if state is None else state
    )
    for seed in seeds:
        model.zero_grad()
        model(batch(seed)).square().sum().backward()
        before = {name: leaf.detach() for name, leaf in named.items()}
        after, state = opt(before, {n: leaf.grad for n, leaf in named.items()}, state, hyper)
        with torch.no_grad():
            for name, leaf in named.items():
                leaf.copy_(after[name])
    model.zero_grad()
    return state


def in_backward(running: Any, model: nn.Module, seeds: range) -> None:
    for seed in seeds:
        model(batch(seed)).square().sum().backward()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: leaf.detach().clone() for name, leaf in model.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "sgd_nesterov_wd", "lamb", "muon", "lion", "adafactor"])
def test_numbers_are_those_of_steps_after_backward(name: str) -> None:
    opt = RECIPES[name]()
    one, other = network(), network()
    state = ordinary(fs.fuse(opt), one, range(5))
    running = step_in_backward(opt, dict(other.named_parameters()))
    in_backward(running, other, range(5))
    assert_same(values(other), values(one))
    assert_same(running.state, state)


def test_every_recipe_whose_leaves_do_not_matter_to_each_other_can() -> None:
    for name in SEPARABLE_RECIPES:
        step_in_backward(RECIPES[name](), dict(network().named_parameters())).remove()


def test_a_run_goes_on_either_way() -> None:
    """Three steps after backward, three within, and three after it again."""
    opt, one, other = fs.adamw(lr=0.05), network(), network()
    expected = ordinary(opt, one, range(9))
    state = ordinary(opt, other, range(3))
    running = step_in_backward(opt, dict(other.named_parameters()))
    running.state = state
    in_backward(running, other, range(3, 6))
    running.remove()
    state = ordinary(opt, other, range(6, 9), running.state)
    torch.testing.assert_close(values(other), values(one))
    torch.testing.assert_close(state, expected)


def test_hypers_may_change_and_differ_by_parameter() -> None:
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(1)) for name in "ab"})
    running = step_in_backward(fs.sgd(), dict(model.named_parameters()), lr=0.5)
    (model["a"] + 2 * model["b"]).sum().backward()
    assert [leaf.item() for leaf in model.values()] == [0.5, 0.0]
    running.hyper["lr"] = {"a": 0.0, "b": 1.0}
    (model["a"] + 2 * model["b"]).sum().backward()
    assert [leaf.item() for leaf in model.values()] == [0.5, -2.0]


def test_a_parameter_without_a_gradient_takes_no_step() -> None:
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(1)) for name in "ab"})
    running = step_in_backward(fs.adamw(lr=0.5), dict(model.named_parameters()))
    model["a"].sum().backward()
    assert running.state["step"].tolist() == [1, 0]
    assert model["b"].item() == 1.0


def test_a_shared_parameter_moves_once_its_whole_gradient_is_there() -> None:
    weight = nn.Parameter(torch.ones(1))
    step_in_backward(fs.sgd(lr=0.1), {"weight": weight})
    (weight * 2 + weight * 3).sum().backward()
    assert weight.item() == pytest.approx(0.5)


def test_half_precision_keeps_slots_in_float32() -> None:
    model = network(torch.bfloat16)
    running = step_in_backward(fs.adamw(lr=0.1), dict(model.named_parameters()))
    model(batch(0).bfloat16()).square().sum().backward()
    assert {leaf.dtype for leaf in running.state["grad_avg"].values()} == {torch.float32}
    assert {leaf.dtype for leaf in model.parameters()} == {torch.bfloat16}


def test_at_most_one_gradient_exists() -> None:
    model, seen = network(), []
    named = dict(model.named_parameters())
    for leaf in named.values():  # called before those of the steps
        leaf.register_post_accumulate_grad_hook(
            lambda _: seen.append(sum(leaf.grad is not None for leaf in named.values()))
        )
    step_in_backward(fs.adamw(), named)
    model(batch(0)).square().sum().backward()
    assert seen == [1] * len(named)
    assert all(leaf.grad is None for leaf in named.values())


MEMORY = """
import ctypes
import sys
from pathlib import Path
import torch
import functional_sgd as fs

M_MMAP_THRESHOLD = -3
if hasattr(ctypes.CDLL(None), "mallopt"):  # of glibc: what is freed from here on is given back
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
torch.set_num_threads(1)
model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(16)))
named = dict(model.named_parameters())
x = torch.randn(1, 1024)
running, after = None, fs.to_torch(fs.sgd(lr=1e-6), named.items())
if sys.argv[1] == "within":
    running = fs.step_in_backward(fs.sgd(lr=1e-6), named)
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def step():
    model(x).sum().backward()
    if running is None:
        after.step()
        after.zero_grad()


step()  # compiles
Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is
start = resident("VmRSS")
for _ in range(3):
    step()
print((resident("VmHWM") - start) / 2**10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_gradients() -> None:
    """16 matrices of 4 MiB: 64 MiB of gradients after backward, a few of them within."""
    peaks = {}
    for way in ("after", "within"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, way],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        peaks[way] = float(done.stdout)
    assert peaks["after"] >= 60
    assert peaks["within"] <= 30


@pytest.mark.parametrize(
    ("opt", "text"),
    [
        (chain(fs.clip_norm, fs.sgd(lr=0.1)), "clip_norm needs all gradients together"),
        (fs.prodigy(), "needs all gradients together"),
        (fs.adahessian(), "reads 'hessian' at every step"),
        (fs.noisy_sgd(), "of the whole tree"),
        (chain(fs.sgd_step), "reads 'lr' at every step"),
    ],
    ids=["norm", "distance", "column", "random", "no lr"],
)
def test_what_cannot(opt: Chain, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        step_in_backward(opt, dict(network().named_parameters()))


def test_wrappers_are_refused() -> None:
    with pytest.raises(TypeError, match="expected a chain"):
        step_in_backward(fs.accumulate(fs.sgd(lr=0.1), every=2), dict(network().named_parameters()))


def test_parameters_that_are_not_tracked_are_refused() -> None:
    with pytest.raises(ValueError, match="'w' must be a leaf"):
        step_in_backward(fs.sgd(lr=0.1), {"w": torch.ones(1)})


def two_ones() -> dict[str, Any]:
    """Not in the order of their names."""
    return {name: nn.Parameter(torch.ones(1)) for name in ("w", "b")}


def test_step_counts_are_in_the_order_of_the_leaves_of_a_tree() -> None:
    params = two_ones()
    running = step_in_backward(fs.adamw(), params)
    params["w"].sum().backward()
    assert running.state["step"].tolist() == [0, 1]  # b, w


def test_step_counts_are_taken_over_in_the_order_of_the_leaves_of_a_tree() -> None:
    params, opt = two_ones(), fs.adamw()
    running = step_in_backward(opt, params)
    running.state = {**opt.init(params), "step": torch.tensor([0, 5])}
    params["b"].sum().backward()
    assert running.state["step"].tolist() == [1, 5]


def test_a_hyper_that_no_rule_reads_is_an_error() -> None:
    with pytest.raises(ValueError, match="step_in_backward: no rule reads 'lrr'"):
        step_in_backward(fs.adamw(), two_ones(), lrr=0.1)


def test_a_hyper_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match="step_in_backward: hyper 'mom' must be in"):
        step_in_backward(fs.adamw(), two_ones(), mom={"w": 0.9, "b": 1.5})


def test_a_hyper_without_a_value_for_a_parameter_is_an_error() -> None:
    with pytest.raises(ValueError, match="'lr' has no value for 'b', only for w. Give one number"):
        step_in_backward(fs.adamw(), two_ones(), lr={"w": 0.1})


@pytest.mark.parametrize("wrong", [{"lr": {"w": 0.1}}, {"lrr": 0.1}])
def test_the_gradient_of_a_step_that_failed_stays(wrong: dict[str, Any]) -> None:
    params = two_ones()
    running = step_in_backward(fs.sgd(lr=0.1), params)
    running.hyper.update(wrong)
    with pytest.raises(ValueError, match="'lr"):
        (2 * params["b"]).sum().backward()
    assert_same(params["b"].grad, torch.tensor([2.0]))


def test_counts_of_an_ordered_dict_go_to_the_parameters_of_their_names() -> None:
    params, opt = two_ones(), fs.adamw()
    running = step_in_backward(opt, params)
    running.state = {**opt.init(OrderedDict(params)), "step": torch.tensor([3, 5])}  # w, b
    assert running.state["step"].tolist() == [5, 3]  # b, w


def test_the_state_of_a_whole_run_does_for_some_of_its_parameters() -> None:
    params, opt = two_ones(), fs.adamw()
    running = step_in_backward(opt, {"w": params["w"]})
    running.state = {**opt.init(params), "step": torch.tensor([4, 3])}  # b, w
    assert running.state["step"].tolist() == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_avg": {"b": torch.ones(1), "v": torch.ones(1)}}, "a tensor for 'w', got only b, v"),
        ({"grad_avg": torch.ones(1)}, "must have a tensor for 'b'"),
        ({"sqr_avg": {"b": torch.ones(2), "w": torch.ones(1)}}, "of 'b' .* shape .1,., got .2,."),
        ({"step": torch.tensor([1])}, "one entry for each of the 2 leaves"),
        ({"velocity": {}}, "no rule keeps 'velocity'"),
    ],
    ids=["names", "no dict", "shape", "counts", "slots"],
)
def test_a_state_that_does_not_fit_changes_nothing(change: dict[str, Any], message: str) -> None:
    params, opt = two_ones(), fs.adamw()
    running = step_in_backward(opt, params)
    params["w"].sum().backward()
    with pytest.raises(ValueError, match=f"step_in_backward: .*{message}"):
        running.state = {**opt.init(params), **change}
    assert running.state["step"].tolist() == [0, 1]


def test_counts_alone_are_no_state() -> None:
    running = step_in_backward(fs.adamw(), two_ones())
    with pytest.raises(ValueError, match="step_in_backward: state has no 'grad_avg'"):
        running.state = {"step": torch.tensor([0, 0])}


def test_a_state_is_kept_in_the_dtypes_of_its_slots() -> None:
    params, opt = two_ones(), fs.adamw()
    running = step_in_backward(opt, params)
    running.state = opt.init({name: leaf.detach().double() for name, leaf in params.items()})
    assert {leaf.dtype for leaf in running.state["grad_avg"].values()} == {torch.float32}
