"""What every process around an engine is to its threads: an identity, a place for the engine, and a way to end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from services.config.worker import WorkerConfig
from services.grpc_health import GrpcHealth
from services.worker import registration
from services.worker.advertise import advertised_host
from services.worker.core import WorkerCore
from services.worker.engines.protocol import Engine
from services.worker.lifecycle import Lifecycle


class EngineHost:
    """Base of the hosts; made in the serving loop. The engine is built elsewhere and handed in."""

    def __init__(self, config: WorkerConfig, service_names: Sequence[str]) -> None:
        """`service_names` are those that grpc.health answers for. Raises AdvertiseError."""
        self._config = config
        self._stop = asyncio.Event()
        self._engine: asyncio.Future[Engine] = asyncio.get_running_loop().create_future()
        self._host = advertised_host(
            bind_host=config.host, advertise_host=config.advertise_host, etcd_endpoints=config.etcd.endpoints
        )
        self._health = GrpcHealth(service_names)
        instance_id = config.instance_id or registration.default_instance_id(config.role, self._host, config.port)
        lifecycle = Lifecycle(config.role, self._health)
        self._core = WorkerCore(config.role, instance_id, registration.new_incarnation(), lifecycle)

    @property
    def advertised_host(self) -> str:
        """The address that others reach this process at."""
        return self._host

    @property
    def cause(self) -> str:
        """Why `run` returned something other than 0."""
        return self._core.lifecycle.detail

    def engine_built(self, engine: Engine) -> None:
        """The engine is there. Called in the loop."""
        if not self._engine.done():
            self._engine.set_result(engine)

    def engine_failed(self, error: Exception) -> None:
        """There will be no engine. Called in the loop."""
        if not self._engine.done():
            self._engine.set_exception(error)

    def stop(self) -> None:
        """Drain, where there is something to drain, and end. Called in the loop; idempotent."""
        self._stop.set()
