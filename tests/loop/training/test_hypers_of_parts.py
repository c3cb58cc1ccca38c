"""A partition whose parts differ in lr has no lr of its own, but it takes one: so does a run."""

from functional_sgd import partition, sgd
from functional_sgd.schedules import Constant
from loop import ParamScheduler, fit, lr_find
from tests.comparing import assert_close
from tests.loop.helpers import learner, on

PARTS = partition({"a": sgd(lr=0.1), "b": sgd(lr=0.2)}, {"weight": "a", "bias": "b"})
MINE = learner(opt=PARTS)
WHOLE = learner(opt=sgd(lr=0.5))


def test_fit_takes_what_the_optimizer_takes() -> None:
    assert "lr" not in PARTS.hyper
    end = fit(MINE, MINE.init(), 1, lr=0.5)
    assert_close(end.params, fit(WHOLE, WHOLE.init(), 1).params)
    assert end.hyper["lr"] == 0.5


def test_the_hyper_of_one_part_is_for_that_part() -> None:
    end = fit(MINE, MINE.init(), 1, **{"a.lr": 0.5})
    assert (end.hyper["a.lr"], end.hyper["b.lr"]) == (0.5, 0.2)


def test_a_schedule_for_all_parts_is_followed_and_put_back() -> None:
    end = fit(MINE, MINE.init(), 1, [ParamScheduler({"lr": Constant(0.5)})])
    assert_close(end.params, fit(WHOLE, WHOLE.init(), 1).params)
    assert end.hyper == MINE.init().hyper


def test_lr_find_moves_all_parts() -> None:
    found, expected = (lr_find(one, one.init(), iterations=20) for one in (MINE, WHOLE))
    assert_close(found.losses, expected.losses)


def test_a_schedule_for_all_parts_leaves_their_logs() -> None:
    """Every log has an item for each loss: None where the batch had no such hyper."""
    first = fit(MINE, MINE.init(), 1)
    cycle = fit(MINE, first, 1, [ParamScheduler({"lr": Constant(0.5)})])
    hypers = fit(MINE, cycle, 1).history.hypers
    assert list(hypers["a.lr"]) == [0.1] * 3 + [None] * 3 + [0.1] * 3
    assert list(hypers["lr"]) == [None] * 3 + [0.5] * 3 + [None] * 3


def test_a_tree_that_batches_do_not_have_keeps_its_log() -> None:
    tree = {"weight": 0.1, "bias": 0.2}
    there = on(
        before_batch=lambda state: state.replace(hyper={"lr": tree} if state.iter != 1 else {})
    )
    end = fit(WHOLE, WHOLE.init(), 1, [there])
    assert list(end.history.hypers["lr"]) == [tree, None, tree]
