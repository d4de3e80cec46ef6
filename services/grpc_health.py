"""The standard grpc.health.v1 of one process: one status for the whole process and each of its services."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

SERVICE_NAME = health.SERVICE_NAME


class GrpcHealth:
    """NOT_SERVING until `set_serving` says otherwise."""

    def __init__(self, service_names: Sequence[str]) -> None:
        self._names = ("", *service_names)
        # The published stubs don't know the aio half of the package.
        self._servicer: Any = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to a server."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set_serving(self, serving: bool) -> None:
        """Tells everyone who asks or watches."""
        statuses = health_pb2.HealthCheckResponse
        for name in self._names:
            await self._servicer.set(name, statuses.SERVING if serving else statuses.NOT_SERVING)
