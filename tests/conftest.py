"""Settings for every test: one thread, no display. Helpers are imported as `from tests.catalogue
import ...`.
"""

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No compiled code is left over from other tests, and none is left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def scalars_in_double() -> Iterator[None]:
    """Where torch.optim keeps scalars in the default dtype (NAdam, ASGD), that is float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Functions by name: an id with an address in it differs between the processes that share the
    tests.
    """
    return str(getattr(val, "__name__", type(val).__name__)) if callable(val) else None
