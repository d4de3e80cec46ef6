"""Real processes around simulated engines: one etcd for the session, a namespace for each test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.etcd import etcd_endpoint
from tests.support.processes import Processes

__all__ = ["etcd_endpoint"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.chaos)


@pytest.fixture
def environment() -> Mapping[str, str]:
    """What the processes get beside the test's own environment."""
    return {}


@pytest_asyncio.fixture
async def processes(etcd_endpoint: str, tmp_path: Path, environment: Mapping[str, str]) -> AsyncIterator[Processes]:
    """Nothing runs yet; whatever the test starts has ended when it ends."""
    processes = Processes(etcd_endpoint, tmp_path, {"XDG_CACHE_HOME": str(tmp_path / "cache"), **environment})
    try:
        yield processes
    finally:
        await asyncio.to_thread(processes.stop)
