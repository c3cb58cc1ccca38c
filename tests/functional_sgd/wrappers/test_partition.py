"""partition and freeze: each leaf goes to the optimizer of its label, as if the others were not
there.
"""

from collections import deque, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor

from functional_sgd import (
    accumulate,
    adamw,
    by_path,
    chain,
    clip_norm,
    elementwise,
    freeze,
    fuse,
    momentum,
    partition,
    sgd,
    sgd_step,
    sgld,
)
from tests.catalogue import random_like
from tests.comparing import Untouched, assert_same

Pair = namedtuple("Pair", "left right")

PARAMS = {
    "body": {"bias": torch.ones(2), "weight": torch.ones(2, 3)},
    "head": [torch.ones(3), torch.ones(1)],
}
GRADS = random_like(PARAMS, seed=0)


def two(labels: Any) -> Any:
    return partition({"slow": momentum(lr=0.1), "fast": sgd(lr=1.0)}, labels)


def one_step(opt: Any, hyper: Any = None, **extras: Any) -> Any:
    """The params after a step from PARAMS along GRADS."""
    return opt(PARAMS, GRADS, opt.init(PARAMS), hyper, **extras)[0]


def moved(leaf: Tensor, grad: Tensor, lr: float) -> Tensor:
    return leaf - lr * grad


def bodies(labels: Any) -> Any:
    """Plain SGD for two parts, at rates of 1."""
    return partition({"a": sgd(lr=1.0), "b": sgd(lr=1.0)}, labels)


def test_what_the_parts_run_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    opt = accumulate(fuse(two({"head": "fast", "*": "slow"})), every=2)
    opt.explain(PARAMS)
    slow, fast = capsys.readouterr().out.split("fast\n")
    assert slow.startswith("slow\nkernel  average_grad, sgd_step")
    assert fast.startswith("kernel  sgd_step")
    assert all("2 leaves" in part for part in (slow, fast))


@pytest.mark.parametrize(
    "labels",
    [
        {"head*": "fast", "*": "slow"},
        {"body": "slow", "head": "fast"},
        {"body": "slow", "head": ["fast", "fast"]},
        lambda path, leaf: "fast" if path.startswith("head") else "slow",
    ],
    ids=["patterns", "prefix", "tree", "function"],
)
def test_every_part_moves_as_if_it_were_alone(labels: Any) -> None:
    opt, params = two(labels), PARAMS
    state = opt.init(params)
    slow, fast = {"body": PARAMS["body"]}, {"head": PARAMS["head"]}
    slow_state, fast_state = momentum().init(slow), sgd().init(fast)
    for seed in range(3):
        grads = random_like(PARAMS, seed)
        params, state = opt(params, grads, state)
        slow, slow_state = momentum(lr=0.1)(slow, {"body": grads["body"]}, slow_state)
        fast, fast_state = sgd(lr=1.0)(fast, {"head": grads["head"]}, fast_state)
    assert_same(params, {**slow, **fast})
    assert_same(state["parts"]["fast"], {"step": torch.tensor([3, 3])})
    expected = {f"body.{name}": leaf for name, leaf in slow_state["grad_avg"]["body"].items()}
    assert_same(state["parts"]["slow"]["grad_avg"], expected)


def test_the_first_pattern_that_matches_wins() -> None:
    after = one_step(bodies({"*.weight": None, "body.*": "a", "*": "b"}), {"b.lr": 0.5})
    assert_same(after["body"]["weight"], PARAMS["body"]["weight"])
    assert_same(after["body"]["bias"], moved(PARAMS["body"]["bias"], GRADS["body"]["bias"], 1.0))
    assert_same(after["head"][0], moved(PARAMS["head"][0], GRADS["head"][0], 0.5))


def test_a_pattern_covers_the_branch_below_it() -> None:
    params = {"a": {"a": torch.ones(1)}, "ab": torch.ones(1)}
    opt = bodies({"a": "a", "*": None})
    after, _ = opt(params, params, opt.init(params))
    assert_same(after, {"a": {"a": torch.zeros(1)}, "ab": torch.ones(1)})


def test_a_leaf_with_the_label_none_is_the_same_tensor_and_has_no_slots() -> None:
    opt = partition({"all": adamw()}, {"body": None, "head": "all"})
    state = opt.init(PARAMS)
    after, state = opt(PARAMS, GRADS, state)
    assert after["body"]["weight"] is PARAMS["body"]["weight"]
    assert state["parts"]["all"]["grad_avg"].keys() == {"head.0", "head.1"}


def test_one_label_for_all_leaves() -> None:
    assert_same(one_step(two("fast")), one_step(sgd(lr=1.0)))


def test_params_may_be_a_single_tensor() -> None:
    opt, params = bodies(lambda path, leaf: "a"), torch.ones(2)
    after, _ = opt(params, params, opt.init(params))
    assert_same(after, torch.zeros(2))


def test_params_may_have_named_tuples() -> None:
    params = Pair(torch.ones(1), (torch.ones(1),))
    opt = bodies({"0": "a", "1.*": None})
    after, _ = opt(params, params, opt.init(params))
    assert_same(after, Pair(torch.zeros(1), (torch.ones(1),)))


def test_frozen_leaves_may_be_of_any_dtype() -> None:
    params = {"table": torch.arange(3), "weight": torch.ones(1)}
    opt = freeze(sgd(lr=1.0), "table")
    after, _ = opt(params, {"table": None, "weight": torch.ones(1)}, opt.init(params))
    assert after["table"] is params["table"]


def test_hypers_that_agree_are_one_name_and_others_have_the_label() -> None:
    opt = partition(
        {"a": momentum(lr=0.1), "b": sgd(lr=0.2), "c": sgd(lr=0.1, wd=0.3)}, lambda path, leaf: "a"
    )
    assert opt.hyper == {"mom": 0.9, "a.lr": 0.1, "b.lr": 0.2, "c.lr": 0.1, "wd": 0.3}
    assert {"lr", "a.lr", "b.lr", "c.lr", "c.wd", "wd", "mom", "a.mom"} == opt.names
    assert bodies("a").hyper == {"lr": 1.0}


def test_a_shared_name_is_for_all_parts_and_a_label_wins() -> None:
    labels = {"body": "a", "head": "b"}
    after = one_step(bodies(labels), {"lr": 0.5, "b.lr": 0.25})
    assert_same(
        after["body"],
        {n: moved(PARAMS["body"][n], GRADS["body"][n], 0.5) for n in ("bias", "weight")},
    )
    assert_same(after["head"][0], moved(PARAMS["head"][0], GRADS["head"][0], 0.25))
    assert_same(one_step(bodies(labels), lr=0.5), one_step(sgd(lr=0.5)))


@pytest.mark.parametrize("name", ["lr", "a.lr"])
def test_a_hyper_may_be_a_tree_prefix_of_all_params(name: str) -> None:
    rates = by_path(PARAMS, {"*bias": 0.5, "head*": 8.0, "*": 0.25})
    after = one_step(bodies({"body": "a", "head": None}), {name: rates})
    assert_same(after["body"]["bias"], moved(PARAMS["body"]["bias"], GRADS["body"]["bias"], 0.5))
    assert_same(
        after["body"]["weight"], moved(PARAMS["body"]["weight"], GRADS["body"]["weight"], 0.25)
    )


def test_partitions_nest_and_so_do_the_names() -> None:
    inner = partition(
        {"bias": sgd(lr=1.0), "weight": sgd(lr=2.0)}, lambda path, leaf: path.rpartition(".")[2]
    )
    opt = partition({"body": inner, "head": sgd(lr=3.0)}, lambda path, leaf: path.split(".")[0])
    assert opt.hyper == {"body.bias.lr": 1.0, "body.weight.lr": 2.0, "head.lr": 3.0}
    after = one_step(opt, {"lr": 0.5, "body.weight.lr": 0.25})
    assert_same(after["body"]["bias"], moved(PARAMS["body"]["bias"], GRADS["body"]["bias"], 0.5))
    assert_same(
        after["body"]["weight"], moved(PARAMS["body"]["weight"], GRADS["body"]["weight"], 0.25)
    )


@elementwise
def scale_by_loss(update: Tensor, *, value: Tensor) -> dict[str, Tensor]:
    """A rule with an extra."""
    return dict(update=update * value)


def test_extras_go_to_the_parts_that_read_them() -> None:
    opt = partition(
        {"a": chain(scale_by_loss, sgd_step, lr=1.0), "b": sgd(lr=1.0)}, {"body": "a", "head": "b"}
    )
    assert opt.required == ("value",)
    after = one_step(opt, value=torch.tensor(0.5))
    assert_same(after["body"]["bias"], moved(PARAMS["body"]["bias"], GRADS["body"]["bias"], 0.5))
    assert_same(after["head"][1], moved(PARAMS["head"][1], GRADS["head"][1], 1.0))


@elementwise(writes=["update"])
def scale_by_first(update: Tensor, *, values: Any) -> dict[str, Tensor]:
    """A rule with an extra that is a list."""
    return dict(update=update * values[0])


def test_extras_that_are_no_trees_like_params_are_handed_over_as_they_are() -> None:
    opt = partition({"a": chain(scale_by_first, sgd_step, lr=1.0)}, {"*": "a"})
    assert_same(one_step(opt, values=[0.5, "of the loss"]), one_step(sgd(lr=0.5)))


def test_what_one_part_lacks_is_required_for_that_part() -> None:
    opt = partition({"a": chain(sgd_step), "b": sgd(lr=1.0)}, {"body": "a", "head": "b"})
    assert opt.required == ("a.lr",)
    with pytest.raises(ValueError, match="'lr' has no default"):
        one_step(opt)
    assert_same(one_step(opt, {"a.lr": 1.0}), one_step(sgd(lr=1.0)))


def test_rules_that_see_whole_trees_see_their_part() -> None:
    params = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    opt = partition({"a": chain(clip_norm, sgd(lr=1.0)), "b": sgd(lr=1.0)}, {"a": "a", "b": "b"})
    after, _ = opt(params, {"a": torch.tensor([2.0]), "b": torch.tensor([40.0])}, opt.init(params))
    torch.testing.assert_close(after["a"], torch.tensor([2.0]))  # the 40 does not count


@pytest.mark.parametrize(
    "chosen",
    ["body*", ["body.bias", "body.w*"], lambda path, leaf: "body" in path],
    ids=["one", "two", "function"],
)
def test_freeze(chosen: Any) -> None:
    opt = freeze(adamw(lr=0.1), chosen)
    state = opt.init(PARAMS)
    after, state = opt(PARAMS, GRADS, state)
    assert after["body"]["bias"] is PARAMS["body"]["bias"]
    head = {"head": PARAMS["head"]}
    assert_same(
        {"head": after["head"]}, adamw(lr=0.1)(head, {"head": GRADS["head"]}, adamw().init(head))[0]
    )
    assert opt.hyper == adamw(lr=0.1).hyper


def test_arguments_are_untouched_with_trees_as_hypers() -> None:
    opt, rates = bodies({"body": "a", "head": "b"}), by_path(PARAMS, {"*": torch.tensor(0.5)})
    snapshot = Untouched(PARAMS, GRADS, rates)
    one_step(opt, {"lr": rates})
    snapshot.check()


@pytest.mark.usefixtures("fresh_compiler")
def test_patterns_and_trees_compile() -> None:
    for labels in ({"*bias": "a", "*": None}, {"body": "a", "head": None}):
        opt = bodies(labels)
        fast = torch.compile(opt, fullgraph=True, backend="eager")
        assert_same(fast(PARAMS, GRADS, opt.init(PARAMS)), opt(PARAMS, GRADS, opt.init(PARAMS)))


def test_repr_says_how_it_was_made() -> None:
    assert repr(freeze(sgd(lr=0.1), "body*")) == (
        "partition({'trained': chain(sgd_step, lr=0.1)}, {'body*': None, '*': 'trained'})"
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"body*": "a"}, "partition: no pattern matches leaf 'head.0'"),
        ({"boddy*": "a", "*": "b"}, "pattern 'boddy\\*' matches no leaf. Leaves: body.bias"),
        (
            {"body": "a", "head": "c"},
            "leaf 'head.0' has the label 'c', but there are optimizers for 'a', 'b' only",
        ),
        ({"body": {"bias": "a"}, "head": "b"}, "partition: no pattern matches leaf 'body.weight'"),
        (
            {"body": {"bias": "a", "weights": "a"}, "head": "b"},
            "pattern 'body.weights' matches no leaf",
        ),
        (lambda path, leaf: 3, "leaf 'body.bias' has the label 3"),
    ],
    ids=["no pattern", "no leaf", "no optimizer", "no prefix", "not in params", "odd function"],
)
def test_wrong_labels_are_errors_at_init(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bodies(labels).init(PARAMS)


def test_a_label_that_no_leaf_has_is_fine() -> None:
    assert bodies({"body": "a", "head": None}).init(PARAMS)["parts"].keys() == {"a"}


def test_all_leaves_may_be_frozen() -> None:
    for chosen in ("*", ["head", "*"]):
        opt = freeze(sgd(lr=1.0), chosen)
        assert_same(one_step(opt), PARAMS)
        assert opt.init(PARAMS)["parts"] == {}


def test_keys_in_a_tree_of_labels_are_no_patterns() -> None:
    params = {"w[0]": torch.ones(1), "*": torch.ones(1), "n": {"x?": torch.ones(1)}}
    opt = bodies({"w[0]": "a", "*": None, "n": {"x?": None}})
    assert_same(opt(params, params, opt.init(params))[0], {**params, "w[0]": torch.zeros(1)})
    numbered = {0: torch.ones(1), 1: torch.ones(1)}
    opt = bodies({0: "a", 1: None})
    assert_same(
        opt(numbered, numbered, opt.init(numbered))[0], {0: torch.zeros(1), 1: torch.ones(1)}
    )


@pytest.mark.parametrize(
    "labels", [{"body": "a", "head": None}, {"body": None, "head": "b"}], ids=["more", "others"]
)
def test_a_state_with_other_parts_is_an_error(labels: Any) -> None:
    opt, state = bodies(labels), bodies({"body": "a", "head": "b"}).init(PARAMS)
    if labels["body"] is None:
        del state["parts"]["b"]
    with pytest.raises(
        ValueError, match="expected state\\['parts'\\] for the labels '[ab]', got those for 'a'"
    ):
        opt(PARAMS, GRADS, state)


def test_paths_that_clash_are_an_error() -> None:
    with pytest.raises(ValueError, match="two leaves have the path 'a.b'"):
        bodies("a").init({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)})


def test_unknown_hypers_are_errors() -> None:
    with pytest.raises(ValueError, match="no rule reads 'a.lrr'. Did you mean 'a.lr'"):
        one_step(bodies("a"), {"a.lrr": 1.0})
    with pytest.raises(ValueError, match="'lr' is given both in hyper and by keyword"):
        one_step(bodies("a"), {"lr": 1.0}, lr=1.0)


def test_what_is_no_optimizer_is_an_error() -> None:
    with pytest.raises(
        TypeError, match="partition: 'a': expected an optimizer such as adamw\\(\\)"
    ):
        partition({"a": adamw}, "a")
    with pytest.raises(TypeError, match="'a' has no optimizer. Leaves that are not to move have"):
        partition({"a": None}, "a")
    with pytest.raises(TypeError, match="expected a dict label -> optimizer"):
        partition(adamw(), "a")
    with pytest.raises(TypeError, match="labels must be strings, got 0"):
        partition({0: adamw()}, 0)


def test_parts_that_join_later_draw_numbers_of_their_own() -> None:
    opt = partition({"a": sgld(lr=1.0), "b": sgld(lr=1.0)}, {"a": "a", "b": "b"})
    both = {"a": torch.zeros(4), "b": torch.zeros(4)}
    grown = opt.extend({"calls": torch.tensor(0), "parts": {}}, {}, both)
    assert_same(grown["parts"], opt.init(both)["parts"])


def test_a_hyper_that_is_a_registered_node_is_cut_like_a_dict() -> None:
    params = deque([torch.ones(1), torch.ones(1)])
    opt = partition({"all": sgd()}, {"*": "all"})
    moved, _ = opt(params, params, opt.init(params), dict(lr=deque([0.5, 0.25])))
    assert_same(moved, deque([torch.tensor([0.5]), torch.tensor([0.75])]))
