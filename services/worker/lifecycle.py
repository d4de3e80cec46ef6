"""The state of a worker, and everyone who must hear of it: grpc.health, HealthService.Status, metrics, the log."""

from __future__ import annotations

import asyncio
import time

import structlog

from kvbaton.v1 import worker_pb2
from services.grpc_health import GrpcHealth
from services.requests import Role
from services.telemetry import metrics

log = structlog.get_logger()


# Who has the same rank may follow each other in any order; nobody goes back to a lower one.
_RANKS: dict[worker_pb2.WorkerState, int] = {
    worker_pb2.WORKER_STATE_STARTING: 0,
    worker_pb2.WORKER_STATE_LOADING: 1,
    worker_pb2.WORKER_STATE_WARMING: 2,
    worker_pb2.WORKER_STATE_SERVING: 3,
    worker_pb2.WORKER_STATE_UNHEALTHY: 3,
    worker_pb2.WORKER_STATE_DRAINING: 4,
    worker_pb2.WORKER_STATE_FAILED: 5,
}


class Lifecycle:
    """STARTING → LOADING → WARMING → SERVING ⇄ UNHEALTHY → DRAINING, or FAILED from anywhere. Never backwards.

    Belongs to the serving loop.
    """

    def __init__(self, role: Role, health: GrpcHealth) -> None:
        self.state: worker_pb2.WorkerState = worker_pb2.WORKER_STATE_STARTING
        self.detail = ""
        self.started_at = time.time()
        self.ending = asyncio.Event()
        """Set from DRAINING or FAILED on."""
        self._role = role
        self._health = health
        self._entered = time.monotonic()

    @property
    def state_name(self) -> str:
        """The state in lower case, for people."""
        return worker_pb2.WorkerState.Name(self.state).removeprefix("WORKER_STATE_").lower()

    @property
    def serving(self) -> bool:
        """Whether new requests are expected here."""
        return self.state == worker_pb2.WORKER_STATE_SERVING

    @property
    def registered(self) -> bool:
        """Whether the registry has, or had, a record of this worker."""
        return _RANKS[self.state] >= _RANKS[worker_pb2.WORKER_STATE_SERVING]

    async def enter(self, state: worker_pb2.WorkerState, detail: str = "") -> None:
        """Goes on to a later state. A step backwards is a bug: ValueError."""
        if _RANKS[state] < _RANKS[self.state]:
            raise ValueError(f"worker state can't go from {self.state} back to {state}")
        if state == self.state and detail == self.detail:
            return
        seconds, self._entered = time.monotonic() - self._entered, time.monotonic()
        previous = self.state_name
        metrics.WORKER_STATE.labels(self._role, previous).set(0)
        self.state, self.detail = state, detail
        if _RANKS[state] >= _RANKS[worker_pb2.WORKER_STATE_DRAINING]:
            self.ending.set()
        metrics.WORKER_STATE.labels(self._role, self.state_name).set(1)
        log.info("worker state", state=self.state_name, detail=detail, previous=previous, seconds=round(seconds, 2))
        await self._health.set_serving(self.serving)
