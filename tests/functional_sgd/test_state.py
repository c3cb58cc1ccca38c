"""The state, and the trees that must fit together."""

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor

from functional_sgd import (
    adam,
    adamw,
    average_params,
    chain,
    elementwise,
    identity,
    leafwise,
    lookahead,
    mechanize,
    momentum,
    noisy_sgd,
    partition,
    sgd,
    sgd_step,
)
from functional_sgd.state import seeded
from tests.comparing import Untouched, assert_same
from tests.functional_sgd import user_rules

PARAMS = {"a": torch.tensor([1.0, 2.0]), "b": [torch.tensor(3.0)]}
ZEROS = {"a": torch.zeros(2), "b": [torch.tensor(0.0)]}
Pair = namedtuple("Pair", "left right")


def memory(tensor: torch.Tensor) -> int:
    """Where the numbers of a tensor lie."""
    return tensor.untyped_storage().data_ptr()


def test_state_is_a_dict_with_a_tree_for_every_slot() -> None:
    assert_same(
        adam().init(PARAMS), {"step": torch.tensor([0, 0]), "grad_avg": ZEROS, "sqr_avg": ZEROS}
    )


def test_slow_params_start_as_a_copy_of_params() -> None:
    assert_same(lookahead(sgd()).init(PARAMS)["slow_param"], PARAMS)


def test_init_is_a_function_that_can_be_differentiated() -> None:
    params = torch.ones(2, requires_grad=True)
    assert lookahead(sgd()).init(params)["slow_param"].requires_grad
    with torch.no_grad():
        assert not lookahead(sgd()).init(params)["slow_param"].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "first",
    [
        lambda param: param,
        lambda param: param.detach(),
        lambda param: param.data,
        lambda param: param.view(param.shape),
    ],
    ids=["itself", "detach", "data", "view"],
)
def test_a_first_value_that_is_the_param_is_copied(first: Any, dtype: torch.dtype) -> None:
    @elementwise(kept=first)
    def keep(param: torch.Tensor, kept: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(param=param, kept=kept)

    params = torch.ones(3, dtype=dtype)
    assert memory(chain(keep).init(params)["kept"]) != memory(params)


def test_a_first_value_must_be_a_tensor() -> None:
    @elementwise(kept=lambda param: 0.0)  # type: ignore[arg-type,return-value]
    def keep(param: torch.Tensor, kept: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(param=param, kept=kept)

    with pytest.raises(
        TypeError, match=r"rule keep: a slot's first value must be a tensor, got float"
    ):
        chain(keep).init(PARAMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_slot_that_keeps_the_gradient_is_no_alias_of_it(dtype: torch.dtype) -> None:
    """Or the caller's next backward pass, which writes into that memory, would change the state."""
    opt, params, grads = (
        chain(user_rules.add_last, sgd_step, lr=0.1),
        torch.ones(3, dtype=dtype),
        torch.ones(3).to(dtype),
    )
    _, state = opt(params, grads, opt.init(params))
    assert memory(state["last_grad"]) != memory(grads)


@pytest.mark.parametrize("order", ["before the step", "after the step"])
def test_a_slot_that_keeps_the_param_is_no_alias_of_it(order: str) -> None:
    rules = (
        [user_rules.remember, sgd_step]
        if order == "before the step"
        else [sgd_step, user_rules.remember]
    )
    opt, params = chain(*rules, lr=0.1), torch.ones(3)
    after, state = opt(params, torch.ones(3), opt.init(params))
    assert memory(state["last_param"]) not in {memory(params), memory(after)}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": 1.0}, r"init: expected a tree of tensors, got a leaf of type float: 1\.0"),
        (
            {"a": torch.tensor([1, 2])},
            r"init: expected floating or complex tensors, got torch\.int64\. .*buffers",
        ),
        ({"a": torch.tensor([True])}, r"got torch\.bool"),
    ],
    ids=["float", "int64", "bool"],
)
def test_params_must_be_floating_tensors(params: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        sgd().init(params)


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        (
            {"a": torch.ones(2)},
            r"expected grads with the structure of params, but 'b\.0' is missing",
        ),
        ({**PARAMS, "c": torch.ones(1)}, r"expected grads .* but 'c' is not in params"),
        (
            {"a": torch.ones(2), "b": [torch.tensor(1.0), torch.tensor(1.0)]},
            r"but 'b\.1' is not in params",
        ),
        (
            {"a": torch.ones(2), "b": (torch.tensor(1.0),)},
            r"expected grads .* but its containers are",
        ),
        ({"a": {"x": torch.ones(2)}, "b": [torch.tensor(1.0)]}, r"'a"),
        (
            {"a": torch.ones(3), "b": [torch.tensor(1.0)]},
            r"gradient of 'a' must have its shape \(2,\), got \(3,\)",
        ),
        (
            {"a": torch.ones(2), "b": [torch.ones(1)]},
            r"gradient of 'b\.0' must have its shape \(\), got \(1,\)",
        ),
    ],
    ids=["missing", "too many", "longer", "tuple", "deeper", "shape", "0-d"],
)
def test_gradients_that_do_not_fit_are_refused(grads: Any, message: str) -> None:
    opt, state = adam(), adam().init(PARAMS)
    snapshot = Untouched(PARAMS, grads, state)
    with pytest.raises(ValueError, match=message):
        opt(PARAMS, grads, state)
    snapshot.check()


@pytest.mark.parametrize("grad", [1.0, "steep", [1.0, 1.0]], ids=str)
def test_gradients_must_be_tensors(grad: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"'a"):
        sgd()(PARAMS, {**PARAMS, "a": grad}, sgd().init(PARAMS))


@pytest.mark.parametrize(
    ("param", "grad"),
    [(torch.float32, torch.complex64), (torch.complex64, torch.float32)],
    ids=["complex gradient", "real gradient"],
)
def test_real_and_complex_do_not_mix(param: torch.dtype, grad: torch.dtype) -> None:
    """Broadcasting would otherwise mix up real and imaginary parts of a 2 x 2 leaf."""
    params, grads = torch.ones(2, 2, dtype=param), torch.ones(2, 2, dtype=grad)
    with pytest.raises((TypeError, ValueError)):
        sgd()(params, grads, sgd().init(params))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_of_another_precision_are_fine(dtype: torch.dtype) -> None:
    params = torch.tensor([1.0])
    after, _ = sgd(lr=0.5)(params, torch.tensor([1.0], dtype=dtype), sgd().init(params))
    assert_same(after, torch.tensor([0.5]))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"state has no '(step|grad_avg|sqr_avg)'\. .*opt\.init\(params\) makes one"),
        (
            {"step": torch.tensor([0, 0])},
            r"state has no '(grad_avg|sqr_avg)'\. Was it made by another optimizer, or by an ear",
        ),
        (momentum().init(PARAMS), r"state has no 'sqr_avg'"),
        (lookahead(adam()).init(PARAMS), r"no rule keeps 'slow_param', which is in state\. "),
        (
            {**adam().init(PARAMS), "sqr_average": 0},
            r"no rule keeps 'sqr_average'.* Did you mean 'sqr_avg'\?",
        ),
        (
            adam().init({"a": torch.ones(2)}),
            r"expected state\['grad_avg'\] .* but 'b\.0' is missing",
        ),
        (adam().init({"a": torch.ones(1), "b": [torch.tensor(3.0)]}), r"'a'.*\(2,\).*\(1,\)"),
    ],
    ids=[
        "empty",
        "no slots",
        "a slot less",
        "a slot more",
        "typing error",
        "other tree",
        "other shape",
    ],
)
def test_a_foreign_state_is_refused(state: Any, message: str) -> None:
    snapshot = Untouched(PARAMS, state)
    with pytest.raises(ValueError, match=message):
        adam()(PARAMS, PARAMS, state)
    snapshot.check()


@pytest.mark.parametrize(
    "state", [None, [torch.tensor(0)], torch.tensor(0)], ids=["None", "list", "tensor"]
)
def test_a_state_must_be_a_dict(state: Any) -> None:
    with pytest.raises(TypeError, match=r"state must be what opt\.init\(params\) returns, got"):
        sgd()(PARAMS, PARAMS, state)


def test_the_optimizer_is_named_in_errors() -> None:
    with pytest.raises(ValueError, match=r"^chain\(sgd_step, lr=0\.1\): state has no 'step'"):
        sgd(lr=0.1)(PARAMS, PARAMS, {})


@pytest.mark.parametrize(
    "params", [torch.tensor([1.0]), [torch.tensor([1.0])], Pair(torch.ones(1), torch.ones(2))]
)
def test_trees_come_back_as_they_went_in(params: Any) -> None:
    after, state = momentum(lr=0.1)(params, params, momentum().init(params))
    assert type(after) is type(params)
    assert type(state["grad_avg"]) is type(params)


def test_the_order_of_keys_does_not_matter() -> None:
    opt, params = adam(lr=0.1), {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
    grads = {"b": torch.tensor([-5.0]), "a": torch.tensor([5.0])}
    after, _ = opt(params, grads, opt.init(params))
    torch.testing.assert_close(after, {"a": torch.tensor([0.9]), "b": torch.tensor([2.1])})


def test_params_with_requires_grad_give_a_graph_only_through_the_step() -> None:
    """d (p - lr * g) / d p = 1 for a constant gradient."""
    params = torch.ones(2, requires_grad=True)
    after, _ = sgd(lr=0.5)(params, torch.ones(2), sgd().init(params))
    after.sum().backward()
    assert_same(params.grad, torch.ones(2))


def test_state_can_be_kept_and_stepped_back_to() -> None:
    opt, params = adamw(lr=0.1), PARAMS
    kept = opt.init(params)
    first = opt(params, PARAMS, kept)
    opt(*[first[0], PARAMS, first[1]])
    assert_same(opt(params, PARAMS, kept), first)


def test_identity_has_a_state_too() -> None:
    assert_same(identity().init(PARAMS), {"step": torch.tensor([0, 0])})


def test_slots_of_a_parameter_called_seed_are_not_seeded() -> None:
    params = {"seed": torch.zeros(1), "step": torch.zeros(1)}
    state = partition({"a": adam()}, {"*": "a"}).init(params)
    assert_same(seeded(state, 3)["parts"]["a"]["grad_avg"], params)


def test_a_chain_inside_of_wrappers_is_seeded() -> None:
    """On top of the seed that its part begins with."""
    state = partition({"a": noisy_sgd()}, {"*": "a"}).init({"seed": torch.zeros(1)})
    before = state["parts"]["a"]["seed"].item()
    assert seeded(state, 3)["parts"]["a"]["seed"].item() == before + 3


def test_a_first_value_that_fails_names_rule_slot_and_leaf() -> None:
    @leafwise(rows=lambda param: param.new_zeros(param.shape[0]))
    def average_rows(grad: Tensor, rows: Tensor) -> dict[str, Tensor]:
        return dict(rows=rows + grad.flatten(1).mean(1))

    with pytest.raises(IndexError) as found:
        chain(average_rows, sgd_step).init({"a": torch.ones(2, 3), "b": [torch.ones(())]})
    (note,) = found.value.__notes__
    assert note == (
        "raised for the first value of slot 'rows' of rule average_rows, of leaf 'b.0' with the "
        "shape ()"
    )


def test_counts_of_an_ordered_dict_are_extended_by_the_names_of_their_slots() -> None:
    params = OrderedDict(w=torch.ones(1), b=torch.ones(1))
    state = {**adamw().init(params), "step": torch.tensor([3, 5])}  # w, b
    plain = dict(params)
    grown = adamw().extend(state, plain, {**plain, "z": torch.ones(1)})
    assert grown["step"].tolist() == [5, 3, 0]  # b, w, z


@pytest.mark.parametrize("make", [adamw, lambda: mechanize(adamw()), lambda: average_params(sgd())])
def test_a_conjugate_that_torch_has_put_off_is_a_gradient_and_a_param_like_others(
    make: Any,
) -> None:
    opt, there = make(), torch.tensor([1 + 2j, 3 - 1j])
    lazy = there.conj()
    plain = lazy.resolve_conj()
    assert lazy.is_conj()
    assert_same(opt(there, lazy, opt.init(there)), opt(there, plain, opt.init(there)))
    after, state = opt(lazy, there, opt.init(lazy))
    assert_same((after.resolve_conj(), state), opt(plain, there, opt.init(plain)))
