"""What a step costs besides its kernels: nothing is traced or compiled, and few functions run."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import functional_sgd as fs
from functional_sgd import by_path, chain, elementwise, fuse
from functional_sgd.fusion import arithmetic, fused, symbolic
from functional_sgd.fusion.backends.c import compiler, launch
from functional_sgd.schedules import Cosine
from tests.comparing import copy_of
from tests.functional_sgd.fusion.helpers import draw

PACKAGE = str(Path(fs.__file__).parent)


@elementwise(peak=0.0)
def noisy(grad, *, peak, key, noise=0.01, top=fs.largest(lambda grad: grad.abs(), over="tree")):
    """Random numbers, and a number of the tree."""
    return dict(grad=grad + noise * fs.normal(key, grad), peak=torch.where(top > peak, top, peak))


OPTS = {
    "clip, adamw": chain(fs.clip_norm, fs.adamw()),
    "lamb": fs.lamb(),
    "ranger": fs.ranger(),
    "centralize, larc": chain(fs.centralize, fs.larc()),
    "noisy": chain(noisy, fs.sgd(mom=0.9)),
    "scheduled": fs.scheduled(fs.adamw(), steps=10, lr=Cosine(0.1, 0.001)),
    "partition": fs.partition({"a": fs.adamw(), "b": fs.lamb()}, {"first*": "a", "*": "b"}),
}

VALUES = {"wd": 0.2, "mom": 0.5, "sqr_mom": 0.6, "eps": 1e-3, "max_norm": 3.0, "trust_coeff": 0.1}


def tree(dtype):
    return {"first": draw((4, 3), dtype, 1), "second": [draw((5,), dtype, 2), draw((), dtype, 3)]}


@pytest.fixture
def sealed(monkeypatch):
    """A function after which every attempt to trace or to compile is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("something is traced or compiled at a step")

    def seal():
        monkeypatch.setattr(fused, "make_program", refuse)
        monkeypatch.setattr(symbolic, "check", refuse)
        monkeypatch.setattr(arithmetic.Graph, "run", refuse)
        monkeypatch.setattr(launch, "c_source", refuse)
        monkeypatch.setattr(compiler, "function_of", refuse)
        monkeypatch.setattr(compiler, "load", refuse)

    return seal


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("opt", OPTS.values(), ids=OPTS)
def test_nothing_is_traced_or_compiled_after_the_first_step(opt, dtype, donate, sealed):
    """Whatever hypers change to: numbers, tensors, schedules, values by leaf. And whatever trees
    come, as long as their dtypes have been seen.
    """
    one, params, grads = fuse(opt, donate=donate), tree(dtype), tree(dtype)
    params, state = one(params, grads, one.init(params))
    sealed()
    rates = [0.2, 1, torch.tensor(0.3), torch.tensor(0.1, dtype=torch.bfloat16)]
    rates += [Cosine(0.1, 0.001)(number / 10) for number in range(3)]
    rates += [by_path(params, {"first": value, "*": 0.5}) for value in (0.1, torch.tensor(0.2))]
    for rate in rates:
        params, state = one(params, grads, state, dict(lr=rate))
    for name, value in VALUES.items():
        if name in opt.hyper:
            params, state = one(params, grads, state, {name: value})
    params, state = one(params, {**grads, "first": None}, state)
    turned = {"first": draw((3, 4), dtype, 4).T, "second": [draw((7,), dtype, 5)]}
    one(turned, copy_of(turned), one.init(turned))


def passed(call):
    """The functions of functional_sgd that a call passes, but for comprehensions; how often."""
    seen = Counter()

    def note(frame, event, arg):
        code = frame.f_code
        own = code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<")
        if event == "call" and own:
            seen[code.co_qualname] += 1

    sys.setprofile(note)
    try:
        result = call()
    finally:
        sys.setprofile(None)
    return result, seen


COMPILING = 120
"""Functions of a first step: it checks its trees, groups the leaves, and compiles."""

ELSEWHERE = 76
"""Functions of a step on other trees, which are checked and grouped."""

USUAL = 60
"""Functions of every other step."""


def test_a_step_passes_few_functions(capsys):
    one = fuse(chain(fs.clip_norm, fs.adamw()))
    params = {str(number): torch.ones(10, 10) for number in range(20)}
    others = {str(number): torch.ones(7, 3) for number in range(9)}
    grads, state = {name: torch.ones(10, 10) for name in params}, one.init(params)
    (params, state), first = passed(lambda: one(params, grads, state))
    for _ in range(98):
        params, state = one(params, grads, state)
    (params, state), hundredth = passed(lambda: one(params, grads, state))
    other_state = one.init(others)
    _, elsewhere = passed(lambda: one(others, others, other_state))
    numbers = [(len(seen), seen.total()) for seen in (first, hundredth, elsewhere)]
    with capsys.disabled():
        print("\nfunctions and calls in a step of clip_norm + adamw on 20 leaves:", end=" ")
        print("first {} {}, hundredth {} {}, on other trees {} {}".format(*sum(numbers, ())))
    assert len(first) <= COMPILING
    assert len(hundredth) <= USUAL
    assert len(elsewhere) <= ELSEWHERE


def test_as_many_functions_for_many_leaves_as_for_few():
    counts = []
    for leaves in (3, 300):
        one, params = fuse(chain(fs.clip_norm, fs.adamw())), [torch.ones(3) for _ in range(leaves)]
        state, grads = one.init(params), [torch.ones(3) for _ in range(leaves)]
        for _ in range(3):
            params, state = one(params, grads, state)
        counts.append(passed(lambda: one(params, grads, state))[1])  # noqa: B023
    assert counts[0] == counts[1]
