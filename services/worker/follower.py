"""A node behind the first of a multi-node engine: its schedulers take their orders from node 0, by SGLang's own ways.

It says how it is and publishes its metrics. It serves no requests, and nothing of it stands in the registry.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import grpc.aio
import structlog

from kvbaton.v1 import health_pb2, health_pb2_grpc, worker_pb2
from services.config.worker import WorkerConfig
from services.grpc_health import SERVICE_NAME as GRPC_HEALTH_NAME
from services.http_server import HttpServer
from services.telemetry.metrics import watch_event_loop
from services.transport import bind, join_host_port, make_server
from services.worker import system_http
from services.worker.engine_host import EngineHost
from services.worker.servicers.health import HealthServicer

log = structlog.get_logger()

SERVICE_NAMES = (health_pb2.DESCRIPTOR.services_by_name["HealthService"].full_name,)


class FollowerHost(EngineHost):
    """What `WorkerHost` is to node 0. `run` returns the process's exit status."""

    def __init__(self, config: WorkerConfig) -> None:
        """Raises AdvertiseError."""
        super().__init__(config, SERVICE_NAMES)

    def hurry(self) -> None:
        """There is nothing to wait for."""

    async def run(self, listening: Callable[[], None]) -> int:
        """Until `stop`, or until a scheduler dies. Raises PortTakenError when it can't listen."""
        config, lifecycle = self._config, self._core.lifecycle
        watch_event_loop(asyncio.get_running_loop())
        server = make_server(self._register)
        grpc_port = bind(server, config.host, config.port, tls=config.tls.server())
        async with contextlib.AsyncExitStack() as stack:
            http = HttpServer(
                system_http.create_app(self._core), host=config.host, port=config.system_port, flag="--system-port"
            )
            await stack.enter_async_context(http)
            await self._health.set_serving(False)
            await server.start()
            stack.push_async_callback(server.stop, 1.0)
            listening()
            log.info("listening", grpc=join_host_port(config.host, grpc_port), system=http.port, host=self._host)
            await lifecycle.enter(worker_pb2.WORKER_STATE_LOADING)
            ending = asyncio.create_task(self._until_ended())
            stopping = asyncio.create_task(self._stop.wait())
            await asyncio.wait({ending, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not ending.done():
                ending.cancel()
                await lifecycle.enter(worker_pb2.WORKER_STATE_DRAINING)
                return 0
            await lifecycle.enter(worker_pb2.WORKER_STATE_FAILED, ending.result())
            return 1

    async def _until_ended(self) -> str:
        """The cause of the engine's end, before its beginning or after."""
        try:
            engine = await asyncio.shield(self._engine)
        except Exception as error:  # noqa: BLE001 - whatever SGLang raised is the cause
            return f"the engine was not built: {error}"
        await engine.attach()
        self._core.engine = engine
        await self._core.lifecycle.enter(worker_pb2.WORKER_STATE_SERVING, "a node behind the first: takes no requests")
        return await engine.wait_dead()

    def _register(self, server: grpc.aio.Server) -> tuple[str, ...]:
        self._health.register(server)
        health_pb2_grpc.add_HealthServiceServicer_to_server(HealthServicer(self._core), server)
        return (*SERVICE_NAMES, GRPC_HEALTH_NAME)
