"""BootstrapService of a worker on neither side of the hand-over; prefill and decode override what is theirs."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import bootstrap_pb2, bootstrap_pb2_grpc
from services.worker.core import WorkerCore


class BootstrapServicer(bootstrap_pb2_grpc.BootstrapServiceServicer):
    """Refuses both calls with FAILED_PRECONDITION."""

    def __init__(self, core: WorkerCore) -> None:
        self._core = core

    async def GetEndpoint(
        self, request: bootstrap_pb2.GetEndpointRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> bootstrap_pb2.GetEndpointResponse:
        """Prefill workers override this."""
        self._refuse("has no bootstrap endpoint")

    async def CheckPeer(
        self, request: bootstrap_pb2.CheckPeerRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> bootstrap_pb2.CheckPeerResponse:
        """Decode workers override this."""
        self._refuse("receives no KV caches")

    def _refuse(self, what: str) -> NoReturn:
        core = self._core
        raise RequestError(
            grpc.StatusCode.FAILED_PRECONDITION,
            Reason.WRONG_ROLE,
            f"{core.role} worker {core.instance_id} {what}",
            leg=core.role,
            worker=core.instance_id,
        )
