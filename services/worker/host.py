"""A worker from listening to gone: loading, warm-up, proof, record, service, withdrawal, drain.

Runs in the serving loop. The engine is built elsewhere (the process's main thread) and handed in by `engine_built`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import grpc.aio
import structlog

from kvbaton.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    bootstrap_pb2,
    bootstrap_pb2_grpc,
    embed_pb2,
    embed_pb2_grpc,
    generate_pb2,
    generate_pb2_grpc,
    health_pb2,
    health_pb2_grpc,
    kv_events_pb2,
    kv_events_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    worker_pb2,
)
from services.config.worker import WorkerConfig
from services.grpc_health import SERVICE_NAME as GRPC_HEALTH_NAME
from services.http_server import HttpServer
from services.models.tokenizer_files import find_tokenizer_files
from services.registry.etcd import EtcdClient
from services.registry.lease import LeaseKeeper
from services.registry.publisher import NewerIncarnationError, RecordPublisher
from services.registry.records import WorkerKey
from services.requests import Limits, Role
from services.telemetry.metrics import watch_event_loop
from services.transport import bind, join_host_port, make_channel, make_server
from services.worker import registration, system_http
from services.worker.advertise import bootstrap_host
from services.worker.core import Loaded
from services.worker.engine_host import EngineHost
from services.worker.engines.protocol import Engine
from services.worker.health.canary import Canary
from services.worker.health.payload import HealthCheck
from services.worker.kv_events.feed import feed
from services.worker.kv_events.hub import KvEventHub
from services.worker.leg_runner import LegRunner
from services.worker.role import RoleContract
from services.worker.servicers.admin import AdminServicer
from services.worker.servicers.embed import EmbedServicer
from services.worker.servicers.generate import GenerateServicer
from services.worker.servicers.health import HealthServicer
from services.worker.servicers.kv_events import KvEventServicer
from services.worker.servicers.model import ModelServicer
from services.worker.servicers.session import SessionServicer

log = structlog.get_logger()
T = TypeVar("T")

# After the drain's deadline, seconds for the engine to drop what was aborted.
_ABORT_GRACE = 10.0
_OWN_PROBE_TIMEOUT = 60.0

_SERVING, _UNHEALTHY = worker_pb2.WORKER_STATE_SERVING, worker_pb2.WORKER_STATE_UNHEALTHY

SERVICE_NAMES = (
    generate_pb2.DESCRIPTOR.services_by_name["GenerateService"].full_name,
    embed_pb2.DESCRIPTOR.services_by_name["EmbedService"].full_name,
    health_pb2.DESCRIPTOR.services_by_name["HealthService"].full_name,
    bootstrap_pb2.DESCRIPTOR.services_by_name["BootstrapService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    session_pb2.DESCRIPTOR.services_by_name["WorkerSessionService"].full_name,
    kv_events_pb2.DESCRIPTOR.services_by_name["KvEventService"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
)


class BringUpError(Exception):
    """The worker can't serve; the message is the cause."""


class WorkerHost(EngineHost):
    """One worker. `run` returns the process's exit status."""

    def __init__(
        self,
        config: WorkerConfig,
        make_contract: Callable[[Role, EtcdClient, str], RoleContract],
        model_path: Callable[[], tuple[Path, worker_pb2.ModelIdentity]],
        *,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """`model_path` gives the model's folder and identity once the engine is built; `ready` is told when all works.

        Raises AdvertiseError, and ValueError for names, files and payloads that can't be used.
        """
        super().__init__(config, SERVICE_NAMES)
        self._model_path = model_path
        self._ready = ready
        self._bootstrap_host = bootstrap_host(
            advertised=self._host,
            dist_init_addr=config.dist_init_addr,
            sglang_host_ip=os.environ.get("SGLANG_HOST_IP", ""),
        )
        # Raises for a name that can't be a key, before anything is loaded.
        WorkerKey(config.etcd.namespace, config.role.to_proto(), self._core.instance_id)
        self._health_check = HealthCheck.parse(config.health_check_payload, config.role)
        self._etcd = EtcdClient(config.etcd.endpoints, config.etcd.tls())
        self._contract = make_contract(config.role, self._etcd, config.etcd.namespace)
        self._hurry = asyncio.Event()
        self._kv_events = KvEventHub(config.role)
        self._feeding: asyncio.Task[None] | None = None

    @property
    def incarnation(self) -> worker_pb2.Incarnation:
        """This life of the worker."""
        return self._core.incarnation

    def hurry(self) -> None:
        """End now what the drain still waits for, each with a typed error. Called in the loop."""
        self._hurry.set()

    async def run(self, listening: Callable[[], None]) -> int:
        """Serves until `stop`, or until the engine dies. Calls `listening` when health can be asked.

        Raises PortTakenError when it can't listen.
        """
        config = self._config
        watch_event_loop(asyncio.get_running_loop())
        server = make_server(self._register)
        grpc_port = bind(server, config.host, config.port, tls=config.tls.server())
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._etcd)
            app = system_http.create_app(self._core)
            http = await stack.enter_async_context(
                HttpServer(app, host=config.host, port=config.system_port, flag="--system-port")
            )
            await self._health.set_serving(False)
            await server.start()
            stack.push_async_callback(server.stop, 1.0)
            stack.push_async_callback(self._end_kv_events)
            listening()
            log.info("listening", grpc=join_host_port(config.host, grpc_port), system=http.port, host=self._host)
            try:
                record = await self._until_stopped(self._bring_up(grpc_port, http.port))
            except BringUpError as error:
                await self._core.lifecycle.enter(worker_pb2.WORKER_STATE_FAILED, str(error))
                return 1
            if record is None:
                return 0
            return await self._serve(record)

    async def _bring_up(self, grpc_port: int, system_port: int) -> worker_pb2.WorkerRecord:
        """LOADING and WARMING; what comes back is true of an engine that has answered through its own socket."""
        lifecycle = self._core.lifecycle
        await lifecycle.enter(worker_pb2.WORKER_STATE_LOADING)
        try:
            engine = await asyncio.shield(self._engine)
        except Exception as error:
            raise BringUpError(f"the engine was not built: {error}") from error
        await lifecycle.enter(worker_pb2.WORKER_STATE_WARMING)
        try:
            async with asyncio.timeout(self._config.warmup_timeout):
                await engine.attach()
                self._core.engine = engine
                self._follow_kv_events(engine)
                loaded = await asyncio.to_thread(self._describe, engine, grpc_port, system_port)
                for rank in range(loaded.info.dp_size):
                    await engine.probe(rank, loaded.probe_payload)
                window = self._config.window or loaded.info.max_running_requests * loaded.info.dp_size
                self._core.attach(loaded, window=window)
                await self._probe_own_socket(grpc_port)
                await self._contract.check_ready(loaded.record)
                self._ready()
        except TimeoutError as error:
            raise BringUpError(f"no answer within --warmup-timeout {self._config.warmup_timeout:g} s") from error
        except Exception as error:
            log.error("warm-up failed", exc_info=error)
            raise BringUpError(f"warm-up: {error}") from error
        return loaded.record

    async def _serve(self, record: worker_pb2.WorkerRecord) -> int:
        core, config = self._core, self._config
        loaded = core.require_loaded()
        async with (
            LeaseKeeper(self._etcd, ttl=max(1, round(config.lease_ttl))) as keeper,
            RecordPublisher(self._etcd, keeper, config.etcd.namespace) as publisher,
        ):
            core.accepting = True
            await core.lifecycle.enter(worker_pb2.WORKER_STATE_SERVING)
            try:
                cause = await self._until_stopped(self._until_dead(loaded.engine, publisher, record))
            except NewerIncarnationError as error:
                # The engine is well and its requests may finish; new ones go to the newer process.
                log.error("replaced", error=str(error))
                await self._drain(publisher, str(error))
                return 1
            if cause is None:
                await self._drain(publisher)
                return 0
            core.accepting = False
            await core.lifecycle.enter(worker_pb2.WORKER_STATE_FAILED, cause)
            await publisher.withdraw(1.0)
            await publisher.delete(1.0)
            # Every live leg gets its own typed error from the engine; give them the moment to leave.
            await core.legs.drained(2.0)
            return 1

    async def _until_dead(self, engine: Engine, publisher: RecordPublisher, record: worker_pb2.WorkerRecord) -> str:
        """Publishes, and waits for the end of the engine whether etcd answers or not. Returns the cause.

        Raises NewerIncarnationError when a newer process has this worker's key.
        """

        async def publish() -> None:
            if await publisher.publish(record):
                log.info("registered", instance_id=record.instance_id, endpoint=record.grpc_endpoint)
            raise await publisher.superseded()

        async def judge(ailment: str) -> None:
            await self._core.lifecycle.enter(_UNHEALTHY if ailment else _SERVING, ailment)
            judged = worker_pb2.WorkerRecord()
            judged.CopyFrom(record)
            judged.state = self._core.lifecycle.state
            with contextlib.suppress(NewerIncarnationError):  # `publish` hears of it
                await publisher.update(judged)

        config = self._config
        canary = Canary(self._core, judge, interval=config.canary_interval, silence=config.engine_silence_timeout)
        dead, publishing = asyncio.create_task(engine.wait_dead()), asyncio.create_task(publish())
        watching = asyncio.create_task(canary.run(), name="canary")
        tasks = (dead, publishing, watching)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if dead.done():
                return dead.result()
            for ended in (publishing, watching):
                if ended.done():
                    ended.result()
            raise AssertionError("publishing and the canary end by raising only")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _drain(self, publisher: RecordPublisher, detail: str = "") -> None:
        """Withdraw first, so that nobody is refused who could not know; then finish, then delete."""
        core, config = self._core, self._config
        await core.lifecycle.enter(worker_pb2.WORKER_STATE_DRAINING, detail)
        await publisher.withdraw()
        await _unless(self._hurry, asyncio.sleep(config.drain_grace))
        core.accepting = False
        if not await _unless(self._hurry, core.legs.drained(config.drain_timeout)):
            log.warning("not waiting for live requests", live=len(core.legs), drain_timeout=config.drain_timeout)
            await core.legs.abort_all()
            await core.legs.drained(_ABORT_GRACE)
        await publisher.delete()

    def _follow_kv_events(self, engine: Engine) -> None:
        info = engine.info()
        self._kv_events.open(info.dp_size, info.page_size)
        self._feeding = asyncio.create_task(feed(engine, self._kv_events), name="kv-events")

    async def _end_kv_events(self) -> None:
        self._kv_events.close()
        if self._feeding is not None:
            self._feeding.cancel()
            await asyncio.gather(self._feeding, return_exceptions=True)

    def _describe(self, engine: Engine, grpc_port: int, system_port: int) -> Loaded:
        """Reads the model folder (in a thread: tokenizer files are hashed) and puts the record together."""
        path, identity = self._model_path()
        files = find_tokenizer_files(path)
        info = engine.info()
        record = registration.build_record(
            self._config,
            instance_id=self._core.instance_id,
            incarnation=self._core.incarnation,
            advertise_host=self._host,
            bootstrap_host=self._bootstrap_host,
            grpc_port=grpc_port,
            system_port=system_port,
            model=identity,
            info=info,
            has_tokenizer=bool(files),
        )
        model_info = registration.build_model_info(record, info, files)
        limits = Limits.from_runtime(record.runtime)
        payload = self._health_check.payload(limits)
        return Loaded(engine, info, limits, record, model_info, files, payload)

    async def _probe_own_socket(self, grpc_port: int) -> None:
        """The first probe that came in through the port others will use."""
        config = self._config
        address = join_host_port(self._host, grpc_port)
        async with make_channel(address, tls=config.tls.client()) as channel:
            stub = health_pb2_grpc.HealthServiceStub(channel)
            try:
                await stub.Probe(health_pb2.ProbeRequest(), timeout=_OWN_PROBE_TIMEOUT)
            except grpc.aio.AioRpcError as error:
                raise RuntimeError(f"own gRPC port at {address}: {error.code().name} {error.details()}") from error

    async def _until_stopped(self, work: Awaitable[T]) -> T | None:
        """The result of `work`, or None when `stop` came first; `work` is then cancelled."""
        return await _unless(self._stop, work)

    def _register(self, server: grpc.aio.Server) -> tuple[str, ...]:
        self._health.register(server)
        runner = LegRunner(self._core, self._contract)
        generate_pb2_grpc.add_GenerateServiceServicer_to_server(GenerateServicer(self._core, runner), server)
        embed_pb2_grpc.add_EmbedServiceServicer_to_server(EmbedServicer(self._core), server)
        session_pb2_grpc.add_WorkerSessionServiceServicer_to_server(SessionServicer(self._core, runner), server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(self._core, self.stop), server)
        health_pb2_grpc.add_HealthServiceServicer_to_server(HealthServicer(self._core), server)
        kv_events_pb2_grpc.add_KvEventServiceServicer_to_server(KvEventServicer(self._core, self._kv_events), server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(self._core), server)
        bootstrap_pb2_grpc.add_BootstrapServiceServicer_to_server(self._contract.bootstrap_servicer(self._core), server)
        return (*SERVICE_NAMES, GRPC_HEALTH_NAME)


async def _unless(event: asyncio.Event, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None when the event came first; `work` is then cancelled."""
    working = asyncio.ensure_future(work)
    interrupting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({working, interrupting}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, interrupting):
            task.cancel()
        await asyncio.gather(working, interrupting, return_exceptions=True)
