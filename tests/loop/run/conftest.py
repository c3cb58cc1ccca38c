"""What several tests of the run need."""

import pytest
import torch


@pytest.fixture
def as_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are run as they are: for what the loop does with them, whatever code is made of them,
    which takes two seconds.
    """
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs: graph)
