"""Leaves that are cut over two processes: the numbers of one process, and nothing moves."""

from collections.abc import Iterator

import pytest

from tests.catalogue import OPTIMIZERS
from tests.functional_sgd.sharded.helpers import EXECUTORS, LAYOUTS, compared, line
from tests.ranks import Ranks, started


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with started(2) as processes:
        yield processes


def far_from_one_process(layout: str, way: str) -> dict[str, float]:
    """The optimizers of the catalogue that end elsewhere, and how far."""
    mesh, (placements, of_grads) = line(), LAYOUTS[layout]
    found = {}
    for name, make in OPTIMIZERS.items():
        try:
            found[name] = compared(make(), way, mesh, placements, of_grads)
        except Exception as error:
            raise AssertionError(f"{name}: {error!r}") from error
    return {name: one for name, one in found.items() if not one <= 1e-14}


@pytest.mark.parametrize("way", EXECUTORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_catalogue_on_pieces_gives_the_numbers_of_one_process(
    ranks: Ranks, layout: str, way: str
) -> None:
    assert ranks(far_from_one_process, layout, way) == [{}, {}]
