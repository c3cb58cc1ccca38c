"""A model while a run has it, and runs that nobody ends."""

import gc
import sys
from typing import Any

import pytest

from loop import trace
from tests.loop.helpers import learner


def test_a_trace_that_goes_with_its_model_goes_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in one cycle: the layers are gone from the table of running ones before it closes."""
    said: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    mine = learner()
    running = trace(mine, mine.init())
    next(running)
    mine.model.__dict__["running"] = running
    del mine, running
    gc.collect()
    assert not said
