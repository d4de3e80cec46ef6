"""Requests go where their policy sends them, over real sockets: to the prefix, to the idle, to whom they name."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import generate_pb2, generate_pb2_grpc
from services.config.common import RoutingFlags
from services.frontend.server import Frontend
from services.requests import Role, Sampling
from services.worker.engines.simulated import SimulatedOptions
from services.worker.engines.simulated.oracle import expected_tokens
from tests.support.cluster import FakeCluster, HostedWorker
from tests.support.waiting import eventually

KV_AWARE = RoutingFlags(prefill_policy="kv-aware", decode_policy="kv-aware")
GUESSING = RoutingFlags(prefill_policy="kv-aware", decode_policy="kv-aware", kv_aware_events=False)
LEAST_LOADED = RoutingFlags(prefill_policy="least-loaded", decode_policy="least-loaded")
PREFIX_TOKENS, PAGE = 320, 16


def prefix(number: int) -> list[int]:
    return [1000 + number, *range(100, 100 + PREFIX_TOKENS - 1)]


def request(
    token_ids: list[int], tokens: int = 4, *, prefill_worker: str = "", decode_worker: str = ""
) -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=token_ids),
        sampling=generate_pb2.SamplingParams(max_new_tokens=tokens, temperature=0),
        prefill_worker=prefill_worker,
        decode_worker=decode_worker,
    )


async def answered(frontend: Frontend, wanted: generate_pb2.GenerateRequest) -> generate_pb2.Finished:
    """How it ended, once the answer has been seen to be right. Raises RequestError."""
    tokens: list[int] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{frontend.grpc_port}") as channel:
        try:
            async for response in generate_pb2_grpc.GenerateServiceStub(channel).Generate(wanted, timeout=30):
                tokens += response.token_ids
                if response.HasField("finished"):
                    sampling = Sampling(max_new_tokens=wanted.sampling.max_new_tokens, temperature=0.0)
                    assert tokens == expected_tokens(list(wanted.token_ids.ids), sampling)
                    return response.finished
        except grpc.aio.AioRpcError as error:
            raise RequestError.from_rpc_error(error) from error
    raise AssertionError("no end")


class Clusters:
    """Clusters of simulated engines, closed with the test."""

    def __init__(self, etcd_endpoint: str, model_folder: Path) -> None:
        self._arguments = (etcd_endpoint, f"t-{time.time_ns()}", model_folder)
        self._open: list[FakeCluster] = []

    async def start(self, flags: RoutingFlags, *, link: str = "session", heartbeat: float = 2.0) -> FakeCluster:
        """A frontend, with those of earlier calls in one namespace."""
        cluster = FakeCluster(*self._arguments, link=link, heartbeat=heartbeat, routing=flags)
        self._open.append(cluster)
        return await cluster.__aenter__()

    async def close(self) -> None:
        for cluster in reversed(self._open):
            await cluster.__aexit__(None, None, None)


@pytest_asyncio.fixture
async def clusters(etcd_endpoint: str, model_folder: Path) -> AsyncIterator[Clusters]:
    clusters = Clusters(etcd_endpoint, model_folder)
    yield clusters
    await clusters.close()


async def workers(cluster: FakeCluster, *roles: Role, dp_size: int = 1, **options: float) -> list[HostedWorker]:
    """One for each role, routable."""
    simulated = SimulatedOptions(dp_size=dp_size, page_size=PAGE, **options)  # type: ignore[arg-type]
    started = [await cluster.start_worker(role, simulated=simulated) for role in roles]
    await cluster.routable(len(roles), within=20.0)
    return started


async def index_is_exact(cluster: FakeCluster) -> None:
    kv = cluster.frontend.kv
    assert kv is not None
    caches = [rank.cache.worker for worker in cluster.frontend.workers.all() for rank in worker.ranks if rank.cache]
    await eventually(lambda: all(map(kv.exact, caches)), what="an exact index")


async def where_prefixes_are_known(cluster: FakeCluster, count: int) -> None:
    kv = cluster.frontend.kv
    assert kv is not None
    await eventually(lambda: all(kv.cached_tokens(prefix(n)) for n in range(count)), what="the events of the prefixes")


@pytest.mark.parametrize("roles", [(Role.PREFILL, Role.PREFILL, Role.DECODE), (Role.AGGREGATED, Role.AGGREGATED)])
async def test_a_repeated_prefix_goes_to_the_worker_that_holds_it(clusters: Clusters, roles: tuple[Role, ...]) -> None:
    cluster = await clusters.start(KV_AWARE)
    await workers(cluster, *roles)
    await index_is_exact(cluster)
    frontend = cluster.frontend

    def holder(finished: generate_pb2.Finished) -> str:
        return finished.prefill_worker or finished.decode_worker

    first = [holder(await answered(frontend, request([*prefix(n), 1]))) for n in range(6)]
    await where_prefixes_are_known(cluster, 6)
    for again in range(2):
        for n in range(6):
            finished = await answered(frontend, request([*prefix(n), 2, again]))
            assert holder(finished) == first[n]
            assert finished.usage.cached_prompt_tokens == PREFIX_TOKENS


async def test_a_second_frontend_knows_what_the_first_has_sent(clusters: Clusters) -> None:
    first, second = await clusters.start(KV_AWARE), await clusters.start(KV_AWARE)
    await workers(first, Role.PREFILL, Role.PREFILL, Role.DECODE)
    await second.routable(3)
    await index_is_exact(second)
    sent = {n: (await answered(first.frontend, request([*prefix(n), 1]))).prefill_worker for n in range(4)}
    await where_prefixes_are_known(second, 4)
    for n, worker in sent.items():
        assert (await answered(second.frontend, request([*prefix(n), 2]))).prefill_worker == worker


async def test_without_events_it_is_guessed_from_what_was_sent(clusters: Clusters) -> None:
    cluster = await clusters.start(GUESSING)
    await workers(cluster, Role.PREFILL, Role.PREFILL, Role.DECODE)
    for n in range(4):
        sent = (await answered(cluster.frontend, request([*prefix(n), 1]))).prefill_worker
        finished = await answered(cluster.frontend, request([*prefix(n), 2]))
        assert finished.prefill_worker == sent
        assert finished.usage.cached_prompt_tokens == PREFIX_TOKENS


async def test_the_rank_that_holds_the_prefix_gets_the_request(clusters: Clusters) -> None:
    """A room that doesn't match its rank is refused by the engine: answers prove that rooms and ranks agree."""
    cluster = await clusters.start(KV_AWARE)
    prefill, _ = await workers(cluster, Role.PREFILL, Role.DECODE, dp_size=3)
    await index_is_exact(cluster)
    for n in range(5):
        before = prefill.rank_requests()
        await answered(cluster.frontend, request([*prefix(n), 1]))
        (rank,) = [r for r, (a, b) in enumerate(zip(before, prefill.rank_requests(), strict=True)) if b > a]
        await where_prefixes_are_known(cluster, n + 1)
        finished = await answered(cluster.frontend, request([*prefix(n), 2]))
        assert finished.usage.cached_prompt_tokens == PREFIX_TOKENS
        assert prefill.rank_requests()[rank] == before[rank] + 2


@pytest.mark.parametrize("link", ["streams", "session"])
async def test_a_burst_spreads_over_workers_and_ranks(clusters: Clusters, link: str) -> None:
    cluster = await clusters.start(LEAST_LOADED, link=link)
    prefill, decode = [Role.PREFILL] * 2, [Role.DECODE] * 2
    started = await workers(cluster, *prefill, *decode, dp_size=2, prefill_token=1e-4, decode_step=0.005)
    before = [worker.rank_requests() for worker in started]
    async with asyncio.TaskGroup() as burst:
        for n in range(32):
            burst.create_task(answered(cluster.frontend, request([*prefix(n), 1], 20)))
    for worker, had in zip(started, before, strict=True):
        had_since = [now - then for then, now in zip(had, worker.rank_requests(), strict=True)]
        assert all(7 <= count <= 9 for count in had_since), f"{worker.instance_id}: {had_since}"
    loads = [rank.load for worker in cluster.frontend.workers.all() for rank in worker.ranks]
    await eventually(lambda: not any((each.tokens, each.requests) != (0, 0) for each in loads), what="no load is left")


async def test_frontends_hear_of_each_others_load(clusters: Clusters) -> None:
    """The worker that one frontend keeps busy gets nothing from the other, a heartbeat later at most."""
    first, second = await clusters.start(LEAST_LOADED), await clusters.start(LEAST_LOADED, heartbeat=1.0)
    busy = (await workers(first, Role.PREFILL, Role.PREFILL, Role.DECODE, prefill_token=0.0015))[0].instance_id
    await second.routable(3)
    long = request([*prefix(0), *range(2000, 3500)], prefill_worker=busy)
    running = asyncio.create_task(answered(first.frontend, long))
    (seen,) = [worker for worker in second.frontend.workers.all() if worker.instance_id == busy]
    await eventually(lambda: seen.load.ranks[0].prefill_tokens == len(long.token_ids.ids), what="a report")
    finished = await asyncio.gather(*(answered(second.frontend, request([n, 1, 2])) for n in range(6)))
    assert {each.prefill_worker for each in finished}.isdisjoint({busy})
    await running
    await eventually(lambda: not seen.load.ranks[0].tokens, what="the end in a report")


async def test_status_shows_the_load_that_the_frontend_goes_by(clusters: Clusters) -> None:
    cluster = await clusters.start(LEAST_LOADED)
    (worker,) = await workers(cluster, Role.AGGREGATED, prefill_token=0.001)
    running = asyncio.create_task(answered(cluster.frontend, request([*prefix(0), *range(2000, 2500)])))

    async def shown() -> int:
        (known,) = (await cluster.client.status()).workers
        return known.ranks[0].prefill_tokens

    async def idle() -> bool:
        return not await shown()

    await eventually(lambda: worker.simulator is not None and bool(worker.simulator.scheduler.live))
    assert await shown() == PREFIX_TOKENS + 500
    await running
    await eventually(idle, what="nothing to compute")


async def test_named_workers_are_taken_whatever_the_policy(clusters: Clusters) -> None:
    cluster = await clusters.start(KV_AWARE)
    started = await workers(cluster, Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)
    prefills, decodes = started[:2], started[2:]
    for prefill in prefills:
        for decode in decodes:
            named = request([*prefix(0), 1], prefill_worker=prefill.instance_id, decode_worker=decode.instance_id)
            finished = await answered(cluster.frontend, named)
            assert (finished.prefill_worker, finished.decode_worker) == (prefill.instance_id, decode.instance_id)


async def test_names_that_can_not_be_had_are_refused_by_field(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    aggregated = await cluster.start_worker(Role.AGGREGATED)
    await cluster.routable(3)
    not_found, invalid = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT
    cases = [
        (request([1], prefill_worker="nobody"), "prefill_worker", not_found, Reason.WORKER_NOT_FOUND),
        (request([1], prefill_worker=decode.instance_id), "prefill_worker", not_found, Reason.WORKER_NOT_FOUND),
        (request([1], decode_worker=prefill.instance_id), "decode_worker", not_found, Reason.WORKER_NOT_FOUND),
        (
            request([1], prefill_worker=prefill.instance_id, decode_worker=aggregated.instance_id),
            "prefill_worker",
            invalid,
            Reason.INVALID_FIELD,
        ),
    ]
    for wanted, field, code, reason in cases:
        with pytest.raises(RequestError) as caught:
            await answered(cluster.frontend, wanted)
        assert (caught.value.field, caught.value.code, caught.value.reason) == (field, code, reason)


async def test_a_named_worker_that_is_not_routable_is_unavailable_by_name(clusters: Clusters) -> None:
    cluster = await clusters.start(KV_AWARE)
    named, _ = await workers(cluster, Role.AGGREGATED, Role.AGGREGATED, decode_step=0.02)
    running = asyncio.create_task(answered(cluster.frontend, request([1], 1000, decode_worker=named.instance_id)))
    await eventually(lambda: named.simulator is not None and bool(named.simulator.scheduler.live))
    named.host.stop()
    await cluster.routable(1)
    with pytest.raises(RequestError) as caught:
        await answered(cluster.frontend, request([1, 2], decode_worker=named.instance_id))
    assert (caught.value.field, caught.value.code) == ("decode_worker", grpc.StatusCode.UNAVAILABLE)
    assert "draining" in caught.value.message
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_under_direct_a_request_without_a_name_is_refused(clusters: Clusters) -> None:
    cluster = await clusters.start(RoutingFlags(prefill_policy="direct"))
    prefill, _ = await workers(cluster, Role.PREFILL, Role.DECODE)
    with pytest.raises(RequestError) as caught:
        await answered(cluster.frontend, request([1, 2]))
    assert (caught.value.field, caught.value.code) == ("prefill_worker", grpc.StatusCode.INVALID_ARGUMENT)
    finished = await answered(cluster.frontend, request([1, 2], prefill_worker=prefill.instance_id))
    assert finished.prefill_worker == prefill.instance_id


@pytest.mark.parametrize("roles", [(Role.PREFILL, Role.DECODE), (Role.AGGREGATED,)])
async def test_a_probe_needs_no_names_under_direct(clusters: Clusters, roles: tuple[Role, ...]) -> None:
    cluster = await clusters.start(RoutingFlags(prefill_policy="direct", decode_policy="direct"))
    await workers(cluster, *roles)
    assert await cluster.client.probe() > 0


@pytest.mark.parametrize("field", ["prefill_worker", "decode_worker"])
async def test_a_worker_refuses_names_of_workers(cluster: FakeCluster, field: str) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED)
    await cluster.routable(1)
    named = request([1])
    setattr(named, field, worker.instance_id)
    async with grpc.aio.insecure_channel(worker.endpoint) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in generate_pb2_grpc.GenerateServiceStub(channel).Generate(named):
                pass
    assert RequestError.from_rpc_error(caught.value).field == field


async def test_random_and_round_robin_use_everybody(clusters: Clusters) -> None:
    cluster = await clusters.start(RoutingFlags(prefill_policy="round-robin", decode_policy="random"))
    await workers(cluster, Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)
    counts: Counter[str] = Counter()
    for n in range(12):
        finished = await answered(cluster.frontend, request([n, 1, 2]))
        counts.update((finished.prefill_worker, finished.decode_worker))
    assert len(counts) == 4
