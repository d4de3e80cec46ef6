"""One policy's turn at the trace: the same caches before, then every request at its time."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

from benchmarks.routing.clock import SimulatedClock
from benchmarks.routing.trace import Trace
from benchmarks.routing.workers import MODEL, KnownWorker, LocalWorker
from kvbaton.errors import RequestError
from kvbaton.v1 import generate_pb2
from services.config.common import PhaseFlags, RoutingFlags
from services.config.frontend import FrontendConfig
from services.frontend.dispatch.pair_checks import PairChecks
from services.frontend.dispatch.queue import DispatchQueue
from services.frontend.router.kv.indexes import KvIndexes
from services.frontend.router.placement import Router, Target
from services.frontend.router.policies.make import make_policies
from services.frontend.router.worker import Worker
from services.frontend.service import GenerationService
from services.requests import Limits

OUTPUT_TOKENS = 8
# Of the clock of this machine, which no simulated second moves.
_NEVER = 1e6
_CONFIG = FrontendConfig(
    queue_timeout=_NEVER,
    phases=PhaseFlags(prefill_timeout=_NEVER, transfer_timeout=_NEVER),
    token_gap_timeout=_NEVER,
    total_timeout=_NEVER,
)


@dataclass(frozen=True)
class Sample:
    """One answered request. Seconds and tokens."""

    worker: str
    ttft: float
    prompt_tokens: int
    cached_tokens: int


@dataclass
class Played:
    """What came of it, with so many workers."""

    name: str
    workers: int
    samples: list[Sample] = field(default_factory=list[Sample])
    errors: Counter[str] = field(default_factory=Counter[str])

    @property
    def hit_tokens(self) -> int:
        """Prompt tokens that the chosen workers had."""
        return sum(sample.cached_tokens for sample in self.samples)

    @property
    def hit_rate(self) -> float:
        """Of all prompt tokens."""
        return self.hit_tokens / sum(sample.prompt_tokens for sample in self.samples)

    @property
    def mean_ttft(self) -> float:
        """Seconds."""
        return statistics.fmean(sample.ttft for sample in self.samples)

    def ttft(self, percent: int) -> float:
        """That percentile, in seconds."""
        return statistics.quantiles((sample.ttft for sample in self.samples), n=100)[percent - 1]

    @property
    def busiest_by_requests(self) -> float:
        """Requests of the worker that got most, against the mean of all workers."""
        return self._busiest(lambda sample: 1)

    @property
    def busiest_by_tokens(self) -> float:
        """The same in prompt tokens that had to be computed."""
        return self._busiest(lambda sample: sample.prompt_tokens - sample.cached_tokens)

    def _busiest(self, value: Callable[[Sample], int]) -> float:
        totals: Counter[str] = Counter()
        for sample in self.samples:
            totals[sample.worker] += value(sample)
        return max(totals.values()) * self.workers / totals.total()


def play(name: str, flags: RoutingFlags, trace: Trace) -> Played:
    """With workers and a frontend of its own, in simulated time."""
    with asyncio.Runner(loop_factory=SimulatedClock) as runner:
        return runner.run(_play(name, flags, trace))


async def _play(name: str, flags: RoutingFlags, trace: Trace) -> Played:
    played = Played(name, trace.setting.workers)
    async with contextlib.AsyncExitStack() as stack:
        names = [f"worker-{number:02}" for number in range(trace.setting.workers)]
        workers = [await stack.enter_async_context(LocalWorker(each)) for each in names]
        generation = await stack.enter_async_context(_frontend(workers, flags))
        # The sessions stand.
        await asyncio.sleep(1.0)
        async with asyncio.TaskGroup() as fills:
            for worker, prefixes in zip(names, trace.held, strict=True):
                fills.create_task(_fill(generation, worker, [trace.prefixes[prefix] for prefix in prefixes]))
        # Every event and every report has been heard.
        await asyncio.sleep(5.0)
        clock = asyncio.get_running_loop().time
        started = clock()
        async with asyncio.TaskGroup() as requests:
            for number, arrival in enumerate(trace.arrivals):
                await asyncio.sleep(started + arrival.at - clock())
                requests.create_task(_ask(generation, trace.prompt(number), played))
    return played


@contextlib.asynccontextmanager
async def _frontend(workers: Sequence[LocalWorker], flags: RoutingFlags) -> AsyncGenerator[GenerationService]:
    known: list[KnownWorker] = []
    async with contextlib.AsyncExitStack() as stack:
        index: KvIndexes | None = None
        if flags.kv_aware:
            index = KvIndexes(lambda: known, max_pages=flags.kv_aware_max_pages, events=flags.kv_aware_events)
            await stack.enter_async_context(index)
        router, policies = cast("Router", _Router(known)), make_policies(flags, index, random.Random(1))
        queue = DispatchQueue(router, PairChecks(enabled=False), policies, limit=100_000, ready_timeout=_NEVER)
        for worker in workers:
            known.append(each := KnownWorker(worker, lambda worker: queue.credits_came(cast("Worker", worker))))
            stack.push_async_callback(each.link.close)
        if index is not None:
            index.workers_changed()
        yield GenerationService(_CONFIG, router, queue)


class _Router:
    """One model, whose workers never change."""

    def __init__(self, workers: list[KnownWorker]) -> None:
        self._workers = workers

    def targets(self, model: str) -> list[Target]:
        return [Target(cast("Worker", worker)) for worker in self._workers]

    def find_model(self, name: str) -> KnownWorker:
        return self._workers[0]

    def limits(self, model: str) -> Limits:
        return self._workers[0].limits


async def _fill(generation: GenerationService, worker: str, prefixes: Sequence[list[int]]) -> None:
    """One worker computes these, one after the other, and keeps them."""
    for prefix in prefixes:
        live = await generation.submit(_request([*prefix, 99], 1, worker))
        async for _ in live.outputs():
            pass


async def _ask(generation: GenerationService, prompt: list[int], played: Played) -> None:
    """One request of the trace."""
    clock = asyncio.get_running_loop().time
    sent = clock()
    first: float | None = None
    try:
        live = await generation.submit(_request(prompt, OUTPUT_TOKENS))
        async for output in live.outputs():
            if first is None and output.token_ids:
                first = clock()
            if (finished := output.finished) is not None and first is not None:
                played.samples.append(
                    Sample(finished.decode_worker, first - sent, len(prompt), finished.cached_prompt_tokens)
                )
    except RequestError as error:
        played.errors[error.reason] += 1


def _request(prompt: list[int], tokens: int, worker: str = "") -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(
        model=MODEL.name,
        token_ids=generate_pb2.TokenIds(ids=prompt),
        sampling=generate_pb2.SamplingParams(max_new_tokens=tokens, temperature=0),
        decode_worker=worker,
    )
