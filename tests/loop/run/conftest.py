"""What several tests of the run need."""

import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def as_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are run as they are: for what the loop does with them, whatever code is made of them,
    which takes two seconds.
    """
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs: graph)


@pytest.fixture
def quiet() -> Iterator[None]:
    """What the compiler has to say about itself is no concern of these tests."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning)
        yield
