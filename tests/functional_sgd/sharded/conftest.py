"""Two ranks for the tests in this folder, started once for all of them."""

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks, started


@pytest.fixture(scope="package")
def ranks() -> Iterator[Ranks]:
    """A file that needs more of them has its own."""
    with started(2) as processes:
        yield processes
