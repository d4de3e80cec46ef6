"""Contracts of the decode role and of the aggregated worker, which runs both phases in one engine."""

from __future__ import annotations

from kvbaton.errors import invalid
from kvbaton.v1 import bootstrap_pb2_grpc, generate_pb2, worker_pb2
from services.decode.bootstrap import DecodeBootstrapServicer
from services.decode.peers import PrefillPeers
from services.requests import Role, Room
from services.worker.core import WorkerCore
from services.worker.role import required_room
from services.worker.servicers.bootstrap import BootstrapServicer


class DecodeContract:
    """See `RoleContract`."""

    role = Role.DECODE

    def __init__(self, peers: PrefillPeers) -> None:
        self._peers = peers

    async def room(self, request: generate_pb2.GenerateRequest) -> Room:
        """The room, which must be there, at a registered prefill worker."""
        room = required_room(request, self.role)
        await self._peers.check(room)
        return room

    async def check_ready(self, record: worker_pb2.WorkerRecord) -> None:
        """Nothing beyond the engine: a decode worker can start before any prefill worker."""

    def bootstrap_servicer(self, core: WorkerCore) -> bootstrap_pb2_grpc.BootstrapServiceServicer:
        """CheckPeer."""
        return DecodeBootstrapServicer(core, self._peers)


class AggregatedContract:
    """See `RoleContract`."""

    role = Role.AGGREGATED

    async def room(self, request: generate_pb2.GenerateRequest) -> Room | None:
        """None; a room here is a mistake."""
        if request.HasField("bootstrap"):
            raise invalid("bootstrap", "an aggregated worker runs both phases itself and takes no room")
        return None

    async def check_ready(self, record: worker_pb2.WorkerRecord) -> None:
        """Nothing beyond the engine."""

    def bootstrap_servicer(self, core: WorkerCore) -> bootstrap_pb2_grpc.BootstrapServiceServicer:
        """Refuses."""
        return BootstrapServicer(core)
