"""What the generator itself costs: its CPU share, and how late its event loop runs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from types import TracebackType
from typing import Self

from services.tools.bench.statistics import Distribution, Histogram

LAG_LIMIT = 0.020
"""Seconds of event loop lag at p99 beyond which the results measure the generator."""
CPU_LIMIT = 0.85
"""Share of a core beyond which messages wait for the generator, although its event loop keeps turning."""
_INTERVAL = 0.010


class Monitor:
    """Measures while it is entered."""

    def __init__(self) -> None:
        self._lag = Histogram()
        self._cpu = self._wall = 0.0

    async def __aenter__(self) -> Self:
        self._cpu, self._wall = -time.process_time(), -time.perf_counter()
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cpu, self._wall = self._cpu + time.process_time(), self._wall + time.perf_counter()
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _watch(self) -> None:
        while True:
            due = time.perf_counter() + _INTERVAL
            await asyncio.sleep(_INTERVAL)
            self._lag.add(max(0.0, time.perf_counter() - due))

    @property
    def cpu_share(self) -> float:
        """CPU seconds of this process, all of its threads, per second; 1 is one core."""
        return self._cpu / self._wall if self._wall > 0 else 0.0

    def loop_lag(self) -> Distribution:
        """Seconds by which a timer of 10 ms fired late."""
        return self._lag.distribution()
