"""Contract of the prefill role: every request has a room, and the bootstrap server answers before the record exists."""

from __future__ import annotations

import asyncio

from kvbaton.v1 import bootstrap_pb2_grpc, generate_pb2, worker_pb2
from services.prefill.bootstrap import PrefillBootstrapServicer
from services.requests import Role, Room
from services.worker.bootstrap_probe import bootstrap_answers
from services.worker.core import WorkerCore
from services.worker.role import required_room

_ATTEMPTS = 20


class PrefillContract:
    """See `RoleContract`."""

    role = Role.PREFILL

    async def room(self, request: generate_pb2.GenerateRequest) -> Room:
        """The room, which must be there."""
        return required_room(request, self.role)

    async def check_ready(self, record: worker_pb2.WorkerRecord) -> None:
        """Decode workers will reach the bootstrap server at the published endpoint: so must we."""
        problem: str | None = None
        for _ in range(_ATTEMPTS):
            problem = await bootstrap_answers(record.bootstrap, timeout=2.0)
            if problem is None:
                return
            await asyncio.sleep(0.5)
        raise RuntimeError(f"the bootstrap server does not answer at the address that would be published: {problem}")

    def bootstrap_servicer(self, core: WorkerCore) -> bootstrap_pb2_grpc.BootstrapServiceServicer:
        """GetEndpoint."""
        return PrefillBootstrapServicer(core)
