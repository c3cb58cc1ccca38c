"""A fused optimizer is its chain, whatever it was called with before: pure, donated, for trees of
every layout and dtype.

But for the order in which torch adds up, bit for bit: `ExactRoots` puts torch's own roots right.
"""

from typing import Any

import optree
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from functional_sgd import Chain, Optimizer, fuse
from functional_sgd.chained import Chained
from tests.comparing import Untouched, assert_same
from tests.functional_sgd.fusion.helpers import (
    REDUCING,
    SUMMING,
    ExactRoots,
    assert_near,
    memory_of,
    tolerance_of,
)
from tests.laws.examples import Call, Example, examples, hyper_of, twin

Tree = Any

UNCHANGED = ("start",)
"""Slots that their rules return as they are: nothing is written, so it is the same memory."""

EXAMPLES = 250
"""As many take some 25 seconds. `make fuzz` tries others for as long as you like."""


def check(example: Example) -> None:
    """Every call gives what the chain gives, touches nothing, and leaves earlier results alone."""
    runs = Runs(example.opt)
    for call in (*example.history, example.last):
        runs.check(call)
    for result in runs.kept:
        result.check()


class Runs:
    """An optimizer, fused pure and (where that can be) donated."""

    def __init__(self, opt: Optimizer) -> None:
        self.opt, self.pure = opt, fuse(opt)
        self.donated: Any = None
        try:
            self.donated = fuse(opt, donate=True)
        except ValueError as error:
            if "Fuse it without donate" not in str(error):
                raise
        self.kept: list[Untouched] = []

    def check(self, call: Call) -> None:
        """Take the steps of a call in all ways."""
        params = call.params()
        state = self.opt.init(params)
        for step in range(call.steps):
            grads, hyper = call.grads(step), hyper_of(call, self.opt, params)
            tracked = self._tracked(call, params, grads, state)
            given = Untouched(params, grads, state, hyper)
            with call.context():
                followed = tracked if torch.is_grad_enabled() else []
                found = self._pure(params, grads, state, hyper, followed)
                if not tracked or (call.tracked == "params" and isinstance(self.opt, Chain)):
                    self._donated(params, grads, state, hyper)
            given.check()
            self.kept.append(Untouched(detached(found)))
            params, state = twin(found)

    def _tracked(self, call: Call, params: Tree, grads: Tree, state: Tree) -> list[Tensor]:
        """The tensors that are to be tracked: derivatives by them must go through the step."""
        trees = {None: {}, "params": params, "grads": grads, "state": slots_of(state)}
        wanted = optree.tree_leaves(trees[call.tracked])
        chosen = [leaf for leaf in wanted if leaf.is_floating_point() or leaf.is_complex()]
        return [leaf.requires_grad_() for leaf in chosen]

    def _pure(
        self, params: Tree, grads: Tree, state: Tree, hyper: dict[str, Any], tracked: list[Tensor]
    ) -> tuple[Tree, Tree]:
        with ExactRoots():
            expected = self.opt(params, grads, state, hyper)
            found: tuple[Tree, Tree] = self.pure(params, grads, state, hyper)
        self._near(found, expected, (params, state))
        if not self._keeps(grads):
            arguments = memory_of((params, grads, slots_of(state)))
            changed = {n: v for n, v in slots_of(found[1]).items() if n not in UNCHANGED}
            assert not memory_of((found[0], changed)) & arguments
        if tracked:
            self._same_derivative(derivative(found, tracked), derivative(expected, tracked))
        return found

    def _donated(self, params: Tree, grads: Tree, state: Tree, hyper: dict[str, Any]) -> None:
        """On copies, since they are spent."""
        if self.donated is None:
            return
        own, own_state = twin((params, state))
        for mine, leaf in zip(*map(optree.tree_leaves, (own, params)), strict=True):
            mine.requires_grad_(leaf.requires_grad)
        given, places = Untouched(grads, hyper), addresses(own, own_state)
        with ExactRoots():
            expected = self.opt(*twin((params,)), grads, twin(state), hyper)
            found, found_state = self.donated(own, grads, own_state, hyper)
        self._near((found, found_state), expected, (params, state))
        given.check()
        if isinstance(self.opt, Chain):
            assert addresses(found, found_state) == places, "other memory than was donated"

    def _near(self, found: Tree, expected: Tree, before: Tree) -> None:
        trees = map(detached, (found, expected, before))
        if isinstance(self.opt, Chain):
            bounds = tolerance_of(self.opt)
            assert_near(*trees, ulps=2 if any(bounds.values()) else 0, **bounds)
        else:
            more = REDUCING if isinstance(self.opt, Chained) else 4
            assert_near(*trees, ulps=4, more=more, wide=SUMMING)

    def _same_derivative(self, found: list[Tensor | None], expected: list[Tensor | None]) -> None:
        if isinstance(self.opt, Chain):
            assert_same(found, expected)
            return
        # What is in front of the part that is tracked may be a kernel, with sums in its own order.
        assert [one is None for one in found] == [one is None for one in expected]
        for one, other in zip(found, expected, strict=True):
            if one is not None and other is not None:
                bound = 64 * torch.finfo(other.dtype).eps
                torch.testing.assert_close(one, other, rtol=bound, atol=bound, equal_nan=True)

    def _keeps(self, grads: Tree) -> bool:
        """Whether results may hold what came: leaves that nothing happens to, and in wrappers."""
        idle = any(leaf is None for leaf in optree.tree_leaves(grads, none_is_leaf=True))
        return idle or not isinstance(self.opt, Chain) or not self.opt.rules


def addresses(params: Tree, state: Tree) -> list[int]:
    """Where the params and the slots lie."""
    leaves = optree.tree_leaves((params, slots_of(state)))
    return [leaf.data_ptr() for leaf in leaves if leaf.numel()]


def slots_of(state: Tree) -> Tree:
    """What a state has of each leaf."""
    return {name: value for name, value in state.items() if not isinstance(value, Tensor)}


def detached(tree: Tree) -> Tree:
    """The same tensors to everybody but autograd."""
    return optree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def derivative(results: Tree, tracked: list[Tensor]) -> list[Tensor | None]:
    """That of the sum of all results."""
    leaves = [leaf for leaf in optree.tree_leaves(results) if leaf.requires_grad]
    if not leaves:
        return []
    total = sum(leaf.abs().double().sum() for leaf in leaves)
    return list(torch.autograd.grad(total, tracked, allow_unused=True))


law = settings(
    deadline=None, derandomize=True, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck)
)
test_a_fused_step_is_the_chain = law(given(example=examples())(check))
