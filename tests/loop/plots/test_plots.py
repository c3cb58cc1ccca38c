"""Pictures and the printed loop."""

import subprocess
import sys
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from functional_sgd.schedules import Linear, Stretch, one_cycle
from loop import (
    GradientClip,
    History,
    ParamScheduler,
    Progress,
    TerminateOnNaN,
    events,
    fit,
    fit_one_cycle,
    plot_losses,
    plot_predictions,
    plot_schedule,
    plot_schedules,
    show_loop,
)
from tests.loop.helpers import EVENTS, SCOPES, everywhere, learner, loaders, losses, on

MINE = learner()
RUN = fit_one_cycle(MINE, MINE.init(), 2, lr=0.1)
IMAGES = torch.linspace(0, 1, 4 * 9).reshape(4, 1, 3, 3)
PRED = torch.eye(4)


@pytest.fixture(autouse=True)
def _no_global_figures() -> Any:
    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before == []


def lines(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> (x, y) of every line in the first axes."""
    return {
        str(line.get_label()): (
            np.asarray(line.get_xdata()).tolist(),
            np.asarray(line.get_ydata()).tolist(),
        )
        for line in figure.axes[0].lines
    }


def test_the_losses_of_training_and_validation() -> None:
    found = lines(plot_losses(RUN.history))
    assert found["training, each batch"] == ([0, 1, 2, 3, 4, 5], pytest.approx(losses(RUN)))
    assert found["training, smoothed"] == (
        [0, 1, 2, 3, 4, 5],
        pytest.approx(RUN.history.smooth_losses()),
    )
    assert found["validation"] == ([3, 6], pytest.approx(RUN.history.column("valid_loss")))


def test_a_state_is_as_good_as_its_history() -> None:
    assert lines(plot_losses(RUN)) == lines(plot_losses(RUN.history))
    assert lines(plot_schedules(RUN)) == lines(plot_schedules(RUN.history))
    with pytest.raises(TypeError, match="plot_losses: expected a State or its history, got Learn"):
        plot_losses(MINE)  # type: ignore[arg-type]


def test_a_path_in_the_place_of_skip() -> None:
    with pytest.raises(TypeError, match=r"skip must be a number.*got 'x\.png'.*savefig\(path\)"):
        plot_losses(RUN.history, "x.png")  # type: ignore[arg-type]


def test_the_losses_without_the_first_batches() -> None:
    found = lines(plot_losses(RUN.history, skip=4))
    assert found["training, smoothed"] == ([4, 5], pytest.approx(RUN.history.smooth_losses()[4:]))


def test_the_losses_without_validation() -> None:
    mine = learner(data=loaders(valid=None))
    assert list(lines(plot_losses(fit(mine, mine.init(), 1).history))) == [
        "training, each batch",
        "training, smoothed",
    ]


def test_the_losses_have_labels() -> None:
    (axes,) = plot_losses(RUN.history).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("batch", "loss")
    assert axes.get_legend() is not None


def test_the_schedules_that_changed() -> None:
    figure = plot_schedules(RUN.history)
    assert sorted(axes.get_ylabel() for axes in figure.axes) == ["lr", "mom"]
    for axes in figure.axes:
        found = np.asarray(axes.lines[0].get_ydata()).tolist()
        assert found == pytest.approx(list(RUN.history.hypers[axes.get_ylabel()]))


def test_the_schedules_of_a_run_without_any() -> None:
    assert [
        axes.get_ylabel() for axes in plot_schedules(fit(MINE, MINE.init(), 1).history).axes
    ] == ["lr"]


def test_the_schedule_of_later_batches_is_drawn_where_they_are() -> None:
    there = on(before_batch=lambda state: state.replace(hyper={"lr": 0.1 + state.train_iter}))
    late = fit(MINE, fit(MINE, MINE.init().replace(hyper={}), 1), 1, [there])
    (axes,) = plot_schedules(late.history).axes
    (line,) = axes.lines
    found = [x for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if y == y]
    assert found == [3, 4, 5]


def test_the_schedules_that_are_asked_for() -> None:
    assert [axes.get_ylabel() for axes in plot_schedules(RUN.history, ["mom"]).axes] == ["mom"]


def test_a_schedule_for_each_layer_shows_the_last() -> None:
    mine = learner(data=loaders(train=2, valid=None))
    schedules = {"lr": {"bias": Linear(0.1, 0.0), "weight": Linear(0.2, 0.0)}}
    figure = plot_schedules(fit(mine, mine.init(), 1, [ParamScheduler(schedules)]).history)
    assert np.asarray(figure.axes[0].lines[0].get_ydata()).tolist() == pytest.approx([0.2, 0.1])


@pytest.mark.parametrize("plot", [plot_losses, plot_schedules])
def test_an_empty_history_is_an_empty_picture(plot: Any) -> None:
    assert isinstance(plot(History()), Figure)


def test_a_schedule_from_end_to_end() -> None:
    ((x, y),) = lines(plot_schedule(one_cycle(0.1), points=5, name="lr")).values()
    assert x == [0, 0.25, 0.5, 0.75, 1]
    assert y == pytest.approx([one_cycle(0.1)(position) for position in x])


def test_a_schedule_has_labels() -> None:
    (axes,) = plot_schedule(one_cycle(0.1), name="lr").axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("share of the run", "lr")


def test_several_schedules_over_steps() -> None:
    several = {"up": Stretch(Linear(0, 1), 4), "down": Stretch(Linear(1, 0), 2)}
    figure = plot_schedule(several, points=3, name="lr", steps=4)
    assert lines(figure) == {"up": ([0, 2, 4], [0, 0.5, 1]), "down": ([0, 2, 4], [1, 0, 0])}
    assert figure.axes[0].get_xlabel() == "step"


def titles(targets: list[int], **rest: Any) -> list[tuple[str, str]]:
    """(title, colour) of every picture."""
    figure = plot_predictions(IMAGES, torch.tensor(targets), PRED, columns=3, rows=2, **rest)
    return [(axes.get_title(), axes.title.get_color()) for axes in figure.axes]


def test_predictions_that_are_right_are_black_and_wrong_ones_red() -> None:
    assert titles([0, 1, 0, 3])[:4] == [
        ("0", "black"),
        ("1", "black"),
        ("2, not 0", "crimson"),
        ("3", "black"),
    ]


def test_predictions_with_names() -> None:
    assert [title for title, _ in titles([0, 1, 2, 0], classes="abcd")][:4] == [
        "a",
        "b",
        "c",
        "d, not a",
    ]


def test_predictions_fill_the_grid_as_far_as_they_go() -> None:
    figure = plot_predictions(IMAGES, torch.arange(4), PRED, columns=3, rows=2)
    assert [len(axes.images) for axes in figure.axes] == [1, 1, 1, 1, 0, 0]


def test_predictions_of_coloured_images() -> None:
    figure = plot_predictions(
        torch.rand(2, 3, 5, 4, generator=torch.Generator()), torch.arange(2), PRED, rows=1
    )
    assert figure.axes[0].images[0].get_array().shape == (5, 4, 3)


def test_a_flat_image_is_no_division_by_zero() -> None:
    figure = plot_predictions(torch.ones(1, 1, 2, 2), torch.tensor([0]), PRED, columns=2, rows=1)
    assert np.isfinite(np.asarray(figure.axes[0].images[0].get_array())).all()


@pytest.mark.parametrize(
    "figure", [plot_losses(RUN.history), plot_schedules(RUN.history), plot_schedule(Linear(0, 1))]
)
def test_every_picture_can_be_saved(figure: Figure, tmp_path: Any) -> None:
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def printed(capsys: pytest.CaptureFixture[str], *callbacks: Any) -> list[str]:
    show_loop(learner(callbacks=callbacks))
    return capsys.readouterr().out.splitlines()


def test_the_printed_loop_has_every_event_and_scope(capsys: pytest.CaptureFixture[str]) -> None:
    words = {
        line.split()[0].rstrip(":")
        for line in printed(capsys, everywhere(lambda event, state: None))
    }
    assert words >= {*EVENTS, *SCOPES, "[predict]", "[loss]", "[gradients]", "[update]"}


def test_the_printed_loop_leaves_out_what_happens_after_signals_if_nobody_listens(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert not [line for line in printed(capsys) if "cancel" in line]


def test_the_printed_events_are_in_the_order_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    delivered: list[str] = []
    spy = everywhere(lambda event, state: delivered.append(event))
    mine = learner(data=loaders(train=1, valid=1))
    fit(mine, mine.init(), 1, [spy])
    words = [line.split()[0].rstrip(":") for line in printed(capsys, spy)]
    assert [word for word in words if word in EVENTS and "cancel" not in word] == delivered


def test_the_printed_callbacks_are_in_the_order_of_their_calls(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = printed(
        capsys, Progress(), on("late", 100, after_loss=print), TerminateOnNaN(), GradientClip()
    )
    assert [line.strip() for line in found if "after_loss" in line] == [
        "after_loss: terminate_on_nan, recorder, late"
    ] * 2
    assert [line.strip() for line in found if "before_step" in line] == [
        "before_step: gradient_clip"
    ]


def test_the_printed_loop_has_the_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, Progress())[0] == "fit  around it: progress"


def test_the_printed_loop_says_what_is_repeated_and_what_depends(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = [line.strip() for line in printed(capsys)]
    assert "epoch  (for each epoch)" in found
    assert "batch  (for each training batch)" in found
    assert "validate  (if there is validation data)" in found
    assert "step  (if there are gradients)" in found


def test_a_class_in_the_printed_loop_is_an_error() -> None:
    with pytest.raises(TypeError, match="got the class"):
        show_loop(learner(callbacks=[Progress]))


def test_the_list_of_events_is_a_tuple_without_repetition() -> None:
    assert isinstance(events(), tuple)
    assert len(set(events())) == len(events())
    assert events()[0] == "before_fit"
    assert events()[-1] == "after_fit"


def test_importing_the_loop_opens_no_display() -> None:
    code = "import sys, loop; print('matplotlib.pyplot' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert found.stdout.strip() == "False"
