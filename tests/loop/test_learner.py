"""The learner: what it refuses, and the way back into the module."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import loop.learner
import loop.state
from loop import Learner, State, fit, load, save
from tests.comparing import Untouched, assert_same
from tests.loop.helpers import learner, linear, loaders, net, on


class Everything(nn.Module):
    """Tied weights, a frozen one, and buffers of which one is not persistent and one grows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.hidden = self.hidden + x.detach().mean(dim=0)
            self.seen = torch.cat([self.seen, x.detach().mean().reshape(1)])
        found: Tensor = self.second(self.first(x))
        return found


def trained(model: nn.Module) -> tuple[Learner, State]:
    mine = learner(model)
    return mine, fit(mine, mine.init(), 2)


@pytest.mark.parametrize("model", [net(), Everything()], ids=["net", "tied"])
def test_a_state_can_be_loaded_into_the_model(model: nn.Module) -> None:
    mine, end = trained(model)
    assert mine.load(end) is model
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert_same(
        {name: value.detach() for name, value in own.items()}, {**end.params, **end.buffers}
    )


def test_loading_keeps_parameters_tied_and_the_state_apart() -> None:
    model = Everything()
    mine, end = trained(model)
    weight = model.first.weight
    untouched = Untouched(end.params, end.buffers)
    mine.load(end)
    assert model.first.weight is weight is model.second.weight
    with torch.no_grad():
        model.first.weight.zero_()
        model.seen.zero_()
    untouched.check()


def test_a_state_of_another_model_is_an_error_that_names_the_tensor() -> None:
    _, end = trained(linear())
    with pytest.raises(ValueError, match="only the model has '0.weight'"):
        learner(net()).load(end)
    with pytest.raises(ValueError, match=r"'weight' has shape \(2, 2\) there and \(3, 2\)"):
        learner(nn.Linear(2, 3)).load(end)


def test_a_state_whose_buffers_have_grown_can_be_saved_and_resumed(tmp_path: Any) -> None:
    mine, end = trained(Everything())
    save(end, tmp_path / "state")
    found = load(tmp_path / "state", mine.init())
    assert_same(found.buffers, end.buffers)
    assert len(end.buffers["seen"]) == 6


@pytest.fixture
def _alone(tmp_path: Any) -> Any:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_alone")
def test_models_that_synchronise_or_shard_themselves_are_refused() -> None:
    from torch.distributed.fsdp import fully_shard

    parallel = nn.parallel.DistributedDataParallel(linear())
    for model in (parallel, nn.Sequential(parallel)):
        with pytest.raises(ValueError, match=r"DistributedDataParallel.*Pass model.module"):
            learner(model)
    mesh = dist.init_device_mesh("cpu", (1,))
    sharded = fully_shard(copy.deepcopy(linear()), mesh=mesh)
    with pytest.raises(ValueError, match=r"FSDPLinear keeps its parameters in shards"):
        learner(sharded)


def test_the_class_of_a_loss_is_refused() -> None:
    with pytest.raises(TypeError, match=r"got the class MSELoss\. Call it: MSELoss\(\)"):
        learner(loss=nn.MSELoss)


def test_what_others_have_as_methods_is_answered_with_ours() -> None:
    mine = learner()
    with pytest.raises(AttributeError, match=r"no attribute 'fit'. Here it is a function: end = f"):
        mine.fit(3)  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"Here it is state.learner.model\."):
        _ = mine.init().model  # type: ignore[attr-defined]
    for thing in (mine, mine.init()):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'$"):
            thing.nothing  # type: ignore[attr-defined]
        assert copy.copy(thing) is not None


def test_hints_are_for_names_that_are_not_there() -> None:
    mine, state = learner(), learner().init()
    for owner, hints in ((mine, loop.learner._ELSEWHERE), (state, loop.state._ELSEWHERE)):
        assert not [name for name in hints if hasattr(owner, name)]


@pytest.mark.parametrize("event", ["after_pred", "after_loss"])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_at_work_gives_no_first_weights(event: str, training: bool) -> None:
    mine = learner(data=loaders(1, 1))

    def begin(state: State) -> None:
        if state.training is training:
            mine.init()

    with pytest.raises(RuntimeError, match=r"Learner.init: expected a Linear with tensors of its"):
        fit(mine, mine.init(), 1, [on("begin", **{event: begin})])
    # Afterwards it is as it was.
    assert_same(mine.init().params, dict(mine.model.named_parameters()))


@pytest.mark.parametrize("event", ["before_fit", "before_epoch", "after_train", "after_epoch"])
def test_between_phases_the_model_has_its_first_weights(event: str) -> None:
    mine = learner(data=loaders(1, 1))
    found: list[State] = []

    def begin(state: State) -> None:
        found.append(mine.init())

    fit(mine, mine.init(), 1, [on("begin", **{event: begin})])
    assert_same(found[0].params, mine.init().params)
