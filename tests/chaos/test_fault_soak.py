"""Five thousand requests under one fault after the other: each ends once, right or with a typed error; none hangs.

`KVBATON_CHAOS_SEED` replays a run's faults; each run prints its own.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from kvbaton.errors import Reason
from tests.support.fault_cluster import FaultCluster
from tests.support.fault_matrix import Fault
from tests.support.injection import Target, inject, repair
from tests.support.resources import ONE_TRIMMED_ARENA, Footprint, footprints
from tests.support.subject import Subject, ended_lines

REQUESTS = 5_000
WARM_UP = 1_000
CONCURRENCY = 32
SUCCEED = 0.99
MEMORY_GROWTH = 0.10
# A worker's streams and connections come back one after the other, and one of them may be between two tries.
SETTLING = 5.0
SETTLES_WITHIN = 60.0
FLUCTUATION = 2
# From the repair of one until the next. Requests that have lost one worker are done by then: those that lose both
# prefill workers have nobody left to be tried with.
FAULT_EVERY = 1.0
# Longer than two heartbeats (1 s), or nobody would notice.
SILENCE = (1.1, 1.6)
# Clients that leave, or run out of time, at once.
CLIENTS = 8
NO_TIME = 0.05

# Chosen as often as they stand here.
FAULTS = (
    Fault.PREFILL_KILLED,
    Fault.PREFILL_FROZEN,
    Fault.DECODE_KILLED,
    Fault.DECODE_FROZEN,
    Fault.SESSION_BLACK_HOLED,
    Fault.SESSION_RESET,
    Fault.KV_BLACK_HOLED,
    Fault.KV_RESET,
    Fault.ETCD_KILLED,
    Fault.ETCD_FROZEN,
    Fault.CLIENT_GONE,
    Fault.DEADLINE,
)
INSTANTANEOUS = {Fault.SESSION_RESET, Fault.KV_RESET, Fault.CLIENT_GONE, Fault.DEADLINE}
RETRYABLE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.DEADLINE_EXCEEDED}

PREFILL = "max_total_tokens=16384,prefill_base=0.01,transfer_base=0.01"
DECODE = "max_total_tokens=16384,decode_step=0.01,max_running_requests=32"


class Load:
    """Requests through the frontend, so many at a time. All that has gone wrong in a way that is not allowed raises."""

    def __init__(self, cluster: FaultCluster, rng: random.Random) -> None:
        self.sent = 0
        self.succeeded = 0
        self.given_up = 0
        """By their own clients."""
        self.errors: Counter[str] = Counter()
        self.hasty = 0
        """So many of the next requests have next to no time."""
        self.live: dict[Subject, None] = {}
        self._leaving: set[Subject] = set()
        self._client = cluster.clients["frontend"]
        self._rng = rng

    async def run(self, requests: int) -> None:
        """Sends them all, and checks how each ends."""
        left = iter(range(requests))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CONCURRENCY):
                tasks.create_task(self._one_after_the_other(left))

    async def leave(self, count: int) -> None:
        """The clients of so many live requests are gone."""
        leaving = list(self.live)[:count]
        self._leaving.update(leaving)
        await asyncio.gather(*(subject.leave() for subject in leaving))

    async def _one_after_the_other(self, left: Iterator[int]) -> None:
        for _ in left:
            hasty = self.hasty > 0
            self.hasty -= hasty
            subject = Subject(
                self._client,
                prompt_tokens=self._rng.randint(4, 64),
                tokens=self._rng.randint(4, 32),
                timeout=NO_TIME if hasty else 60.0,
            )
            self.sent += 1
            self.live[subject] = None
            await subject.end(90)
            del self.live[subject]
            subject.check_tokens()
            self._count(subject, hasty)

    def _count(self, subject: Subject, hasty: bool) -> None:
        error = subject.error
        if subject.finishes:
            assert subject.finishes == 1
            self.succeeded += 1
        elif subject in self._leaving or (hasty and error and error.code is grpc.StatusCode.DEADLINE_EXCEEDED):
            self._leaving.discard(subject)
            self.given_up += 1
        else:
            assert error is not None, "neither an answer nor an error"
            assert error.code in RETRYABLE, error
            assert error.reason not in (Reason.UNTYPED, Reason.INTERNAL), error
            self.errors[str(error)] += 1


class Trouble:
    """One fault after the other, as the seed has it."""

    def __init__(self, cluster: FaultCluster, load: Load, rng: random.Random) -> None:
        self.happened: Counter[Fault] = Counter()
        self._cluster, self._load, self._rng = cluster, load, rng

    @asynccontextmanager
    async def during(self, faults: Iterator[Fault]) -> AsyncGenerator[None]:
        """Faults while what is inside runs; everything is repaired at the end."""
        over = asyncio.Event()
        task = asyncio.create_task(self._go_on(faults, over))
        try:
            yield
        finally:
            over.set()
            await task

    async def _go_on(self, faults: Iterator[Fault], over: asyncio.Event) -> None:
        for fault in faults:
            if over.is_set():
                return
            await self._one(fault)
            await asyncio.sleep(FAULT_EVERY)

    async def _one(self, fault: Fault) -> None:
        rng, cluster = self._rng, self._cluster
        killed = fault in (Fault.PREFILL_KILLED, Fault.DECODE_KILLED)
        # The first ones live as long as the test: their memory is compared.
        first = 1 if killed else 0
        target = Target(cluster, rng.choice(cluster.prefills[first:]), rng.choice(cluster.decodes[first:]))
        silence = rng.uniform(*SILENCE)
        self.happened[fault] += 1
        if fault is Fault.CLIENT_GONE:
            await self._load.leave(CLIENTS)
        elif fault is Fault.DEADLINE:
            self._load.hasty += CLIENTS
        await inject(fault, target)
        if fault not in INSTANTANEOUS:
            await asyncio.sleep(silence)
        await repair(fault, target)
        await cluster.whole()


def endless(rng: random.Random) -> Iterator[Fault]:
    """Every fault once in each round, in an order of its own."""
    while True:
        yield from rng.sample(FAULTS, len(FAULTS))


@pytest.mark.peers(1, 3, 13)
async def test_five_thousand_requests_under_faults(tmp_path: Path) -> None:
    seed = int(os.environ.get("KVBATON_CHAOS_SEED") or random.randrange(2**32))
    print(f"KVBATON_CHAOS_SEED={seed}")
    rng = random.Random(seed)
    started = time.monotonic()
    async with FaultCluster(
        tmp_path, decodes=3, prefill=PREFILL, decode=DECODE, environment=ONE_TRIMMED_ARENA
    ) as cluster:
        load = Load(cluster, random.Random(seed))
        trouble = Trouble(cluster, load, rng)
        async with trouble.during(iter(FAULTS)):
            await load.run(WARM_UP)
        await cluster.at_rest()
        await asyncio.sleep(SETTLING)
        before = await footprints(cluster.processes)
        async with trouble.during(endless(rng)):
            await load.run(REQUESTS - WARM_UP)
        await cluster.at_rest()
        lived = ["frontend", cluster.prefills[0], cluster.decodes[0]]
        after = await settled(cluster, before, lived)
        ends = Counter(line["request_id"] for line in ended_lines(cluster.processes.log("frontend")))

    failed = sum(load.errors.values())
    seconds = time.monotonic() - started
    print(f"{load.succeeded} succeeded, {failed} failed, {load.given_up} given up in {seconds:.0f} s")
    print(f"{trouble.happened.total()} faults: {dict(trouble.happened)}; errors: {dict(load.errors)}")
    assert load.succeeded + failed + load.given_up == load.sent == REQUESTS
    assert load.succeeded >= SUCCEED * (REQUESTS - load.given_up)
    assert max(ends.values()) == 1, "a request that ended twice"
    assert len(ends) >= load.succeeded + failed, "a request without an end"
    check_flat({name: (before[name], after[name]) for name in lived})


async def settled(cluster: FaultCluster, before: dict[str, Footprint], names: list[str]) -> dict[str, Footprint]:
    """The footprints, once they are what they were: what waits for a broken peer gives up within a minute."""
    until = time.monotonic() + SETTLES_WITHIN
    while True:
        found = await footprints(cluster.processes)
        flat = all(is_flat(before[name], found[name]) for name in names)
        if flat or time.monotonic() > until:
            return found


def is_flat(before: Footprint, after: Footprint) -> bool:
    """Whether tasks and files are as many as before."""
    return after.tasks <= before.tasks + FLUCTUATION and after.files <= before.files + FLUCTUATION


def check_flat(footprints: dict[str, tuple[Footprint, Footprint]]) -> None:
    """Nothing has grown."""
    for name, (before, after) in footprints.items():
        print(f"{name}: {before} -> {after}, memory {after.resident / before.resident - 1:+.2%}")
    for name, (before, after) in footprints.items():
        assert is_flat(before, after), name
        assert after.resident <= before.resident * (1 + MEMORY_GROWTH), name
