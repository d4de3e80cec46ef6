"""The legs that a worker runs, by the id that their callers gave them.

Each has a task of its own that reads the engine. A caller that leaves cancels its RPC handler, never that task: a leg
is live, and its id taken, until the engine has really let go of it.

An engine matches aborts by prefix and forgets an abort for an id that it doesn't know yet. So every leg gets an engine
id of 32 hex digits of its own, and an abort that overtakes its request is remembered here.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from kvbaton.errors import Reason, RequestError, cancelled
from services.early_aborts import EarlyAborts
from services.requests import Role
from services.telemetry import metrics
from services.worker.engines.protocol import EngineDeadError, EngineDelta, EngineRefusedError, Finish


class Leg:
    """One accepted request of this worker."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.engine_id = uuid.uuid4().hex
        # Set by Abort, so that the end of the stream can be told from an abort of the engine's own.
        self.abort_requested = False
        # Set when shutdown ends it.
        self.drained_out = False
        self.task: asyncio.Task[None] | None = None
        self._arrived: asyncio.Queue[EngineDelta | Exception] = asyncio.Queue()

    async def deltas(self) -> AsyncIterator[EngineDelta]:
        """What the engine says, up to the delta with `finish`. Raises what the engine raises."""
        while True:
            item = await self._arrived.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finish is not None:
                return

    async def pump(self, deltas: AsyncIterator[EngineDelta], heard: Callable[[], None]) -> str:
        """Reads the engine to the end, and calls `heard` at each word; returns the outcome for the metrics."""
        outcome = "INTERNAL"
        try:
            async for delta in deltas:
                heard()
                if delta.finish is not None:
                    outcome = "aborted" if delta.finish.reason is Finish.ABORT else "finished"
                self._arrived.put_nowait(delta)
            if outcome == "INTERNAL":
                raise RuntimeError("the engine ended without a finish")
        except (EngineDeadError, EngineRefusedError) as error:
            outcome = "dead" if isinstance(error, EngineDeadError) else "refused"
            self._arrived.put_nowait(error)
        except Exception as error:  # noqa: BLE001 - the reader raises it
            self._arrived.put_nowait(error)
        return outcome


class LiveLegs:
    """Belongs to the serving loop."""

    def __init__(self, role: Role, abort_in_engine: Callable[[str], Awaitable[None]]) -> None:
        self._role = role
        self._abort_in_engine = abort_in_engine
        # Called when a leg has ended.
        self.on_end: Callable[[], None] = lambda: None
        self._legs: dict[str, Leg] = {}
        self._early_aborts = EarlyAborts()
        self._empty = asyncio.Event()
        self._empty.set()
        # When the engine last said anything, or got its first leg after a rest.
        self._last_word = time.monotonic()

    def __len__(self) -> int:
        return len(self._legs)

    @property
    def last_word(self) -> float:
        """When the engine last said anything of a leg, or got its first one after a rest; on the monotonic clock."""
        return self._last_word

    @property
    def engine_silence(self) -> float | None:
        """Seconds since the engine last said anything; None without live legs."""
        return time.monotonic() - self._last_word if self._legs else None

    def admit(self, request_id: str, generate: Callable[[Leg], AsyncIterator[EngineDelta]]) -> Leg:
        """Takes a leg in and starts it; it is live until what `generate` returns ends.

        Raises RequestError: ALREADY_EXISTS for a live id, CANCELLED when its abort came first.
        """
        request_id = request_id or uuid.uuid4().hex
        if request_id in self._legs:
            raise RequestError(
                grpc.StatusCode.ALREADY_EXISTS,
                Reason.DUPLICATE_REQUEST_ID,
                f"request_id: {request_id!r} is live on this worker",
                field="request_id",
            )
        if self._early_aborts.claim(request_id):
            raise cancelled("aborted before it arrived")
        if not self._legs:
            self._last_word = time.monotonic()
        leg = Leg(request_id)
        leg.task = asyncio.create_task(self._run(leg, generate(leg)), name=f"leg {leg.request_id}")
        self._legs[request_id] = leg
        self._empty.clear()
        metrics.WORKER_LIVE_LEGS.labels(self._role).set(len(self._legs))
        return leg

    async def leave(self, leg: Leg) -> None:
        """Its caller reads it no longer; a leg that still runs is aborted."""
        if leg.task is not None and not leg.task.done():
            await self._abort_in_engine(leg.engine_id)

    async def _run(self, leg: Leg, deltas: AsyncIterator[EngineDelta]) -> None:
        outcome = "INTERNAL"
        try:
            outcome = await leg.pump(deltas, self._heard)
        finally:
            del self._legs[leg.request_id]
            metrics.WORKER_LEGS.labels(self._role, outcome).inc()
            metrics.WORKER_LIVE_LEGS.labels(self._role).set(len(self._legs))
            if not self._legs:
                self._empty.set()
            self.on_end()

    def _heard(self) -> None:
        self._last_word = time.monotonic()

    async def abort(self, request_id: str) -> bool:
        """Aborts a live leg, or remembers the abort for one that has not arrived. True when it was live."""
        leg = self._legs.get(request_id)
        if leg is None:
            self._early_aborts.remember(request_id)
            return False
        leg.abort_requested = True
        await self._abort_in_engine(leg.engine_id)
        return True

    async def drained(self, timeout: float) -> bool:
        """Waits until no leg is live; False after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    async def abort_all(self) -> None:
        """Ends what the drain's deadline has left."""
        for leg in list(self._legs.values()):
            leg.drained_out = True
            await self._abort_in_engine(leg.engine_id)
