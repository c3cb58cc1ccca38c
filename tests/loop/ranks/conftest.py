"""Groups of ranks for the tests in this folder, started once for all of them."""

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks, started


@pytest.fixture(scope="package")
def ranks() -> Iterator[Ranks]:
    """Two."""
    with started(2) as processes:
        yield processes


@pytest.fixture(scope="package")
def three() -> Iterator[Ranks]:
    """Three."""
    with started(3) as processes:
        yield processes


@pytest.fixture(scope="package")
def four() -> Iterator[Ranks]:
    """Four."""
    with started(4) as processes:
        yield processes
