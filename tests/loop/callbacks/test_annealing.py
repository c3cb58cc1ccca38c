"""The automatic annealer of lesson 18: the numbers of its workbook, by both rules; and gradients of
networks.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from functional_sgd import adamw, average_grad, average_sqr_grad, chain, scale_by_rms, sgd, sgd_step
from functional_sgd.schedules import Constant
from loop import (
    AnnealOnGradRatio,
    CancelFit,
    CancelStep,
    DataLoaders,
    GradientClip,
    Learner,
    ParamScheduler,
    State,
    fit,
    sqr_avg_size,
)
from loop.callbacks.annealing import Sizes, cut_on_fall, cut_on_rise
from tests.loop.helpers import Kept, assert_same_run, learner, on, one_weight, raiser

X = [
    14,
    86,
    28,
    51,
    28,
    29,
    72,
    62,
    84,
    15,
    42,
    62,
    47,
    35,
    9,
    38,
    44,
    99,
    13,
    21,
    28,
    20,
    8,
    64,
    99,
    70,
    27,
    17,
    8,
]


def sizes(state: State) -> dict[str, Any]:
    """What the annealer remembers."""
    return vars(state.memory["anneal_on_grad_ratio"])


STALE = 7002.565171676694  # the smallest size that the workbook's macro remembered from before
PRIMED = {
    "grad_avg": {"weight": -919.4085359523834, "bias": -29.14129355150132},
    "sqr_avg": {"weight": 40148488.714414425, "bias": 7481.715874165458},
}
"""The averages after the workbook's reset: two passes over the data that do not move the parameters
at their start.
"""


def squared(pred: Tensor, target: Tensor) -> Tensor:
    """The workbook's loss."""
    return (pred - target).square().sum()


def tensors(values: dict[str, float]) -> dict[str, Tensor]:
    """Numbers in the shapes of Linear(1, 1)."""
    shapes = {"weight": (1, 1), "bias": (1,)}
    return {
        name: torch.full(shapes[name], value, dtype=torch.float64) for name, value in values.items()
    }


def workbook() -> tuple[Learner, State]:
    """29 points of y = 2x + 30, one a batch; Adam without debiasing, averages of 0.9 and 0.95, lr
    1, from 1 and 1.
    """
    data = [
        (torch.tensor([[float(x)]]).double(), torch.tensor([[2.0 * x + 30]]).double()) for x in X
    ]
    parts = (average_grad, average_sqr_grad, scale_by_rms, sgd_step)
    opt = chain(*parts, lr=1.0, mom=0.9, sqr_mom=0.95, eps=0.0)
    mine = Learner(nn.Linear(1, 1).double(), DataLoaders(data), squared, opt)
    start = mine.init()
    averages = {slot: tensors(values) for slot, values in PRIMED.items()}
    return mine, start.replace(
        params=tensors({"weight": 1.0, "bias": 1.0}), opt_state={**start.opt_state, **averages}
    )


def last_row_stays(state: State) -> State | None:
    """The workbook does not move the parameters by the last row of a pass, though its averages take
    it in.
    """
    if state.iter == 28:
        return state.replace(params=state.memory["before"])
    return state.remember("before", state.params) if state.iter == 27 else None


def anneal(
    rule: str, epochs: int, reference: float | None = STALE, carried: bool = True
) -> tuple[State, list[tuple[float, ...]]]:
    """The end, and (bias, weight) after every epoch."""
    mine, start = workbook()
    rows: list[tuple[float, ...]] = []

    def note(state: State) -> None:
        rows.append((state.params["bias"].item(), state.params["weight"].item()))

    annealer = AnnealOnGradRatio(rule, measure=sqr_avg_size, reset_on_fit=not carried)
    remembered = Sizes(reference)
    start = start.remember("anneal_on_grad_ratio", remembered)
    quirk = on(after_step=last_row_stays)
    return fit(mine, start, epochs, [annealer, quirk, on("note", 100, after_epoch=note)]), rows


def cuts(state: State) -> list[int]:
    """The epochs, from 1, after which lr was cut."""
    by_epoch = [*list(state.history.hypers["lr"])[::29], state.hyper["lr"]]
    return [epoch for epoch, (lr, later) in enumerate(pairwise(by_epoch), start=1) if later < lr]


SIXTY, ROWS = anneal("rise", 60)


def test_l17_lr_is_cut_after_the_epochs_of_the_workbook() -> None:
    """Some ratios are within 0.2 percent of the threshold: 2.00282 in epoch 17, 2.00322 in epoch
    50.
    """
    assert cuts(SIXTY) == [7, 8, 16, 17, 29, 34, 35, 43, 44, 50, 58]
    assert SIXTY.hyper["lr"] == 2.0**-22


@pytest.mark.parametrize(
    ("epoch", "bias", "weight"),
    [
        (1, 7.47801850898, 2.50164417589),
        (2, 14.9533581288, 2.51294982622),
        (6, 29.4866571752, 2.66211300327),
        (7, 29.1648709522, 2.82476680788),
        (8, 27.7007941979, 1.86206203132),
        (10, 28.0740005495, 2.02867101089),
        (17, 29.8860793713, 2.00116484499),
        (25, 29.9909397731, 2.00416328442),
        (30, 29.9999028479, 2.00030138904),
        (40, 29.9990729373, 2.0000269903),
        (60, 30.0000007672, 1.9999999586),
    ],
)
def test_l17_the_parameters_are_those_of_the_workbook(
    epoch: int, bias: float, weight: float
) -> None:
    assert ROWS[epoch - 1] == pytest.approx((bias, weight), rel=1e-10)


def test_l18_the_ratios_are_those_of_the_workbook() -> None:
    expected = [
        0.634623,
        0.570857,
        0.899409,
        1.89905,
        1.13282,
        0.8765,
        2.50283,
        2.01214,
        0.992544,
        0.479791,
    ]
    found = SIXTY.memory["anneal_on_grad_ratio"].ratios
    assert found[:10] == pytest.approx(expected, rel=1e-5)
    assert (found[14:17], len(found)) == (pytest.approx((1.26871, 3.36905, 2.00282), rel=1e-5), 60)


def test_l17_the_rule_of_the_text_starves_lr() -> None:
    """It cuts early and is not there after 60 epochs, where the workbook's rule has been
    for long.
    """
    end, rows = anneal("fall", 60)
    assert cuts(end) == [2, 4, 8, 24, 53]
    assert rows[-1] == pytest.approx((27.789900926125192, 2.0371871597039717), rel=1e-9)


def test_the_first_epoch_of_a_fresh_run_is_compared_with_nothing() -> None:
    end, _ = anneal("rise", 8, carried=False)
    assert cuts(end) == [7, 8]
    assert end.memory["anneal_on_grad_ratio"].ratios[:2] == pytest.approx((1.0, 0.570857), rel=1e-5)


def test_l37_pressing_run_again_goes_on() -> None:
    """Runs of 3 and 9 epochs are one of 12: no lr is given after the start."""
    mine, start = workbook()
    callbacks = [
        AnnealOnGradRatio(measure=sqr_avg_size, reset_on_fit=False),
        on(after_step=last_row_stays),
    ]
    halves = fit(mine, fit(mine, start, 3, callbacks), 9, callbacks)
    whole = fit(mine, start, 12, callbacks)
    assert cuts(halves) == cuts(whole) == [7, 8]
    assert torch.equal(halves.params["weight"], whole.params["weight"])
    assert sizes(halves) == sizes(whole)


@pytest.mark.parametrize(
    ("size", "reference", "rise", "fall"),
    [
        (4.0, 2.0, (False, 2.0), (False, 2.0)),
        (4.1, 2.0, (True, 2.0), (False, 2.0)),
        (1.5, 2.0, (False, 1.5), (False, 2.0)),
        (1.0, 2.0, (False, 1.0), (True, 1.0)),
        (float("inf"), 2.0, (True, 2.0), (False, 2.0)),
        (float("nan"), 2.0, (False, 2.0), (False, 2.0)),
    ],
)
def test_the_rules(size: float, reference: float, rise: Any, fall: Any) -> None:
    assert (cut_on_rise(size, reference), cut_on_fall(size, reference)) == (rise, fall)


def pulled(*gradients: Sequence[float]) -> tuple[Learner, list[Any]]:
    """A weight whose gradients are given: epochs of the same number of batches."""
    data = [torch.tensor([[float(index)]]) for index in range(len(gradients[0]))]
    mine = learner(
        one_weight(), DataLoaders([(x, x) for x in data]), lambda pred, y: pred.sum(), sgd(lr=1.0)
    )

    def pull(state: State) -> State:
        return state.replace(grads={"weight": torch.tensor([[gradients[state.epoch][state.iter]]])})

    return mine, [on("pull", 0, after_backward=pull)]


def test_the_size_of_an_epoch_is_the_root_mean_square_of_its_gradients() -> None:
    """Sizes 5, 1 and 13 / sqrt(2): ratios 1 / 5 and 13 / sqrt(2)."""
    mine, pull = pulled((1.0, -7.0), (1.0, 1.0), (-5.0, 12.0))
    end = fit(mine, mine.init(), 3, [*pull, AnnealOnGradRatio()])
    assert end.memory["anneal_on_grad_ratio"].ratios == pytest.approx((1, 0.2, 13 / 2**0.5))
    assert list(end.history.hypers["lr"]) == [1.0] * 6
    assert end.hyper["lr"] == 0.25


def test_the_gradient_is_measured_before_it_is_clipped() -> None:
    mine, pull = pulled((1.0,), (9.0,))
    end = fit(mine, mine.init(), 2, [GradientClip(0.5), *pull, AnnealOnGradRatio()])
    assert end.memory["anneal_on_grad_ratio"].ratios == pytest.approx((1, 9))


def test_a_tree_of_lrs_is_cut_as_a_whole_and_not_below_the_smallest() -> None:
    mine, pull = pulled((1.0,), (9.0,), (9.0,))
    start = mine.init().replace(hyper={"lr": {"weight": 0.8}})
    assert fit(mine, start, 3, [*pull, AnnealOnGradRatio(min_lr=0.1)]).hyper == {
        "lr": {"weight": 0.1}
    }


def test_no_gradient_at_all() -> None:
    """A reference of 0 is passed, and no number is divided by it."""
    mine, pull = pulled((0.0,), (0.0,), (1.0,))
    end = fit(mine, mine.init(), 3, [*pull, AnnealOnGradRatio()])
    assert end.memory["anneal_on_grad_ratio"].ratios[0] == 1
    assert end.hyper["lr"] == 0.25


def test_an_epoch_without_a_step_does_not_count() -> None:
    def skip(state: State) -> None:
        if state.epoch == 1:
            raise CancelStep(state)

    mine, pull = pulled((1.0,), (5.0,), (1.5,))
    end = fit(mine, mine.init(), 3, [*pull, on("skip", 0, before_step=skip), AnnealOnGradRatio()])
    assert end.memory["anneal_on_grad_ratio"].ratios == pytest.approx((1, 1.5))


def test_a_run_can_be_stopped_within_an_epoch_and_resumed() -> None:
    mine, pull = pulled((1.0, 2.0, 3.0), (9.0, 8.0, 7.0))

    class Stop(Exception):
        state: State

    def stop(state: State) -> None:
        if state.train_iter == 4:
            raise Stop

    callbacks = [*pull, AnnealOnGradRatio()]
    with pytest.raises(Stop) as caught:
        fit(mine, mine.init(), 2, [*callbacks, on("stop", 99, before_step=stop)])
    found, expected = (
        fit(mine, caught.value.state, 2, callbacks, resume=True),
        fit(mine, mine.init(), 2, callbacks),
    )
    assert_same_run(found, expected)
    assert sizes(found) == sizes(expected)


def test_nothing_of_an_epoch_that_was_cancelled_goes_into_the_next_run() -> None:
    """The gradients of the second run are 1; those of the first one's epoch, 9, have not been
    compared.
    """
    mine, pull = pulled((9.0, 9.0))
    callback = AnnealOnGradRatio(reset_on_fit=False)
    cancelled = fit(
        mine, mine.init(), 1, [*pull, callback, on("cancel", 99, after_step=raiser(CancelFit))]
    )
    mine, pull = pulled((1.0, 1.0))
    end = fit(mine, cancelled, 1, [*pull, callback])
    assert end.memory["anneal_on_grad_ratio"].reference == pytest.approx(1.0)


def test_the_state_given_is_not_touched() -> None:
    mine = learner()
    kept = Kept(mine.init())
    fit(mine, kept.state, 2, [AnnealOnGradRatio()])
    kept.check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "rice"}, "no rule 'rice'. Did you mean 'rise'"),
        ({"threshold": 1.0}, "threshold must be above 1, got 1.0"),
        ({"factor": 1.0}, "factor divides lr, so it must be above 1, got 1.0"),
        ({"min_lr": -1.0}, "min_lr must be 0 or more"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"AnnealOnGradRatio: .*{message}"):
        AnnealOnGradRatio(**options)


def test_a_scheduled_lr_cannot_be_annealed() -> None:
    mine = learner()
    with pytest.raises(
        ValueError, match="AnnealOnGradRatio: 'lr' is scheduled by 'param_scheduler'"
    ):
        fit(mine, mine.init(), 1, [AnnealOnGradRatio(), ParamScheduler({"lr": Constant(0.1)})])


def test_the_measure_of_the_workbook_needs_an_optimizer_that_squares() -> None:
    assert sqr_avg_size(learner(opt=adamw()).init()) == 0
    with pytest.raises(ValueError, match="sqr_avg_size: the optimizer keeps no 'sqr_avg'"):
        sqr_avg_size(learner().init())
