"""What a notebook, and a terminal, show of the things that a run is made of."""

from typing import Any

import pytest
import torch
from torch import nn

from functional_sgd import momentum
from loop import (
    Batches,
    DataLoaders,
    History,
    Learner,
    LRFind,
    State,
    ablate,
    dataloaders,
    fit,
    lr_find,
    summary,
)
from loop.callbacks import GradientClip
from loop.plots.figure import new_figure
from tests.functional_sgd.test_notebook import cells
from tests.loop.helpers import learner

PNG = b"\x89PNG\r\n\x1a\n"
MINE = learner(callbacks=[GradientClip(1.0)])
START = MINE.init()
END = fit(MINE, START, 3)
EVERYTHING = [
    MINE,
    START,
    END,
    END.history,
    History(),
    MINE.data,
    Batches((torch.zeros(5, 2),), 2),
    dataloaders(range(10), batch_size=4),
    DataLoaders(iter([torch.zeros(2)])),
    summary(MINE, START),
    ablate(MINE, START, 1),
]


@pytest.mark.parametrize("value", EVERYTHING, ids=lambda value: type(value).__name__)
def test_no_tensor_and_no_address_is_printed(value: Any) -> None:
    html = value._repr_html_()
    assert html.startswith("<table>")
    for text in (repr(value), html):
        assert "tensor(" not in text
        assert " at 0x" not in text


def test_the_history_is_its_rows() -> None:
    titles, *rows = cells(END.history._repr_html_())
    assert titles == ["epoch", "train_iter", "train_loss", "valid_loss"]
    assert rows[2][:3] == ["2", "9", f"{END.history.rows[2]['train_loss']:.6f}"]


def test_what_was_not_measured_is_a_dash() -> None:
    history = History(rows=({"epoch": 0, "loss": None}, {"epoch": 1, "accuracy": 0.5}))
    assert cells(history._repr_html_())[1:] == [["0", "-", "-"], ["1", "-", "0.500000"]]


def test_a_history_in_a_line() -> None:
    assert repr(History()) == "History(0 rows, 0 losses)"
    history = History(losses=END.history.losses, rows=({"epoch": 4, "note": "warm"},))
    assert repr(history) == "History(1 rows, 9 losses, epoch 4, note warm)"


def test_a_state_has_its_table_below() -> None:
    facts = dict(row for row in cells(END._repr_html_()) if len(row) == 2)
    assert facts["training batches"] == "9"
    assert facts["epochs"] == "3"
    assert END._repr_html_().endswith(END.history._repr_html_())
    assert START._repr_html_().count("<table>") == 1


def test_a_state_of_nothing() -> None:
    assert dict(cells(State({}, {}, {}, {})._repr_html_()))["params"] == "-"


def test_a_learner_names_its_parts() -> None:
    data = DataLoaders(Batches((torch.zeros(6, 2), torch.zeros(6)), 4, shuffle=True))
    mine = Learner(nn.Linear(2, 1), data, nn.functional.mse_loss, momentum(lr=0.1))
    assert repr(mine) == (
        "Learner(model=Linear, train=Batches((float32 6 x 2, float32 6), batch_size=4, "
        "shuffle=True), valid=None, loss=mse_loss, opt=chain(average_grad, sgd_step, lr=0.1, "
        "mom=0.9), metrics=[], callbacks=[])"
    )
    assert dict(cells(mine._repr_html_()))["loss"] == "mse_loss"


def test_loaders_say_how_long_they_are() -> None:
    rows = cells(dataloaders(range(10), batch_size=4)._repr_html_())
    assert rows[1:] == [["train", "EpochLoader", "10", "3"], ["valid", "-", "", ""]]


def test_a_loader_whose_length_fails_is_shown_without() -> None:
    class Broken:
        def __len__(self) -> int:
            raise ZeroDivisionError

    assert repr(DataLoaders(Broken())) == "DataLoaders(train=Broken, valid=None)"  # type: ignore[arg-type]
    assert cells(DataLoaders(Broken())._repr_html_())[1] == ["train", "Broken", "-", "-"]  # type: ignore[arg-type]


def test_lr_find_is_its_curve() -> None:
    found = lr_find(MINE, START, iterations=40)
    data, size = found._repr_png_()
    assert data.startswith(PNG)
    assert size == {"width": 600}
    assert repr(found).startswith(f"LRFind({len(found.lrs)} batches, lr 1.00e-07 to ")
    assert f"valley {found.valley:.2e}" in repr(found)


def test_a_search_that_found_nothing() -> None:
    nothing = LRFind((), (), 10)
    assert repr(nothing) == "LRFind(0 batches: too few points)"
    assert nothing._repr_png_()[0].startswith(PNG)


def test_a_figure_is_a_picture_of_twice_its_pixels() -> None:
    figure: Any = new_figure(3, 2)
    data, size = figure._repr_png_()
    assert data.startswith(PNG)
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (600, 400)
    assert size == {"width": 300}
    assert figure.dpi == 100


def test_a_summary_has_the_cells_of_its_text() -> None:
    found = summary(MINE, START)
    for row in cells(found._repr_html_()):
        assert all(cell in str(found) for cell in row if cell not in ("elements", "memory"))
