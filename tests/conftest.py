"""For all tests."""

from __future__ import annotations

import pytest

from services import heap


@pytest.fixture(scope="module", autouse=True)
def short_collections() -> None:
    """A full collection stops every event loop of this process, frontend, workers and clients alike.

    Behind all that imports, hypothesis and earlier modules have left it took up to 0.8 s, longer than deadlines that
    tests are about.
    """
    heap.settle()
