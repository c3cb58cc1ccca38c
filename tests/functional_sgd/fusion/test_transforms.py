"""Fused optimizers where kernels cannot go: transforms, tracked gradients, other modes. And state
that outlives it.
"""

import copy as copying
import io
import pickle

import pytest
import torch

import functional_sgd as fs
from functional_sgd import Optimizer, chain, elementwise, fuse, leafwise
from functional_sgd.fusion.backends.foreach import ForeachBackend
from tests.catalogue import RECIPES, small_tree
from tests.comparing import Untouched, assert_close, assert_same, copy_of, member, stack
from tests.functional_sgd.fusion.helpers import check_steps, grads_for, plain_tree
from tests.processes import python

NAMES = ["adamw", "lamb", "clip_norm_adam", "lookahead_sgd"]
named = pytest.mark.parametrize("name", NAMES)
donating = pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])


@named
@donating
def test_vmap_over_members(name, donate):
    opt = RECIPES[name]()
    fused = fuse(opt, donate=donate)
    trees = [small_tree(seed) for seed in range(3)]
    states = [opt.init(tree) for tree in trees]
    rates = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)

    def one(params, state, lr):
        return fused(params, params, state, dict(lr=lr))

    found = torch.func.vmap(one)(stack(trees), stack(states), rates)
    for index, (tree, state) in enumerate(zip(trees, states, strict=True)):
        assert_close(
            member(found, index), opt(tree, tree, state, dict(lr=rates[index])), rtol=1e-12
        )


@named
@donating
def test_the_derivative_by_the_learning_rate(name, donate):
    opt = RECIPES[name]()
    fused, params = fuse(opt, donate=donate), small_tree()
    state = opt.init(params)

    def loss(run):
        return lambda lr: sum(
            leaf.sum() for leaf in run(params, params, state, dict(lr=lr))[0].values()
        )

    lr = torch.tensor(0.1, dtype=torch.float64)
    expected = torch.func.grad(loss(opt))(lr)
    assert expected != 0
    assert_same(torch.func.grad(loss(fused))(lr), expected)
    tracked = lr.clone().requires_grad_()
    if donate:
        with pytest.raises(ValueError, match="no derivative can go through it, but hypers, "):
            loss(fused)(tracked)
        return
    loss(fused)(tracked).backward()
    assert_same(tracked.grad, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_forward_mode_derivatives():
    params = [torch.ones(3)]
    fused, state = fuse(fs.sgd(lr=0.5)), fs.sgd().init(params)
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(params[0], torch.full((3,), 2.0))]
        for opt in (fused.opt, fused):
            tangent = torch.autograd.forward_ad.unpack_dual(opt(dual, params, state)[0][0]).tangent
            assert tangent is not None, opt
            assert tangent.tolist() == [2.0] * 3


def tracked_call(which, leaf):
    """The arguments of a step in which one tensor is tracked: a leaf of the graph, or computed."""
    params = {"w": torch.ones(3)}
    call = dict(params=params, grads=copy_of(params), state=fs.adamw().init(params))
    tree = {"params": call["params"], "grads": call["grads"], "state": call["state"]["grad_avg"]}
    tree[which]["w"].requires_grad_()
    if not leaf:
        tree[which]["w"] = 1.0 * tree[which]["w"]
    return call


WHICH = ["params", "grads", "state"]


@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "computed"])
@pytest.mark.parametrize("which", WHICH)
def test_tracked_tensors(which, leaf):
    call, opt = tracked_call(which, leaf), fs.adamw()
    found, expected = fuse(opt)(**call), opt(**call)
    assert_same(found, expected)
    assert found[0]["w"].requires_grad
    with torch.no_grad():
        assert not fuse(opt)(**call)[0]["w"].requires_grad


BEFORE = {
    "no_grad": lambda: torch.no_grad(),
    "inference": lambda: torch.inference_mode(),
    "nothing tracked": lambda: torch.enable_grad(),
}


@pytest.mark.parametrize("mode", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_fused_optimizer_remembers_nothing_of_no_grad(calls, mode):
    """The gradient of (step(w) ** 2).sum() + (w ** 2).sum() is 3.8, and was 2.0 after a call."""
    opt, grads = fuse(fs.sgd(lr=0.1)), [torch.ones(3)]
    w = torch.ones(3, requires_grad=True)
    state = opt.init([w])
    seen = w if mode is not BEFORE["nothing tracked"] else w.detach()
    for _ in range(calls):
        with mode():
            assert not opt([seen], grads, state)[0][0].requires_grad
    stepped = opt([w], grads, state)[0][0]
    ((stepped**2).sum() + (w**2).sum()).backward()
    torch.testing.assert_close(w.grad, torch.full((3,), 3.8))


@pytest.mark.parametrize("order", ["first", "second"])
def test_maml_after_an_evaluation(order):
    """The gradient of the loss after a step, by the params before it."""
    opt = fs.momentum(lr=0.1)

    def loss(w):
        return (w[0] ** 3).sum()

    def meta_gradient(run, w):
        grads = torch.autograd.grad(loss(w), w, create_graph=order == "second")
        stepped, _ = run(w, list(grads), opt.init([leaf.detach() for leaf in w]))
        return torch.autograd.grad(loss(stepped), w)[0]

    w, fused = [torch.tensor([1.0, 2.0], requires_grad=True)], fuse(opt)
    expected = meta_gradient(opt, w)
    for _ in range(2):
        assert_same(meta_gradient(fused, w), expected)
        with torch.no_grad():
            fused(w, [torch.ones(2)], opt.init(w))


@pytest.mark.parametrize("which", WHICH)
def test_donating_what_was_computed_from_tracked_tensors_is_an_error(which):
    call = tracked_call(which, leaf=False)
    fused, before = fuse(fs.adamw(), donate=True), Untouched(call)
    with pytest.raises(
        ValueError, match="are tracked, or params were computed from tracked tensors. Detach"
    ):
        fused(**call)
    before.check()
    with torch.no_grad():
        fused(**call)


@pytest.mark.parametrize("which", ["grads", "state"])
def test_donating_with_gradients_or_slots_that_are_tracked_is_an_error(which):
    """Of these, unlike of params, nobody tracks one that is not to be differentiated."""
    call = tracked_call(which, leaf=True)
    with pytest.raises(ValueError, match="no derivative can go through it"):
        fuse(fs.adamw(), donate=True)(**call)


@pytest.mark.parametrize(
    ("name", "fullgraph"), [(name, True) for name in NAMES] + [("adamw", False)]
)
def test_inside_a_compiled_function(name, fullgraph, fresh_compiler):
    opt = RECIPES[name]()
    fused, params = fuse(opt), small_tree()
    state = opt.init(params)
    compiled = torch.compile(lambda p, g, s: fused(p, g, s), backend="eager", fullgraph=fullgraph)
    assert_close(compiled(params, params, state), opt(params, params, state), rtol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@donating
@named
def test_inside_other_modes(name, donate, mode):
    with mode():
        check_steps(RECIPES[name](), plain_tree(torch.float32), donate)


def test_memory_made_in_inference_mode_is_not_handed_out_afterwards():
    opt = fuse(fs.sgd(lr=0.1))
    params, state = [torch.ones(3)], opt.init([torch.ones(3)])
    with torch.inference_mode():
        for _ in range(3):
            opt(params, params, state)
    found, _ = opt(params, params, state)
    assert not found[0].is_inference()
    (found[0].requires_grad_() * found[0]).sum().backward()


def test_the_default_device_does_not_matter():
    """In a process of its own: a kernel that writes to memory that is not there ends it."""
    code = (
        "import torch; from functional_sgd import adamw, fuse\n"
        "opt, params = fuse(adamw(lr=0.1)), [torch.ones(3)]\n"
        "state = opt.init(params)\n"
        "with torch.device('meta'):\n"
        "    found, _ = opt(params, params, state)\n"
        "assert found[0].device.type == 'cpu', found\n"
        "assert found[0].tolist() == fuse(adamw(lr=0.1))(params, params, state)[0][0].tolist()\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-500:]}"


def test_nor_does_it_where_operators_of_torch_run():
    opt, params = fs.adamw(lr=0.1), [torch.ones(3)]
    fused, state = fuse(opt, backends=[ForeachBackend()]), opt.init(params)
    expected = fused(params, params, state)
    with torch.device("meta"):
        assert_same(fused(params, params, state), expected)


def test_the_default_dtype_does_not_matter():
    torch.set_default_dtype(torch.float64)
    try:
        check_steps(fs.lamb(lr=0.1), plain_tree(torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)


@donating
@pytest.mark.parametrize("name", RECIPES)
def test_saved_and_restored_is_never_stopped(name, donate):
    opt = RECIPES[name]()
    params = plain_tree(torch.float32)
    params = {key: value for key, value in params.items() if key != "d"}

    def go_on(fused, params, state, numbers):
        for number in numbers:
            params, state = fused(params, grads_for(params, number), state)
        return params, state

    whole = go_on(fuse(opt, donate=donate), copy_of(params), opt.init(params), range(4))
    half = go_on(fuse(opt, donate=donate), copy_of(params), opt.init(params), range(2))
    file = io.BytesIO()
    torch.save(half, file)
    file.seek(0)
    assert_same(
        go_on(fuse(opt, donate=donate), *torch.load(file, weights_only=True), range(2, 4)), whole
    )


@named
def test_two_fused_optimizers_in_turn(name):
    opt = RECIPES[name]()
    both, one = [fuse(opt), fuse(opt)], fuse(opt)
    mixed = alone = (plain_tree(torch.float32), opt.init(plain_tree(torch.float32)))
    for number in range(4):
        mixed = both[number % 2](mixed[0], grads_for(mixed[0], number), mixed[1])
        alone = one(alone[0], grads_for(alone[0], number), alone[1])
    assert_same(mixed, alone)


@named
def test_the_same_arguments_give_the_same_results(name):
    opt = RECIPES[name]()
    fused, params = fuse(opt), plain_tree(torch.float32)
    state, grads = opt.init(params), grads_for(params, 1)
    results = [fused(params, grads, state) for _ in range(4)]
    for other in results[1:]:
        assert_same(other, results[0])


@named
def test_the_number_of_threads_does_not_matter(name):
    opt, params = RECIPES[name](), plain_tree(torch.float32)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(
                fuse(opt)(params, {**grads_for(params, 1), "d": params["d"]}, opt.init(params))
            )
        finally:
            torch.set_num_threads(1)
    assert_close(*results, rtol=1e-5 if name in ("lamb", "clip_norm_adam") else 0, atol=1e-7)


def test_it_is_an_optimizer():
    opt = fuse(fs.adamw())
    assert isinstance(opt, Optimizer)
    assert repr(opt) == f"fuse({fs.adamw()!r})"
    assert repr(fuse(fs.sgd(lr=0.1), donate=True)) == "fuse(chain(sgd_step, lr=0.1), donate=True)"
    for wrong in (fs.adamw, fs.sgd_step, None):
        with pytest.raises(TypeError, match="fuse: expected an optimizer such as adamw"):
            fuse(wrong)


@pytest.mark.parametrize("name", ["identity", "sgd", "adamw"])
def test_a_pure_step_makes_trees_of_its_own(name):
    opt, params = RECIPES[name](), {"a": [torch.ones(2)], "b": torch.ones(3)}
    state = opt.init(params)
    new, after = fuse(opt)(params, params, state)
    assert new is not params
    assert new["a"] is not params["a"]
    assert after is not state
    assert all(after[slot] is not state[slot] for slot in state)


def test_under_make_fx_the_rules_are_traced():
    from torch.fx.experimental.proxy_tensor import make_fx

    opt = fuse(fs.sgd(lr=0.5))
    state = opt.init([torch.ones(2)])
    graph = make_fx(lambda param, grad: opt([param], [grad], state)[0][0])(
        torch.ones(2), torch.ones(2)
    )
    assert graph(torch.full((2,), 3.0), torch.full((2,), 2.0)).tolist() == [2.0, 2.0]


def test_a_fused_optimizer_can_be_copied_and_pickled():
    opt, params = fuse(fs.adamw(lr=0.1), donate=True), [torch.ones(2)]
    for copy in (
        copying.copy(opt),
        copying.deepcopy(opt),
        pickle.loads(pickle.dumps(opt)),
        fuse(opt, donate=True),
    ):
        assert repr(copy) == repr(opt)
        assert_same(
            copy([torch.ones(2)], params, opt.init(params)),
            opt([torch.ones(2)], params, opt.init(params)),
        )


SCALE = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
WEIGHT = torch.full((3, 3), 0.5, requires_grad=True)


@elementwise
def by_a_learned_number(update):
    return dict(update=update * SCALE)


@leafwise
def by_a_learned_network(update):
    return dict(update=update @ WEIGHT)


@leafwise(total=0.0)
def into_a_learned_number(update, *, total):
    return dict(update=update, total=total + SCALE)


LEARNED = {
    "number": (by_a_learned_number, SCALE),
    "network": (by_a_learned_network, WEIGHT),
    "number of the tree": (into_a_learned_number, SCALE),
}


@pytest.mark.parametrize("donate", [False, "grads"], ids=["pure", "grads"])
@pytest.mark.parametrize("name", LEARNED)
def test_derivatives_by_what_a_rule_closes_over_are_those_of_the_chain(name, donate):
    rule, learned = LEARNED[name]
    opt = chain(rule, fs.sgd_step, lr=0.1)
    found = []
    for one in (opt, fuse(opt, donate=donate)):
        params, grads = [torch.ones(2, 3)], [torch.full((2, 3), 3.0)]
        moved, state = one(params, grads, opt.init(params))
        value = moved[0].sum() + sum(entry.sum() for entry in state.values())
        found.append((torch.autograd.grad(value, learned)[0], moved, state["step"]))
    assert_same(found[1], found[0])
    assert found[0][0].abs().sum() > 0


def test_a_learned_rule_is_not_tracked_where_nothing_is():
    opt, params = chain(by_a_learned_network, fs.sgd_step, lr=0.1), [torch.ones(2, 3)]
    with torch.no_grad():
        found, _ = fuse(opt)(params, params, opt.init(params))
    donated, _ = fuse(opt, donate=True)(copy_of(params), params, opt.init(params))
    assert not found[0].requires_grad
    assert not donated[0].requires_grad
    assert_same(found, donated)
