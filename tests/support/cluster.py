"""Frontend and workers in one process, over real sockets and a real etcd, around fake engines."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvbaton.client import Client
from kvbaton.v1 import worker_pb2
from services.config.common import EtcdFlags
from services.config.frontend import FrontendConfig
from services.config.worker import WorkerConfig
from services.frontend.server import Frontend
from services.modes import contract_of
from services.requests import Role
from services.worker.engines.simulated import Addresses, SimulatedEngine, SimulatedOptions
from services.worker.host import WorkerHost
from tests.support.fake_engine import Behaviour, FakeEngine, Rooms
from tests.support.ports import free_port
from tests.support.waiting import eventually

MODEL = "fake-model"


@dataclass
class HostedWorker:
    """One worker of the test cluster."""

    host: WorkerHost
    engine: FakeEngine
    config: WorkerConfig
    task: asyncio.Task[int]
    simulator: SimulatedEngine | None = None
    """In place of `engine`, for a worker that was started with options of one."""

    @property
    def instance_id(self) -> str:
        return self.host._core.instance_id  # pyright: ignore[reportPrivateUsage]

    def rank_requests(self) -> list[int]:
        """Requests that each dp rank of the simulated engine has had, its warm-up included."""
        assert self.simulator is not None
        return [rank.counters.requests for rank in self.simulator.scheduler.ranks]

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.config.port}"


class FakeCluster:
    """Use it as an async context manager; then `start_worker` as often as needed."""

    def __init__(self, etcd_endpoint: str, namespace: str, model_folder: Path, **frontend: object) -> None:
        self.etcd = EtcdFlags(etcd_endpoints=etcd_endpoint, namespace=namespace)
        self.rooms = Rooms()
        self.workers: list[HostedWorker] = []
        self._model_folder = model_folder
        # Tests that count an engine's requests want no others there.
        config = FrontendConfig(port=0, http_port=0, check_pairs=False, ready_queue_timeout=0.0, etcd=self.etcd)
        self._frontend_config = replace(config, **frontend)  # type: ignore[arg-type]
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        self.frontend = await self._stack.enter_async_context(Frontend(self._frontend_config))
        self.client = await self._stack.enter_async_context(self.connect())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()
        for worker in self.workers:
            worker.host.stop()
        await asyncio.gather(*(worker.task for worker in self.workers), return_exceptions=True)

    def connect(self) -> Client:
        """A client of the frontend."""
        return Client(f"127.0.0.1:{self.frontend.grpc_port}", timeout=20.0)

    async def start_worker(
        self,
        role: Role,
        behaviour: Behaviour | None = None,
        *,
        built: bool = True,
        bootstrap_answers: bool = True,
        engine: Any = None,
        pool_tokens: int = 4096,
        model_folder: Path | None = None,
        simulated: SimulatedOptions | None = None,
        **options: object,
    ) -> HostedWorker:
        """A worker; with `built=False` its engine stays unbuilt until the test says `engine_built`.

        `engine` takes the fake one's place; one with a bootstrap server of its own needs no `bootstrap_answers`.
        `model_folder` is where its tokenizer is, if not where the cluster's is. With `simulated` it has a simulated
        engine, which has prefix caches, KV events and dp ranks.
        """
        engine = engine or FakeEngine(role, self.rooms, behaviour, pool_tokens=pool_tokens)
        config = WorkerConfig(
            role=role,
            port=free_port(),
            system_port=free_port(),
            disaggregation_bootstrap_port=free_port(),
            drain_grace=0.2,
            lease_ttl=2.0,
            model_path=MODEL,
            etcd=self.etcd,
        )
        config = replace(config, **options)  # type: ignore[arg-type]
        simulator = None
        if simulated is not None:
            addresses = Addresses(bootstrap_port=config.disaggregation_bootstrap_port)
            simulator = SimulatedEngine(role, simulated, addresses)
            simulator.start()
        elif role is Role.PREFILL and bootstrap_answers:
            await self._stack.enter_async_context(_bootstrap_server(config.disaggregation_bootstrap_port))
        identity = worker_pb2.ModelIdentity(name=config.served_model_name or MODEL, path=MODEL, revision="r1")
        host = WorkerHost(config, contract_of, lambda: (model_folder or self._model_folder, identity))
        listening = asyncio.Event()
        worker = HostedWorker(host, engine, config, asyncio.create_task(host.run(listening.set)), simulator)
        self.workers.append(worker)
        if built:
            host.engine_built(simulator or engine)
        await eventually(lambda: listening.is_set() or worker.task.done(), what="listening")
        if not listening.is_set():
            worker.task.result()  # why it ended, where it is an error
        return worker

    async def start_pair(self) -> tuple[HostedWorker, HostedWorker]:
        """A prefill and a decode worker, routable."""
        prefill, decode = await self.start_worker(Role.PREFILL), await self.start_worker(Role.DECODE)
        await self.routable(2)
        return prefill, decode

    async def routable(self, count: int, *, within: float = 10.0) -> None:
        """Waits until the frontend can route to exactly `count` workers."""
        await eventually(
            lambda: sum(worker.routable for worker in self.frontend.workers.all()) == count,
            within=within,
            what=f"{count} routable workers",
        )


@contextlib.asynccontextmanager
async def _bootstrap_server(port: int):  # type: ignore[no-untyped-def]
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK")
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", port)
    try:
        yield
    finally:
        server.close()
