"""Five thousand requests under a fault every second: each ends once, right or with a typed error; none hangs.

Faults begin strictly every second, unless the machine is too slow for that, and are over before the next begins. What a
killed process needs to start again is no fault: meanwhile others go on, and hit only roles with another worker left.
`KVBATON_CHAOS_SEED` replays a run's plan of faults; each run prints its own.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from statistics import mean
from typing import Any

import grpc
import pytest

from kvbaton.errors import Reason
from tests.support.fault_cluster import FaultCluster
from tests.support.fault_matrix import Fault
from tests.support.injection import Target, inject, repair
from tests.support.resources import ONE_TRIMMED_ARENA, check_flat, footprints, gauges, settled
from tests.support.subject import Subject, ended_lines
from tests.support.waiting import eventually

REQUESTS = 5_000
WARM_UP = 1_000
CONCURRENCY = 32
SUCCEED = 0.99
MEMORY_GROWTH = 0.10
# A worker's streams and connections come back one after the other, and one of them may be between two tries.
SETTLING = 5.0
# What every fault leaves would be dozens; of what one kind leaves a run of a minute shows three or four.
FLUCTUATION = 3
FAULT_EVERY = 1.0
# How many times fewer a busy machine may have.
SLACK = 3.0
HEARTBEAT = 0.3
# Longer than two heartbeats, or nobody would notice; over before the next.
SILENCE = (0.65, 0.85)
# Clients that leave, or run out of time, at once.
CLIENTS = 8
NO_TIME = 0.05

# Chosen as often as they stand here.
PREFILL_FAULTS = (Fault.PREFILL_KILLED, Fault.PREFILL_FROZEN, Fault.KV_BLACK_HOLED, Fault.KV_RESET)
DECODE_FAULTS = (Fault.DECODE_KILLED, Fault.DECODE_FROZEN, Fault.SESSION_BLACK_HOLED, Fault.SESSION_RESET)
ETCD_FAULTS = (Fault.ETCD_KILLED, Fault.ETCD_FROZEN)
CLIENT_FAULTS = (Fault.CLIENT_GONE, Fault.DEADLINE)
FAULTS = (*PREFILL_FAULTS, *DECODE_FAULTS, *ETCD_FAULTS, *CLIENT_FAULTS)
KILLS = {Fault.PREFILL_KILLED, Fault.DECODE_KILLED}
INSTANTANEOUS = {Fault.SESSION_RESET, Fault.KV_RESET, *CLIENT_FAULTS}
RETRYABLE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.DEADLINE_EXCEEDED}

PREFILL = "max_total_tokens=16384,prefill_base=0.01,transfer_base=0.01"
DECODE = "max_total_tokens=16384,decode_step=0.01,max_running_requests=32,heartbeat_interval=0.2,heartbeat_timeout=0.2"


class Load:
    """Requests through the frontend, so many at a time. All that has gone wrong in a way that is not allowed raises."""

    def __init__(self, cluster: FaultCluster, rng: random.Random) -> None:
        self.sent: set[str] = set()
        self.succeeded = 0
        self.given_up = 0
        """By their own clients."""
        self.unheard: set[str] = set()
        """Those of them whose clients had heard nothing yet: they may never have reached the frontend."""
        self.errors: Counter[str] = Counter()
        self.hasty = 0
        """So many of the next requests have next to no time."""
        self.live: dict[Subject, None] = {}
        self._leaving: set[Subject] = set()
        self._client = cluster.clients["frontend"]
        self._rng = rng

    async def run(self, wanted: Callable[[], bool]) -> None:
        """Sends them as long as more are wanted, and checks how each ends."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CONCURRENCY):
                tasks.create_task(self._one_after_the_other(wanted))

    async def leave(self, count: int) -> None:
        """The clients of so many live requests are gone."""
        leaving = list(self.live)[:count]
        self._leaving.update(leaving)
        await asyncio.gather(*(subject.leave() for subject in leaving))

    async def _one_after_the_other(self, wanted: Callable[[], bool]) -> None:
        while wanted():
            hasty = self.hasty > 0
            self.hasty -= hasty
            subject = Subject(
                self._client,
                prompt_tokens=self._rng.randint(4, 64),
                tokens=self._rng.randint(4, 32),
                timeout=NO_TIME if hasty else 60.0,
            )
            self.sent.add(subject.request_id)
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
            self.given_up += 1
            if not subject.received:
                self.unheard.add(subject.request_id)
        else:
            assert error is not None, "neither an answer nor an error"
            assert error.code in RETRYABLE, error
            assert error.reason not in (Reason.UNTYPED, Reason.INTERNAL), error
            self.errors[str(error)] += 1


@dataclass(frozen=True, slots=True)
class Planned:
    """A fault, the workers of each role in the order in which they are to suffer it, and for how many seconds."""

    fault: Fault
    prefills: list[str]
    decodes: list[str]
    seconds: float

    def target(self, cluster: FaultCluster, whole: set[str]) -> Target | None:
        """Whom it hits; None if it would take a role's last worker. `whole` are those that work."""
        prefill, decode = self._victim(self.prefills, whole), self._victim(self.decodes, whole)
        if (self.fault in PREFILL_FAULTS and prefill is None) or (self.fault in DECODE_FAULTS and decode is None):
            return None
        # What the fault doesn't concern only stands there.
        return Target(cluster, prefill or self.prefills[0], decode or self.decodes[0])

    def _victim(self, names: list[str], whole: set[str]) -> str | None:
        # The first one of a role lives as long as the test: its memory is compared.
        mortal = [name for name in names if self.fault not in KILLS or not name.endswith("0")]
        left = whole.intersection(names)
        return next((name for name in mortal if name in left and len(left) > 1), None)


def plan(rng: random.Random, prefills: list[str], decodes: list[str]) -> Iterator[Planned]:
    """Every fault once in each round, in an order of its own."""
    while True:
        for fault in rng.sample(FAULTS, len(FAULTS)):
            yield Planned(
                fault,
                rng.sample(prefills, len(prefills)),
                rng.sample(decodes, len(decodes)),
                rng.uniform(*SILENCE),
            )


class Trouble:
    """A fault every second, one at a time, as the seed has it. One that isn't possible now comes as soon as it is."""

    def __init__(self, cluster: FaultCluster, load: Load, planned: Iterator[Planned]) -> None:
        self.happened: Counter[Fault] = Counter()
        self.pauses: list[float] = []
        """Seconds from the beginning of each fault to that of the next."""
        self._cluster, self._load, self._planned = cluster, load, planned
        self._postponed: list[Planned] = []
        self._etcd_starts: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def complete(self) -> bool:
        """Whether every fault has happened, or none will any more, as `during` then says."""
        return len(self.happened) == len(FAULTS) or (self._task is not None and self._task.done())

    @asynccontextmanager
    async def during(self) -> AsyncGenerator[None]:
        """Faults while what is inside runs; everything is repaired at the end."""
        over = asyncio.Event()
        self._task = asyncio.create_task(self._go_on(over))
        try:
            yield
        finally:
            over.set()
            await self._task
            await self._etcd_started()
            await self._cluster.whole()

    async def _go_on(self, over: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        due, began = loop.time(), None
        while not over.is_set():
            fault, target, seconds = await self._next()
            now = loop.time()
            if began is not None:
                self.pauses.append(now - began)
            began = now
            await self._one(fault, target, seconds)
            due = max(due + FAULT_EVERY, loop.time())
            await asyncio.sleep(due - loop.time())

    async def _next(self) -> tuple[Fault, Target, float]:
        whole = await self._cluster.routable()
        etcd_runs = self._etcd_starts is None or self._etcd_starts.done()
        postponed, self._postponed = iter(self._postponed), []
        # Clients can always go, so it ends.
        for planned in chain(postponed, self._planned):
            target = planned.target(self._cluster, whole)
            if target is not None and (etcd_runs or planned.fault not in ETCD_FAULTS):
                self._postponed += postponed
                return planned.fault, target, planned.seconds
            self._postponed.append(planned)
        raise AssertionError("a plan has no end")

    async def _one(self, fault: Fault, target: Target, seconds: float) -> None:
        self.happened[fault] += 1
        if fault is Fault.CLIENT_GONE:
            await self._load.leave(CLIENTS)
        elif fault is Fault.DEADLINE:
            self._load.hasty += CLIENTS
        if fault in ETCD_FAULTS:
            await self._etcd_started()
        await inject(fault, target)
        if fault not in INSTANTANEOUS:
            await asyncio.sleep(seconds)
        if fault is Fault.ETCD_KILLED:
            self._etcd_starts = asyncio.create_task(repair(fault, target))
        else:
            await repair(fault, target)

    async def _etcd_started(self) -> None:
        if self._etcd_starts is not None:
            await self._etcd_starts


def test_a_seed_has_one_plan_which_leaves_a_worker_of_each_role() -> None:
    prefills, decodes = ["prefill0", "prefill1"], ["decode0", "decode1", "decode2"]
    plans = [list(islice(plan(random.Random(7), prefills, decodes), 10 * len(FAULTS))) for _ in range(2)]
    assert plans[0] == plans[1]
    assert Counter(planned.fault for planned in plans[0]) == dict.fromkeys(FAULTS, 10)
    cluster: Any = object()
    for planned in plans[0]:
        role = planned.fault in PREFILL_FAULTS, planned.fault in DECODE_FAULTS
        assert (planned.target(cluster, {"prefill0", "decode0"}) is None) is any(role)
        assert (planned.target(cluster, {"prefill1", "decode0", "decode1"}) is None) is role[0]
        target = planned.target(cluster, {*prefills, *decodes})
        assert target is not None
        if planned.fault in KILLS:
            assert "0" not in (target.prefill if role[0] else target.decode), "it lives as long as the test"


@pytest.mark.peers(1, 3, 13)
async def test_five_thousand_requests_under_faults(tmp_path: Path) -> None:
    seed = int(os.environ.get("KVBATON_CHAOS_SEED") or random.randrange(2**32))
    print(f"KVBATON_CHAOS_SEED={seed}")
    started = time.monotonic()
    cluster = FaultCluster(tmp_path, decodes=3, prefill=PREFILL, decode=DECODE, environment=ONE_TRIMMED_ARENA)
    cluster.also_frontend("frontend", "--heartbeat", f"{HEARTBEAT:g}")
    async with cluster:
        load = Load(cluster, random.Random(seed))
        trouble = Trouble(cluster, load, plan(random.Random(seed), cluster.prefills, cluster.decodes))
        async with trouble.during():
            await load.run(lambda: len(load.sent) < WARM_UP or not trouble.complete)
        await cluster.at_rest()
        await asyncio.sleep(SETTLING)
        before = await footprints(cluster.processes)
        # On a fast machine the warm-up may have been most of them.
        requests = max(REQUESTS, len(load.sent) + REQUESTS // 2)
        async with trouble.during():
            await load.run(lambda: len(load.sent) < requests)
        await cluster.at_rest()
        lived = ["frontend", cluster.prefills[0], cluster.decodes[0]]
        before = {name: before[name] for name in lived}
        after = await settled(cluster.processes, before, fluctuation=FLUCTUATION)
        failed = sum(load.errors.values())
        seconds = time.monotonic() - started
        print(f"{load.succeeded} succeeded, {failed} failed, {load.given_up} given up in {seconds:.0f} s")
        print(f"{trouble.happened.total()} faults: {dict(trouble.happened)}; errors: {dict(load.errors)}")
        print(f"a fault every {mean(trouble.pauses):.2f} s, {max(trouble.pauses):.2f} s at most")
        await none_left(cluster)
        ended = [line["request_id"] for line in ended_lines(cluster.processes.log("frontend"))]

    check_ends(ended, load.sent, load.unheard)
    assert load.succeeded + failed + load.given_up == len(load.sent) == requests
    assert load.succeeded >= SUCCEED * (requests - load.given_up)
    assert mean(trouble.pauses) < SLACK * FAULT_EVERY
    check_flat(before, after, growth=MEMORY_GROWTH, fluctuation=FLUCTUATION)


async def none_left(cluster: FaultCluster) -> None:
    """Waits until the frontend has no request."""

    async def none() -> bool:
        return (await gauges(cluster.processes.metrics_endpoints["frontend"]))["kvbaton_live_requests"] == 0

    await eventually(none, within=30, every=0.1, what="no live request")


def check_ends(ended: Iterable[str], sent: set[str], unheard: set[str]) -> None:
    """Each request that was `sent` has ended once; of the `unheard` some may never have come."""
    ends = Counter(ended)
    assert not [request for request, count in ends.items() if count > 1], "requests that ended twice"
    assert not ends.keys() - sent, "ends of requests that nobody has sent"
    assert not sent - ends.keys() - unheard, "requests without an end"


def test_each_request_needs_one_end_of_its_own() -> None:
    check_ends(["a", "b"], {"a", "b", "c"}, {"b", "c"})
    for ended in (["a", "a", "b"], ["a"], ["a", "b", "x"]):
        with pytest.raises(AssertionError):
            check_ends(ended, {"a", "b"}, set())
