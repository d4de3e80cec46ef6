"""What a role adds to a worker: which requests it takes, what must answer before it serves, what it publishes."""

from __future__ import annotations

from typing import Protocol

from kvbaton.errors import invalid
from kvbaton.v1 import bootstrap_pb2_grpc, generate_pb2, worker_pb2
from services.requests import Role, Room, check_room
from services.worker.core import WorkerCore


class RoleContract(Protocol):
    """One per worker process; the implementations are in services/prefill and services/decode."""

    async def room(self, request: generate_pb2.GenerateRequest) -> Room | None:
        """The room of a request. Raises RequestError where the role needs one, or takes none."""
        ...

    async def check_ready(self, record: worker_pb2.WorkerRecord) -> None:
        """The last check before the record is put. Raises RuntimeError with the cause."""
        ...

    def bootstrap_servicer(self, core: WorkerCore) -> bootstrap_pb2_grpc.BootstrapServiceServicer:
        """The role's side of BootstrapService."""
        ...


def required_room(request: generate_pb2.GenerateRequest, role: Role) -> Room:
    """The room of a leg of a disaggregated request."""
    if not request.HasField("bootstrap"):
        raise invalid("bootstrap", f"a {role} worker runs one leg of a request: it needs host, port and room")
    return check_room(request.bootstrap)
