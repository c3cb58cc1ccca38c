"""What a state says of itself."""

import torch

from loop import State


def test_it_fits_on_a_line_whatever_the_hypers() -> None:
    """A rate for every parameter used to fill the screen."""
    rates = {f"layer.{index}.weight": 0.5 + index for index in range(400)}
    state = State({"w": torch.zeros(2, 3)}, {}, {}, {"lr": rates, "mom": 0.9}, seed=4)
    assert repr(state) == (
        "State(epoch 0 of 0, train_iter 0, seed 4, 1 params of 6 elements, "
        "hyper {'lr': 400 values from 0.5 to 399.5, 'mom': 0.9}, 0 rows of history)"
    )


def test_a_hyper_that_is_a_tensor_is_its_number() -> None:
    state = State({}, {}, {}, {"lr": torch.tensor(0.1), "wd": torch.zeros(2, 3)})
    assert "hyper {'lr': 0.1, 'wd': tensor of shape (2, 3)}" in repr(state)
    assert "lr=0.1, wd=tensor of shape (2, 3)" in state._repr_html_()


def test_a_tree_that_is_no_numbers() -> None:
    state = State({}, {}, {}, {"lr": {"a": torch.tensor(1.0), "b": 2.0}, "none": {}})
    assert "hyper {'lr': 2 values, 'none': 0 values}" in repr(state)
