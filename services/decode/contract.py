"""Contracts of the decode role and of the aggregated worker, which runs both phases in one engine."""

from __future__ import annotations

from kvbaton.errors import invalid
from kvbaton.v1 import bootstrap_pb2_grpc, generate_pb2, worker_pb2
from services.decode.bootstrap import DecodeBootstrapServicer, PeerLookup
from services.requests import Role, Room
from services.worker.core import WorkerCore
from services.worker.role import required_room
from services.worker.servicers.bootstrap import BootstrapServicer


class DecodeContract:
    """See `RoleContract`. `find_peer` reads a prefill worker's record from the registry."""

    role = Role.DECODE

    def __init__(self, find_peer: PeerLookup) -> None:
        self._find_peer = find_peer

    def room(self, request: generate_pb2.GenerateRequest) -> Room:
        """The room, which must be there."""
        return required_room(request, self.role)

    async def check_ready(self, record: worker_pb2.WorkerRecord) -> None:
        """Nothing beyond the engine: a decode worker can start before any prefill worker."""

    def bootstrap_servicer(self, core: WorkerCore) -> bootstrap_pb2_grpc.BootstrapServiceServicer:
        """CheckPeer."""
        return DecodeBootstrapServicer(core, self._find_peer)


class AggregatedContract:
    """See `RoleContract`."""

    role = Role.AGGREGATED

    def room(self, request: generate_pb2.GenerateRequest) -> Room | None:
        """None; a room here is a mistake."""
        if request.HasField("bootstrap"):
            raise invalid("bootstrap", "an aggregated worker runs both phases itself and takes no room")
        return None

    async def check_ready(self, record: worker_pb2.WorkerRecord) -> None:
        """Nothing beyond the engine."""

    def bootstrap_servicer(self, core: WorkerCore) -> bootstrap_pb2_grpc.BootstrapServiceServicer:
        """Refuses."""
        return BootstrapServicer(core)
