"""BootstrapService of a decode worker: whether it can receive KV caches from a registered prefill worker."""

from __future__ import annotations

from typing import Any

import grpc

from kvbaton.errors import Reason, RequestError, invalid
from kvbaton.v1 import bootstrap_pb2
from services.decode.peers import PrefillPeers
from services.registry.compat import describe_difference
from services.worker.bootstrap_probe import bootstrap_answers
from services.worker.core import WorkerCore
from services.worker.servicers.bootstrap import BootstrapServicer

ANSWER_TIMEOUT = 2.0


class DecodeBootstrapServicer(BootstrapServicer):
    """A peer is named by its registration, never by an address: a caller can't make us connect anywhere it likes."""

    def __init__(self, core: WorkerCore, peers: PrefillPeers) -> None:
        super().__init__(core)
        self._peers = peers

    async def CheckPeer(
        self, request: bootstrap_pb2.CheckPeerRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> bootstrap_pb2.CheckPeerResponse:
        """Registered, the same incarnation, an equal compat hash, and reachable from here."""
        loaded = self._core.require_loaded()
        if not request.instance_id:
            raise invalid("instance_id", "missing")
        peer = await self._peers.find(request.instance_id)
        if peer is None:
            raise self._failed(
                grpc.StatusCode.NOT_FOUND, Reason.PEER_NOT_REGISTERED, f"no prefill worker {request.instance_id!r}"
            )
        if request.HasField("incarnation") and peer.incarnation != request.incarnation:
            raise self._failed(
                grpc.StatusCode.FAILED_PRECONDITION,
                Reason.PEER_REPLACED,
                f"prefill worker {peer.instance_id} is incarnation {peer.incarnation.uuid}",
            )
        if peer.compat_hash != loaded.record.compat_hash:
            difference = describe_difference(loaded.record, peer)
            raise self._failed(grpc.StatusCode.FAILED_PRECONDITION, Reason.PEER_INCOMPATIBLE, difference)
        problem = await bootstrap_answers(peer.bootstrap, timeout=ANSWER_TIMEOUT)
        if problem is not None:
            raise self._failed(grpc.StatusCode.UNAVAILABLE, Reason.PEER_UNREACHABLE, problem)
        return bootstrap_pb2.CheckPeerResponse(endpoint=peer.bootstrap)

    def _failed(self, code: grpc.StatusCode, reason: Reason, message: str) -> RequestError:
        return RequestError(code, reason, message, leg=self._core.role, worker=self._core.instance_id)
