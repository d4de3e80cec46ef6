"""One scheduler for all dp ranks of an engine: events in, a tick when something is due, nothing in between.

It is a timer in the serving loop, not a task per request or token. Frozen it looks at nothing; what comes meanwhile
waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from services.worker.engines.protocol import EngineDeadError, EngineLoad
from services.worker.engines.simulated.faults import Faults
from services.worker.engines.simulated.options import SimulatedOptions
from services.worker.engines.simulated.rank import Rank
from services.worker.engines.simulated.request import Request

_log = structlog.get_logger(__name__)


class Scheduler:
    """Belongs to the loop that `start` is called in."""

    def __init__(self, options: SimulatedOptions, faults: Faults, died: Callable[[str], None]) -> None:
        """`died` is called once, with the cause."""
        self.ranks: Sequence[Rank] = ()
        self.live: dict[str, tuple[Rank, Request]] = {}
        self.cause = ""
        """Why it is dead; empty while it isn't."""
        self._options = options
        self._faults = faults
        self._died = died
        self._loop: asyncio.AbstractEventLoop | None = None
        self._events: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._timer: asyncio.Handle | None = None
        self._woken = False
        self._frozen_at = 0.0
        self._snapshot: list[EngineLoad] = []

    def start(self, ranks: Sequence[Rank]) -> None:
        """Begins, in the running loop."""
        self.ranks = ranks
        self._loop = asyncio.get_running_loop()

    def clock(self) -> float:
        """Seconds, monotonic: the loop's."""
        assert self._loop is not None
        return self._loop.time()

    def submit(self, rank: Rank, request: Request) -> None:
        """The request reaches the rank with the next tick, and is live from now on."""
        self.live[request.engine_id] = (rank, request)
        self.post(0.0, self._submit, rank, request)

    def abort(self, engine_id: str) -> None:
        """Ends a live request, with the next tick."""
        if (found := self.live.get(engine_id)) is not None:
            self.post(0.0, self._abort, *found)

    def post(self, delay: float, event: Callable[..., None], *arguments: Any) -> None:
        """`event(*arguments)` in the first tick after `delay` seconds."""
        if delay > 0 and self._loop is not None:
            self._loop.call_later(delay, self.post, 0.0, event, *arguments)
            return
        self._events.append((event, arguments))
        self.wake()

    def wake(self) -> None:
        """A tick as soon as the loop can."""
        if not self._woken and self._loop is not None and not self.cause:
            self._woken = True
            self._loop.call_soon(self._tick)

    def forget(self, request: Request) -> None:
        """The request's id is free again."""
        found = self.live.get(request.engine_id)
        if found is not None and found[1] is request:
            del self.live[request.engine_id]

    def freeze(self) -> None:
        """Stands still until `thaw`."""
        if not self._faults.frozen:
            self._snapshot = self._read_loads()
            self._faults.frozen = True

    def thaw(self) -> None:
        """Goes on. What was under way comes before what arrived meanwhile."""
        if self._faults.frozen:
            self._faults.frozen = False
            for rank in self.ranks:
                rank.thaw(self.clock())
            self.wake()

    def loads(self) -> list[EngineLoad]:
        """Of every rank; of a frozen scheduler what it said last."""
        return self._snapshot if self._faults.frozen else self._read_loads()

    def die(self, cause: str) -> None:
        """Every live request fails with EngineDeadError, and nothing runs any more."""
        if self.cause:
            return
        self.cause = cause
        if self._timer is not None:
            self._timer.cancel()
        for _, request in list(self.live.values()):
            request.ended = True
            request.stream.put(EngineDeadError(cause))
        self.live.clear()
        self._events.clear()
        self._died(cause)

    def _read_loads(self) -> list[EngineLoad]:
        now = time.time()
        return [rank.load(now) for rank in self.ranks]

    def _submit(self, rank: Rank, request: Request) -> None:
        if request.aborting:
            rank.live[request.engine_id] = request
            rank.abort(request)
        else:
            rank.submit(request)

    def _abort(self, rank: Rank, request: Request) -> None:
        rank.abort(request)

    def _tick(self) -> None:
        self._woken = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._faults.frozen or self.cause:
            return
        try:
            due = self._run()
        except Exception as error:  # noqa: BLE001 - whatever it was, nothing runs any more
            _log.exception("simulated_scheduler_failed")
            self.die(f"the simulated scheduler raised {error!r}")
            return
        if due is not None and not self._woken and not self.cause:
            assert self._loop is not None
            self._timer = self._loop.call_at(max(due, self.clock() + self._options.tick), self._tick)

    def _run(self) -> float | None:
        now = self.clock()
        for rank in self.ranks:
            rank.progress(now)
        while self._events:
            event, arguments = self._events.popleft()
            event(*arguments)
        return min((due for rank in self.ranks if (due := rank.tick(now)) is not None), default=None)
