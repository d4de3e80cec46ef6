"""Sends a workload: open loop or closed loop, within the bounds of the flags."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from time import perf_counter

from services.tools.bench.options import BenchFlags
from services.tools.bench.results import Results
from services.tools.bench.samples import Sample
from services.tools.bench.sender import Sender
from services.tools.bench.workload import Planned, Workload, poisson


class Load:
    """The measured load. A cancelled `run` cancels what is in flight, and `results` has it."""

    def __init__(self, flags: BenchFlags, workload: Workload, sender: Sender, results: Results) -> None:
        self._flags, self._workload, self._sender, self._results = flags, workload, sender, results
        self._ended: asyncio.Queue[Sample] = asyncio.Queue()

    async def run(self) -> None:
        """Returns when every request has ended."""
        self._results.begin(perf_counter())
        tally = asyncio.create_task(self._tally())
        try:
            if self._flags.rate is not None:
                await self._open_loop(self._flags.rate)
            else:
                await self._closed_loop()
        finally:
            tally.cancel()
            await asyncio.wait({tally})
            if not tally.cancelled():
                tally.result()
            while not self._ended.empty():
                self._results.add(self._ended.get_nowait())

    async def _tally(self) -> None:
        """One sample a turn: answers that end together must not delay the messages of others."""
        while True:
            self._results.add(await self._ended.get())
            await asyncio.sleep(0)

    async def _open_loop(self, rate: float) -> None:
        limit = self._flags.request_limit
        async with asyncio.TaskGroup() as group:
            for index, arrival in enumerate(poisson(rate, self._flags.seed)):
                if index >= limit or arrival > self._flags.duration_limit:
                    return
                # Made before it is due, so that making it delays nothing.
                planned = self._workload.planned(index)
                start = self._results.began + arrival
                await _sleep_until(start)
                group.create_task(self._one(planned, start))

    async def _closed_loop(self) -> None:
        limit = self._flags.request_limit
        indices = count() if limit == float("inf") else iter(range(int(limit)))
        ends = self._results.began + self._flags.duration_limit
        async with asyncio.TaskGroup() as group:
            for _ in range(self._flags.in_flight):
                group.create_task(self._one_after_the_other(indices, ends))

    async def _one_after_the_other(self, indices: Iterator[int], ends: float) -> None:
        while perf_counter() < ends and (index := next(indices, None)) is not None:
            await self._one(self._workload.planned(index))

    async def _one(self, planned: Planned, start: float | None = None) -> None:
        self._ended.put_nowait(await self._sender.send(planned, start))
        _end_if_cancelled()


async def warm_up(flags: BenchFlags, workload: Workload, sender: Sender) -> Results:
    """Runs --warmup requests, as a closed loop; they are never cancelled."""
    results = Results()
    results.begin(perf_counter())
    indices = iter(range(flags.warmup))

    async def in_turn() -> None:
        for index in indices:
            planned = replace(workload.planned(index, "-warmup"), cancel_at=None)
            results.add(await sender.send(planned))
            _end_if_cancelled()

    async with asyncio.TaskGroup() as group:
        for _ in islice(range(flags.in_flight), flags.warmup):
            group.create_task(in_turn())
    return results


async def _sleep_until(moment: float) -> None:
    """Gives way to the event loop even when the moment has passed. A timer of uvloop may fire 0.5 ms early."""
    await asyncio.sleep(max(0.0, moment - perf_counter()))
    while (left := moment - perf_counter()) > 0:  # noqa: ASYNC110
        await asyncio.sleep(left)


def _end_if_cancelled() -> None:
    """`Sender.send` answers a cancelled task with its sample; here the task ends after all."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
