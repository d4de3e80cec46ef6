"""A real etcd per test, workers that register with it, and a watcher whose events can be waited for."""

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
import pytest_asyncio

from kvbaton.v1.worker_pb2 import (
    WORKER_ROLE_PREFILL,
    WORKER_STATE_SERVING,
    Incarnation,
    WorkerRecord,
)
from services.registry.etcd import EtcdClient, EtcdError
from services.registry.lease import LeaseKeeper
from services.registry.local import LocalEtcd, find_binary
from services.registry.publisher import RecordPublisher
from services.registry.records import WorkerKey
from services.registry.watcher import RegistryEvent, RegistryWatcher
from tests.support import freezing

NAMESPACE = "test"
TTL = 2

Event = TypeVar("Event")


@dataclass
class Worker:
    """One worker process's registration."""

    client: EtcdClient
    keeper: LeaseKeeper
    publisher: RecordPublisher
    record: WorkerRecord

    @property
    def key(self) -> WorkerKey:
        return WorkerKey.of(NAMESPACE, self.record)


@dataclass
class Frontend:
    """A watcher and every event it has delivered."""

    watcher: RegistryWatcher
    seen: list[RegistryEvent] = field(default_factory=list[RegistryEvent])

    async def collect(self) -> None:
        async for event in self.watcher.events():
            self.seen.append(event)

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.seen if isinstance(event, kind)]

    def names(self) -> set[str]:
        return {key.instance_id for key in self.watcher.workers}


class Harness:
    """What the tests do to a registry."""

    def __init__(self, etcd: LocalEtcd, folder: Path) -> None:
        self.etcd = etcd
        self.folder = folder

    @staticmethod
    def record(instance_id: str = "prefill-0", created_us: int = 1000) -> WorkerRecord:
        return WorkerRecord(
            instance_id=instance_id,
            role=WORKER_ROLE_PREFILL,
            state=WORKER_STATE_SERVING,
            incarnation=Incarnation(created_us=created_us, uuid=f"{created_us:032x}"),
            grpc_endpoint=f"10.0.0.1:{created_us}",
        )

    @asynccontextmanager
    async def worker(self, record: WorkerRecord, *, publish: bool = True) -> AsyncGenerator[Worker]:
        async with (
            EtcdClient([self.etcd.endpoint], deadline=1.0) as client,
            LeaseKeeper(client, ttl=TTL) as keeper,
            RecordPublisher(client, keeper, NAMESPACE) as publisher,
        ):
            if publish:
                assert await publisher.publish(record)
            yield Worker(client, keeper, publisher, record)

    @asynccontextmanager
    async def frontend(
        self, client: EtcdClient | None = None, *, silence_deadline: float = 1.5, audit_interval: float = 60.0
    ) -> AsyncGenerator[Frontend]:
        async with AsyncExitStack() as stack:
            if client is None:
                client = await stack.enter_async_context(EtcdClient([self.etcd.endpoint], deadline=1.0))
            watcher = await stack.enter_async_context(
                RegistryWatcher(
                    client,
                    NAMESPACE,
                    ping_interval=0.5,
                    silence_deadline=silence_deadline,
                    audit_interval=audit_interval,
                )
            )
            frontend = Frontend(watcher)
            collecting = asyncio.create_task(frontend.collect())
            try:
                async with asyncio.timeout(5):
                    await watcher.wait_synced()
                yield frontend
            finally:
                collecting.cancel()

    @staticmethod
    async def until(condition: Callable[[], object], within: float = 5.0) -> float:
        """Seconds until the condition held; fails after `within`."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < within, f"not within {within} s"
            await asyncio.sleep(0.01)
        return time.monotonic() - started

    @staticmethod
    async def until_async(condition: Callable[[], Awaitable[object]], within: float = 5.0) -> None:
        """As `until`; an etcd that can't be reached counts as not yet."""
        started = time.monotonic()
        while True:
            with contextlib.suppress(EtcdError):
                if await condition():
                    return
            assert time.monotonic() - started < within, f"not within {within} s"
            await asyncio.sleep(0.02)

    async def etcdctl(self, *arguments: str) -> str:
        def call() -> str:
            command = [str(find_binary("etcdctl")), f"--endpoints={self.etcd.endpoint}", *arguments]
            environment = os.environ | {"ETCDCTL_API": "3"}
            return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

        return await asyncio.to_thread(call)

    def freeze(self) -> None:
        freezing.freeze(self.etcd.pid)

    def thaw(self) -> None:
        freezing.thaw(self.etcd.pid)

    async def restart(self, *, with_data: bool) -> None:
        """A new etcd process on the same port."""
        port = int(self.etcd.endpoint.rpartition(":")[2])
        self.etcd = LocalEtcd(self.folder if with_data else self.folder.with_name("fresh"), port=port)
        await self.etcd.start()


@pytest_asyncio.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    etcd = LocalEtcd(tmp_path / "etcd")
    await etcd.start()
    harness = Harness(etcd, tmp_path / "etcd")
    yield harness
    await harness.etcd.stop()


@pytest.fixture
def ttl() -> int:
    """Lease time of every test worker, in seconds."""
    return TTL
