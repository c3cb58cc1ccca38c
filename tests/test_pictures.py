"""What examples/pictures.py and parabola.py draw: averages of noisy points, and the loop."""

import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loop import events
from loop.run.events import STAGES


@pytest.fixture(scope="module")
def pictures() -> Iterator[Any]:
    """The example as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
        yield importlib.import_module("pictures")


@pytest.fixture(scope="module")
def parabola(pictures: Any) -> Any:
    """The points with their averages."""
    return importlib.import_module("parabola")


@pytest.fixture(scope="module")
def y(parabola: Any) -> Tensor:
    """A hundred points."""
    found: Tensor = parabola.points(0)[1]
    return found


def test_b12_the_first_unbiased_average_is_the_first_point(parabola: Any, y: Tensor) -> None:
    """It is divided by 1 - beta**n, with n of averages so far: the place of a point in the data has
    no say in it.
    """
    found = parabola.averages(y, 0.7, debiased=True)
    torch.testing.assert_close(found[0], y[0], rtol=1e-15, atol=0)
    torch.testing.assert_close(found[1], (0.7 * 0.3 * y[0] + 0.3 * y[1]) / (1 - 0.7**2))


def test_b13_without_debias_the_first_average_is_near_zero(parabola: Any, y: Tensor) -> None:
    assert parabola.averages(y, 0.99, debiased=False)[0] == pytest.approx(
        0.01 * y[0].item(), rel=1e-12
    )


def test_b13_a_larger_beta_lags_more(parabola: Any) -> None:
    """The averages of a parabola have their top later and later: by beta / (1 - beta) steps, while
    that is few.
    """
    x = torch.linspace(-4, 4, 100, dtype=torch.float64)
    tops = [
        int(parabola.averages(1 - (x / 3) ** 2, beta, debiased=False).argmax())
        for beta in (0.5, 0.7, 0.9, 0.99)
    ]
    assert all(earlier < later for earlier, later in itertools.pairwise([49, *tops]))
    assert [top - 49.5 for top in tops[:2]] == pytest.approx([1, 0.7 / 0.3], abs=1)


def test_n44_the_loop_is_drawn_with_every_event_and_stage(pictures: Any) -> None:
    """Each scope is a box; the lines of it are those of the drawing that the machine runs by."""
    axes = pictures.loop_picture().axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert {*events()} <= {*texts}
    assert {f"[{stage}]" for stage in STAGES} <= {*texts}
    assert len(axes.patches) == 8  # fit, epoch, train, batch, backward, step, validate, batch
    assert texts[0].startswith("fit")
    assert texts[-1] == "after_fit"
