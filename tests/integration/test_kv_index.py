"""Whatever happens to events, workers and frontends under load: the index ends equal to one rebuilt from snapshots."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import AsyncGenerator, AsyncIterator

import pytest
import pytest_asyncio

from services.frontend.router.kv import follower
from services.frontend.router.kv.index import Holder, cache_owner
from services.frontend.router.kv.indexes import KvIndexes
from services.registry.backoff import Backoff
from services.requests import Role
from services.telemetry import metrics
from services.worker.engines.kv_events import BlockStored, KvChange
from services.worker.engines.simulated import SimulatedOptions
from services.worker.kv_events.hub import KvEventHub
from tests.support.cluster import FakeCluster
from tests.support.fake_engine import FakeEngine
from tests.support.kv_worker import KvWorker, Line, start_kv_worker
from tests.support.waiting import eventually

# Small enough that it evicts all the time.
OPTIONS = SimulatedOptions(dp_size=2, page_size=4, max_total_tokens=2048)


class Caches:
    """Workers under load, and who follows them."""

    def __init__(self) -> None:
        self.rng = random.Random(7)
        self.workers: dict[str, KvWorker] = {}
        self.prefixes = [[self.rng.randrange(1000) for _ in range(160)] for _ in range(8)]
        self.requests = 0
        self.stopping = False

    def all(self) -> list[KvWorker]:
        return list(self.workers.values())

    async def start(self, name: str, line: Line | None = None, hub: KvEventHub | None = None) -> KvWorker:
        worker = await start_kv_worker(name, OPTIONS, line or Line(self.rng), hub=hub)
        self.workers[name] = worker
        return worker

    async def load(self) -> None:
        """Requests until told to stop, with shared prefixes, on all ranks of all workers."""
        self.stopping = False
        while not self.stopping:
            worker = self.rng.choice(self.all())
            prompt = self.rng.choice(self.prefixes)[: self.rng.randint(1, 160)]
            prompt += [self.rng.randrange(1000) for _ in range(self.rng.randint(1, 80))]
            await worker.run(prompt, self.rng.randrange(OPTIONS.dp_size))
            self.requests += 1
            if self.requests % 50 == 0:
                await worker.engine.flush_cache()

    @contextlib.asynccontextmanager
    async def loaded(self) -> AsyncGenerator[None]:
        """Under load; it goes on for at least some requests before it ends."""
        loading = asyncio.create_task(self.load())
        try:
            yield
            await self.more(30)
        finally:
            self.stopping = True
            await loading

    async def more(self, requests: int) -> None:
        until = self.requests + requests
        await eventually(lambda: self.requests >= until, within=60)

    async def faults(self, count: int) -> None:
        """Waits until every worker's line has had so many."""
        await eventually(lambda: all(worker.line.faults >= count for worker in self.all()), within=60)

    async def ends_exact(self, kv: KvIndexes) -> None:
        """`kv` comes to know what every worker holds, and nothing else; so does one that begins now."""

        def truth() -> dict[Holder, set[int]]:
            return {holder: pages for worker in self.all() for holder, pages in worker.truth.items()}

        def exact(index: KvIndexes) -> bool:
            return all(index.exact(worker.owner) for worker in self.all()) and index.index.pages() == truth()

        for worker in self.all():  # each holds something, and tells of a change after a lost one
            await worker.run(self.prefixes[0])
        await eventually(lambda: len({holder.worker for holder in truth()}) == len(self.workers))
        await eventually(lambda: exact(kv), within=30, what="an exact index")
        async with KvIndexes(self.all) as fresh:
            await eventually(lambda: exact(fresh), what="an exact index from snapshots")
            assert fresh.index.pages() == kv.index.pages()


@pytest_asyncio.fixture
async def caches(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Caches]:
    monkeypatch.setattr(follower, "Backoff", lambda: Backoff(0.01, 0.05))
    caches = Caches()
    yield caches
    for worker in caches.all():
        await worker.stop()


def snapshots(why: str) -> float:
    return metrics.KV_INDEX_SNAPSHOTS.labels(why)._value.get()


async def test_under_load_it_follows(caches: Caches) -> None:
    for name in ("a", "b", "c"):
        await caches.start(name)
    async with KvIndexes(caches.all) as kv:
        async with caches.loaded():
            await caches.more(150)
        await caches.ends_exact(kv)


async def test_lost_and_doubled_messages_and_broken_streams(caches: Caches) -> None:
    doubts = snapshots("doubt")
    for name in ("a", "b"):
        await caches.start(name, Line(caches.rng, lost=0.03, doubled=0.03, broken=0.03))
    async with KvIndexes(caches.all) as kv:
        async with caches.loaded():
            await caches.faults(10)
        for worker in caches.all():
            worker.line.lost = worker.line.doubled = worker.line.broken = 0.0
        await caches.ends_exact(kv)
    assert snapshots("doubt") > doubts


async def test_a_broken_stream_is_resumed_without_a_snapshot(caches: Caches) -> None:
    await caches.start("a", Line(caches.rng, broken=0.1))
    async with KvIndexes(caches.all) as kv:
        await eventually(lambda: kv.exact(caches.workers["a"].owner))
        had = snapshots("missed") + snapshots("doubt")
        async with caches.loaded():
            await caches.faults(10)
        caches.workers["a"].line.broken = 0.0
        await caches.ends_exact(kv)
        assert snapshots("missed") + snapshots("doubt") == had


async def test_a_follower_that_is_cut_off_for_slowness(caches: Caches) -> None:
    """With so little kept that it can't always resume."""
    await caches.start("a", hub=KvEventHub("aggregated", kept=3, queued=100))
    missed = snapshots("missed")
    async with KvIndexes(caches.all) as kv:
        async with caches.loaded():
            for _ in range(15):
                await caches.more(8)
                for subscription in list(caches.workers["a"].hub._subscriptions):
                    subscription.end("slow")
        await caches.ends_exact(kv)
    assert snapshots("missed") > missed


async def test_a_worker_restarts_with_nothing(caches: Caches) -> None:
    await caches.start("a")
    await caches.start("b")
    async with KvIndexes(caches.all) as kv:
        async with caches.loaded():
            await caches.more(60)
            old = caches.workers["a"]
            await caches.start("a")
            kv.workers_changed()
            left = {holder.worker for holder in kv.index.pages()}
            assert left <= {caches.workers["b"].owner}, "the old incarnation's pages are gone"
            await caches.more(60)
            await old.stop()
        await caches.ends_exact(kv)


async def test_a_worker_that_leaves_takes_its_pages_along(caches: Caches) -> None:
    await caches.start("a")
    await caches.start("b")
    async with KvIndexes(caches.all) as kv:
        async with caches.loaded():
            await caches.more(60)
        await caches.ends_exact(kv)
        gone = caches.workers.pop("a")
        kv.workers_changed()
        assert {holder.worker for holder in kv.index.pages()} == {caches.workers["b"].owner}
        assert not kv.exact(gone.owner)
        await gone.stop()
        await caches.ends_exact(kv)


async def test_a_frontend_restarts_in_the_middle_of_load(caches: Caches) -> None:
    for name in ("a", "b"):
        await caches.start(name)
    earlier: list[KvIndexes] = []
    async with contextlib.AsyncExitStack() as stack:
        async with caches.loaded():
            for _ in range(5):
                async with KvIndexes(caches.all) as kv:
                    earlier.append(kv)
                    await caches.more(20)
            last = await stack.enter_async_context(KvIndexes(caches.all))
            await caches.more(20)
        await caches.ends_exact(last)
    assert [kv.index.pages() for kv in earlier] == [{}] * 5, "nothing goes on of what has ended"


async def test_an_index_that_is_full_knows_less_and_nothing_wrong(caches: Caches) -> None:
    await caches.start("a")
    async with KvIndexes(caches.all, max_pages=60) as kv:
        async with caches.loaded():
            await caches.more(100)
        worker = caches.workers["a"]
        await worker.run(caches.prefixes[0])  # the load may have ended with a flush

        def caught_up() -> dict[Holder, set[int]]:
            return kv.index.pages() if kv._followers[worker.owner]._pages.sequence == worker.hub.sequence else {}

        await eventually(caught_up)
        known = kv.index.pages()
        assert kv.index.evicted
        for holder, pages in known.items():
            assert pages <= worker.truth[holder]


async def test_one_instance_id_in_two_roles_is_two_caches(caches: Caches) -> None:
    worker = await caches.start("a")
    # The same caches once more, as if another process of this name were a prefill worker.
    other = dataclasses.replace(worker, role=Role.PREFILL)
    known = [worker, other]
    async with KvIndexes(lambda: known) as kv:
        await worker.run(caches.prefixes[0])
        await eventually(lambda: kv.exact(worker.owner) and kv.exact(other.owner))
        await eventually(lambda: kv.index.pages() == {**worker.truth, **other.truth})
        known.remove(other)
        kv.workers_changed()
        assert kv.index.pages() == worker.truth, "the other's pages stay"


async def test_in_a_cluster_prefill_workers_are_followed_and_found_by_tokens(cluster: FakeCluster) -> None:
    prefill, _ = await cluster.start_pair()
    workers = cluster.frontend.workers
    async with KvIndexes(workers.all) as kv:
        workers.on_change(kv.workers_changed)
        name = cache_owner(Role.PREFILL, prefill.instance_id)
        await eventually(lambda: kv.exact(name))
        assert len(kv._followers) == 1, "decode keeps no prefixes"
        prefill.engine.kv_changes.put_nowait(KvChange(0, BlockStored([-1, 2], None, list(range(32)), 16)))
        await eventually(lambda: kv.cached_tokens(range(40)) == {Holder(name, 0): 32})
        assert kv.cached_tokens(range(31)) == {Holder(name, 0): 16}
        assert kv.cached_tokens(range(40), cache_salt="x") == {}
        kv.routed(Holder(name, 0), range(64))
        assert kv.cached_tokens(range(64)) == {Holder(name, 0): 32}, "its events tell, nothing is assumed"
        prefill.host.stop()
        await eventually(lambda: not kv._followers)
        assert kv.cached_tokens(range(40)) == {}


async def test_without_events_what_was_sent_is_assumed(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    info = FakeEngine.info
    monkeypatch.setattr(FakeEngine, "info", lambda self: dataclasses.replace(info(self), has_kv_events=False))
    worker = await cluster.start_worker(Role.AGGREGATED)
    await cluster.routable(1)
    name = cache_owner(Role.AGGREGATED, worker.instance_id)
    async with KvIndexes(cluster.frontend.workers.all) as kv:
        await eventually(kv._followers[name]._task.done, what="giving up")
        kv.routed(Holder(name, 0), range(64))
        assert kv.cached_tokens(range(70)) == {Holder(name, 0): 64}
        assert not kv.exact(name)
        kv.routed(Holder("unknown", 0), range(64))
        assert set(kv.cached_tokens(range(70))) == {Holder(name, 0)}
