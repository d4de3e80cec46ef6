"""Contract of the embedding role: no rooms, no peers."""

from __future__ import annotations

from kvbaton.errors import invalid
from kvbaton.v1 import bootstrap_pb2_grpc, generate_pb2, worker_pb2
from services.requests import Role, Room
from services.worker.core import WorkerCore
from services.worker.servicers.bootstrap import BootstrapServicer


class EmbeddingContract:
    """See `RoleContract`."""

    role = Role.EMBEDDING

    async def room(self, request: generate_pb2.GenerateRequest) -> Room | None:
        """There is none; a request to generate is refused before anyone asks."""
        raise invalid("bootstrap", "an embedding worker generates nothing")

    async def check_ready(self, record: worker_pb2.WorkerRecord) -> None:
        """Nothing beyond the engine."""

    def bootstrap_servicer(self, core: WorkerCore) -> bootstrap_pb2_grpc.BootstrapServiceServicer:
        """Refuses."""
        return BootstrapServicer(core)
