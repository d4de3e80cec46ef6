"""Asks the engine for an answer when no traffic shows that it gives any, and says when it doesn't.

Dead engines are found elsewhere; this is about the living that don't answer. Three rules keep it from condemning a
worker that is merely busy: it asks only when the engine has been quiet; while legs are live, whatever the scheduler
reports excuses a late answer; and liveness (/live) never hears of it.

A canary is no leg: it stands in no metric, no count of live requests, and no measure of the engine's silence.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from services.telemetry import metrics
from services.worker.core import WorkerCore
from services.worker.engines.protocol import EngineDeadError

log = structlog.get_logger()

# A sick worker is asked this often, so that it is back soon.
_RECHECK = 1.0
_LOADS_TIMEOUT = 1.0


class Canary:
    """One per serving worker; needs a loaded `core`. Times in seconds, on the monotonic clock."""

    def __init__(
        self, core: WorkerCore, judge: Callable[[str], Awaitable[None]], *, interval: float, silence: float
    ) -> None:
        """`judge` hears what ails the engine whenever that changes; an empty string: nothing.

        `interval` without traffic makes a canary fly. `silence` is how long an engine with work may say nothing.
        """
        self._core = core
        self._judge = judge
        self._interval = interval
        self._silence = silence
        self._ailments: dict[int, str] = {}
        """By dp rank; asked again until none is left."""
        self._told = ""
        self._next_rank = 0
        self._answered = time.monotonic()

    async def run(self) -> None:
        """Never returns; to be cancelled."""
        while True:
            await self._until_due()
            rank = self._choose_rank()
            ailment = await self._ask(rank)
            metrics.CANARIES.labels(self._core.role, "failed" if ailment else "answered").inc()
            if ailment:
                self._ailments[rank] = f"dp rank {rank}: {ailment}"
            else:
                self._ailments.pop(rank, None)
            await self._tell()

    async def _until_due(self) -> None:
        if self._ailments:
            await asyncio.sleep(min(_RECHECK, self._interval))
            return
        left = self._quiet_left()
        while left > 0:  # legs speak meanwhile
            await asyncio.sleep(left)
            left = self._quiet_left()

    def _quiet_left(self) -> float:
        return max(self._core.legs.last_word, self._answered) + self._interval - time.monotonic()

    def _choose_rank(self) -> int:
        """In turn; of those that ail, if any do."""
        size = self._core.require_loaded().info.dp_size
        candidates = sorted(self._ailments) or range(size)
        rank = next((each for each in candidates if each >= self._next_rank), candidates[0])
        self._next_rank = (rank + 1) % size
        return rank

    async def _ask(self, rank: int) -> str:
        """Empty when the rank answers to the end, else what ails it."""
        loaded = self._core.require_loaded()
        asked = time.monotonic()
        try:
            self._core.canary_rank = rank
            patience = max(await self._patience(rank, asked), min(_RECHECK, self._silence))
            while patience > 0:
                try:
                    async with asyncio.timeout(patience):
                        await loaded.engine.probe(rank, loaded.probe_payload)
                except TimeoutError:
                    # Too late, unless the scheduler was busy with something else.
                    patience = await self._patience(rank, asked)
                    continue
                self._answered = time.monotonic()
                return ""
        except EngineDeadError as error:
            return str(error)
        except RuntimeError as error:
            return str(error)
        finally:
            self._core.canary_rank = None
        return f"the engine has said nothing for {self._silence:g} s"

    async def _patience(self, rank: int, asked: float) -> float:
        """How long the engine may stay silent yet: since it showed life, or since `asked` if that is all its work."""
        last_sign = asked
        if self._core.legs:
            last_sign = max(self._core.legs.last_word, self._answered, await self._last_report(rank))
        return self._silence - (time.monotonic() - last_sign)

    async def _last_report(self, rank: int) -> float:
        """Schedulers report after every batch, so a long prefill shows although no leg has a word of it."""
        try:
            async with asyncio.timeout(_LOADS_TIMEOUT):
                loads = await self._core.loads()
        except (TimeoutError, EngineDeadError):
            return 0.0
        reported = next((load.reported_at for load in loads if load.dp_rank == rank), 0.0)
        return time.monotonic() - (time.time() - reported) if reported else 0.0

    async def _tell(self) -> None:
        ailment = "; ".join(self._ailments[rank] for rank in sorted(self._ailments))
        if ailment == self._told:
            return
        self._told = ailment
        if ailment:
            log.error("engine does not answer", ailment=ailment)
        else:
            log.info("engine answers again")
        await self._judge(ailment)
