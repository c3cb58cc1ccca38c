"""Partitions within partitions: whoever passes defaults along, nothing changes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_sgd import Optimizer, chain, partition, scheduled, sgd, sgd_step, to_torch
from functional_sgd.hyper import with_hypers
from functional_sgd.schedules import Constant
from functional_sgd.wrappers.partition import Partition

LEAVES = tuple("abcdef")
RATES = st.sampled_from([0.1, 0.2, 0.3, 0.4])

chains = st.one_of(
    st.builds(lambda lr: sgd(lr=lr), RATES),
    st.builds(lambda lr: scheduled(sgd(), lr=Constant(lr)), RATES),
)


def _parts(first: Optimizer, second: Optimizer, end: str) -> Optimizer:
    """The second part has the leaves up to `end`. No part of a part has the label of a part."""
    level = 1 + max(_level(first), _level(second))
    one, two = f"one{level}", f"two{level}"
    return partition({one: first, two: second}, lambda path, _: two if path <= end else one)


def _level(opt: Optimizer) -> int:
    """How many partitions are within each other."""
    below = max(map(_level, opt.inner), default=0)
    return below + isinstance(opt, Partition)


optimizers = st.recursive(
    chains,
    lambda inner: st.builds(_parts, inner, inner, st.sampled_from(LEAVES)),
    max_leaves=5,
)


def moved(opt: Optimizer, hyper: dict[str, Any]) -> dict[str, float]:
    """How far each leaf goes: the lr that it gets."""
    zeros = {name: torch.zeros((), dtype=torch.float64) for name in LEAVES}
    ones = {name: torch.ones((), dtype=torch.float64) for name in LEAVES}
    params, _ = opt(zeros, ones, opt.init(zeros), hyper)
    return {name: -params[name].item() for name in LEAVES}


def stepped(opt: Optimizer, written: dict[str, Any], **hyper: Any) -> dict[str, float]:
    """The same, by torch's interface."""
    zeros = {name: torch.zeros((), dtype=torch.float64) for name in LEAVES}
    named = {name: torch.nn.Parameter(value) for name, value in zeros.items()}
    optimizer = to_torch(opt, named.items(), **hyper)
    optimizer.param_groups[0].update(written)
    for param in named.values():
        param.grad = torch.ones((), dtype=torch.float64)
    optimizer.step()
    return {name: -param.item() for name, param in named.items()}


@settings(max_examples=60, deadline=None)
@given(opt=optimizers, data=st.data())
def test_whoever_passes_defaults_changes_nothing(opt: Optimizer, data: st.DataObject) -> None:
    names = st.sampled_from(sorted(opt.names))
    hyper = data.draw(st.dictionaries(names, st.sampled_from([0.5, 0.7, 0.9]), max_size=2))
    expected = moved(opt, hyper)
    assert moved(opt, with_hypers(opt.hyper, hyper)) == expected
    assert stepped(opt, {}, **hyper) == pytest.approx(expected)
    assert stepped(opt, hyper) == pytest.approx(expected)
    around = scheduled(opt, **{name: Constant(value) for name, value in hyper.items()})
    assert moved(around, around.hyper) == expected


def test_a_partition_inside_names_its_hypers_in_full() -> None:
    body = partition({"n": sgd(lr=0.1), "k": sgd(lr=0.2)}, {"a": "n", "*": "k"})
    opt = partition({"body": body, "head": sgd(lr=0.3)}, {"f": "head", "*": "body"})
    assert opt.hyper == {"body.n.lr": 0.1, "body.k.lr": 0.2, "head.lr": 0.3}
    assert moved(opt, {"body.lr": 0.5}) == {"a": 0.5, **dict.fromkeys("bcde", 0.5), "f": 0.3}
    assert moved(opt, {"n.lr": 0.5}) == {"a": 0.5, **dict.fromkeys("bcde", 0.2), "f": 0.3}


def test_what_one_part_must_be_given_is_not_what_all_are() -> None:
    """Its lr for all parts would take those of the others."""
    body = partition({"n": sgd(lr=0.1), "k": sgd(lr=0.2)}, {"a": "n", "*": "k"})
    opt = partition({"body": body, "head": chain(sgd_step)}, {"f": "head", "*": "body"})
    assert opt.required == ("head.lr",)
    assert moved(opt, {"head.lr": 0.3}) == {"a": 0.1, **dict.fromkeys("bcde", 0.2), "f": 0.3}


def test_the_label_of_a_part_is_that_part_and_no_part_of_another() -> None:
    body = partition({"a": sgd(lr=0.1), "head": sgd(lr=0.2)}, {"a": "a", "*": "head"})
    opt = partition({"body": body, "head": sgd(lr=0.3)}, {"f": "head", "*": "body"})
    expected = {"a": 0.1, **dict.fromkeys("bcde", 0.2), "f": 0.9}
    assert moved(opt, {"head.lr": 0.9}) == expected
    assert moved(opt, with_hypers(opt.hyper, {"head.lr": 0.9})) == expected
    assert stepped(opt, {"head.lr": 0.9}) == pytest.approx(expected)
