"""BootstrapService of a prefill worker: where its bootstrap server listens."""

from __future__ import annotations

from typing import Any

import grpc

from kvbaton.v1 import bootstrap_pb2
from services.worker.servicers.bootstrap import BootstrapServicer


class PrefillBootstrapServicer(BootstrapServicer):
    """Answers once the engine is there."""

    async def GetEndpoint(
        self, request: bootstrap_pb2.GetEndpointRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> bootstrap_pb2.GetEndpointResponse:
        """The endpoint as decode workers reach it."""
        loaded = self._core.require_loaded()
        return bootstrap_pb2.GetEndpointResponse(
            endpoint=loaded.record.bootstrap, dp_size=loaded.info.dp_size, incarnation=self._core.incarnation
        )
