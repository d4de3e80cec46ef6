"""Whether a worker that says it is well fails one request after the other all the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum

import structlog

from services.config.frontend import BreakerFlags
from services.registry.backoff import Backoff
from services.telemetry import metrics

log = structlog.get_logger()

# What a failed hand-over counts for each of its two workers: one of them is innocent.
_SHARED = 0.5


class BreakerState(StrEnum):
    """What requests have shown of a worker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    """It is being probed."""


class Breaker:
    """Of one incarnation of a worker, in this frontend process; belongs to the event loop.

    `--breaker-faults` in a row open it. Then `probe` is called after `--breaker-pause` seconds, and again after doubled
    pauses, until it doesn't raise: that closes it, on trial. One more fault before the next success opens it again.
    `changed` is called when `state` has changed.

    One event that ends many requests counts once: a fault counts only for a request that was sent after the last one.
    So a worker that is overloaded doesn't open it, as long as it answers any request at all.
    """

    def __init__(
        self,
        flags: BreakerFlags,
        *,
        worker: str,
        role: str,
        probe: Callable[[], Awaitable[None]],
        changed: Callable[[], None],
    ) -> None:
        self.state = BreakerState.CLOSED
        self.opened_at = 0.0
        """On the monotonic clock; 0 until it has opened for the first time."""
        self.last_fault = ""
        self._flags = flags
        self._worker, self._role = worker, role
        self._probe = probe
        self._changed = changed
        self._backoff = Backoff(flags.breaker_pause, flags.breaker_longest_pause)
        # In a row. Hand-overs are counted by themselves: one that succeeds says nothing of what comes behind it.
        self._own = 0
        self._shared = 0
        self._counted_at = 0.0
        self._closed_at = 0.0
        self._probing: asyncio.Task[None] | None = None
        self._gone = False

    @property
    def closed(self) -> bool:
        """Whether nothing speaks against the worker."""
        return self.state is BreakerState.CLOSED

    def failed(self, why: str, *, sent: float, shared: bool = False) -> None:
        """A request that was sent there at `sent`, on the monotonic clock, has failed by the worker's fault.

        `shared`: by the fault of one of its two workers, nobody knows whose.
        """
        if self._gone or not self._flags.breaker_faults or not self.closed or sent < self._counted_at:
            return
        self._counted_at = time.monotonic()
        self.last_fault = why
        if shared:
            self._shared += 1
        else:
            self._own += 1
        if self._own + _SHARED * self._shared >= self._flags.breaker_faults:
            self._open()

    def succeeded(self) -> None:
        """It has done all of its part of a request."""
        self._own = self._shared = 0

    def handed_over(self) -> None:
        """A KV cache has gone through it well; its part goes on."""
        self._shared = 0

    async def close(self) -> None:
        """The worker is gone: it is probed no more, and what its link still ends counts no more."""
        self._gone = True
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)

    def _open(self) -> None:
        now = time.monotonic()
        if now - self._closed_at > self._flags.breaker_longest_pause:
            self._backoff.reset()
        self.opened_at = now
        log.warning("breaker open", worker=self._worker, faults=self._flags.breaker_faults, last=self.last_fault)
        metrics.BREAKER_OPENINGS.labels(self._role, self._worker).inc()
        self._probing = asyncio.create_task(self._until_probed(), name=f"breaker {self._worker}")
        self._set(BreakerState.OPEN)

    async def _until_probed(self) -> None:
        while True:
            await asyncio.sleep(self._backoff.next())
            self._set(BreakerState.HALF_OPEN)
            try:
                await self._probe()
            except Exception as error:  # noqa: BLE001 - whatever a probe meets, the next one must come
                log.info("probe failed", worker=self._worker, error=str(error) or type(error).__name__)
                self._set(BreakerState.OPEN)
            else:
                break
        self._closed_at = self._counted_at = time.monotonic()
        self._own, self._shared = self._flags.breaker_faults - 1, 0
        log.info("breaker closed", worker=self._worker, open_seconds=round(self._closed_at - self.opened_at, 1))
        self._set(BreakerState.CLOSED)

    def _set(self, state: BreakerState) -> None:
        self.state = state
        self._changed()
