"""Several models behind one frontend: each is found by its name, and none of them holds another up."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2 as grpc_health_pb2
from grpc_health.v1 import health_pb2_grpc as grpc_health_pb2_grpc

from kvbaton.client import Answer, SamplingParams
from kvbaton.errors import Reason, RequestError
from services.requests import Role
from tests.support.cluster import FakeCluster, HostedWorker
from tests.support.fake_engine import Behaviour, expected_tokens
from tests.support.waiting import eventually

PROMPT = [5, 6, 7]
GREEDY = SamplingParams(max_new_tokens=8, temperature=0)


@pytest.fixture
def link() -> str:
    return "session"


@asynccontextmanager
async def cluster_with(etcd_endpoint: str, model_folder: Path, **frontend: object) -> AsyncGenerator[FakeCluster]:
    namespace = f"t-{uuid.uuid4().hex[:12]}"
    async with FakeCluster(
        etcd_endpoint, namespace, model_folder, link="session", heartbeat=2.0, **frontend
    ) as cluster:
        yield cluster


async def start_three(cluster: FakeCluster, marking_folder: Path, **decode: Any) -> dict[str, HostedWorker]:
    """A disaggregated model, an aggregated one with another tokenizer, and one that embeds; their last workers."""
    await cluster.start_worker(Role.PREFILL, served_model_name="pair")
    workers = {
        "pair": await cluster.start_worker(Role.DECODE, served_model_name="pair", **decode),
        "single": await cluster.start_worker(
            Role.AGGREGATED, served_model_name="single", model_folder=marking_folder, pool_tokens=100
        ),
        "vectors": await cluster.start_worker(Role.EMBEDDING, served_model_name="vectors"),
    }
    await cluster.routable(4)
    return workers


async def failure(call: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await call
    return caught.value


def http(cluster: FakeCluster) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{cluster.frontend.http_port}", timeout=20)


async def listed(cluster: FakeCluster) -> list[str]:
    """What /v1/models lists, /health answers by, grpc.health says and ListModels reports: they never disagree."""
    async with http(cluster) as client, grpc.aio.insecure_channel(f"127.0.0.1:{cluster.frontend.grpc_port}") as channel:
        names = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        health = await client.get("/health")
        stub: Any = grpc_health_pb2_grpc.HealthStub(channel)
        status = (await stub.Check(grpc_health_pb2.HealthCheckRequest())).status
    assert (health.status_code, health.json()["models"]) == (200 if names else 503, names)
    assert status == (
        grpc_health_pb2.HealthCheckResponse.SERVING if names else grpc_health_pb2.HealthCheckResponse.NOT_SERVING
    )
    return names


async def test_each_model_answers_by_its_name_with_its_own_tokenizer(
    cluster: FakeCluster, marking_folder: Path
) -> None:
    assert await listed(cluster) == []
    workers = await start_three(cluster, marking_folder)
    assert await listed(cluster) == ["pair", "single", "vectors"]
    assert [info.model.name for info in await cluster.client.list_models()] == ["pair", "single", "vectors"]
    for name in ("pair", "single"):
        answer = await cluster.client.generate(token_ids=PROMPT, sampling=GREEDY, model=name)
        assert answer.token_ids == expected_tokens(PROMPT, 8)
        assert len(workers[name].engine.seen) == 1
        await cluster.client.generate(text="abc", sampling=GREEDY, model=name)
    texts = [len(workers[name].engine.seen[-1].token_ids) for name in ("pair", "single")]
    assert texts == [3, 4], "the second tokenizer marks the beginning"
    assert len((await cluster.client.embed(["abc"], model="vectors")).vectors) == 1
    assert len(workers["vectors"].engine.embedded) == 1


async def test_a_name_is_needed_and_must_be_one_of_them(cluster: FakeCluster, marking_folder: Path) -> None:
    await start_three(cluster, marking_folder)

    async def generate(model: str) -> tuple[grpc.StatusCode, str]:
        error = await failure(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY, model=model))
        return error.code, error.field

    assert await generate("") == (grpc.StatusCode.INVALID_ARGUMENT, "model")
    assert await generate("other") == (grpc.StatusCode.NOT_FOUND, "model")
    assert await generate("vectors") == (grpc.StatusCode.FAILED_PRECONDITION, "model")
    assert len((await cluster.client.embed(["x"])).vectors) == 1, "only one embeds"
    error = await failure(cluster.client.embed(["x"], model="pair"))
    assert (error.code, error.field) == (grpc.StatusCode.FAILED_PRECONDITION, "model")
    async with http(cluster) as client:
        body = {"model": "other", "prompt": "x", "max_tokens": 1}
        assert (await client.post("/v1/completions", json=body)).status_code == 404


async def test_limits_are_each_models_own(cluster: FakeCluster, marking_folder: Path) -> None:
    await start_three(cluster, marking_folder)
    prompt = [1] * 120
    assert (await cluster.client.generate(token_ids=prompt, sampling=GREEDY, model="pair")).token_ids
    error = await failure(cluster.client.generate(token_ids=prompt, sampling=GREEDY, model="single"))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "token_ids")


async def test_a_models_full_queue_holds_no_other_model_up(
    etcd_endpoint: str, model_folder: Path, marking_folder: Path
) -> None:
    async with cluster_with(etcd_endpoint, model_folder, max_queued_requests=2) as cluster:
        workers = await start_three(cluster, marking_folder, behaviour=Behaviour(hang=True), window=1)

        def sent() -> asyncio.Task[Answer]:
            return asyncio.create_task(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY, model="pair"))

        # The first one waits in the queue, too, until its credit is there.
        stuck = [sent()]
        await eventually(lambda: workers["pair"].engine.live)
        stuck += [sent(), sent()]
        await eventually(lambda: cluster.frontend.generation.live_requests == 3)
        await asyncio.sleep(0.2)
        error = await failure(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY, model="pair"))
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUEUE_FULL)
        answers = await asyncio.gather(
            *(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY, model="single") for _ in range(2))
        )
        assert all(answer.token_ids == expected_tokens(PROMPT, 8) for answer in answers)
        async with http(cluster) as client:
            lines = (await client.get("/metrics")).text.splitlines()
        assert 'kvbaton_queued_requests{model="pair"} 2.0' in lines
        assert 'kvbaton_queued_requests{model="single"} 0.0' in lines
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)


async def test_requests_that_wait_for_a_models_workers_hold_no_other_up(
    etcd_endpoint: str, model_folder: Path, marking_folder: Path
) -> None:
    async with cluster_with(etcd_endpoint, model_folder, max_queued_requests=2, ready_queue_timeout=3.0) as cluster:
        workers = await start_three(cluster, marking_folder)
        for name in ("pair", "single"):
            workers[name].host.stop()
        await cluster.routable(2)
        waiting = [
            asyncio.create_task(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY, model=name))
            for name in ("pair", "pair", "single", "single")
        ]
        await eventually(lambda: cluster.frontend.generation.live_requests == 4)
        refused = await failure(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY, model="pair"))
        assert refused.code is grpc.StatusCode.UNAVAILABLE
        await cluster.start_worker(Role.AGGREGATED, served_model_name="single", model_folder=marking_folder)
        for answer in await asyncio.gather(*waiting[2:]):
            assert answer.token_ids == expected_tokens(PROMPT, 8)
        for task in waiting[:2]:
            assert (await failure(task)).code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("name", ["pair", "single"])
async def test_a_model_that_loses_its_last_worker_is_unavailable_and_comes_back(
    cluster: FakeCluster, marking_folder: Path, name: str
) -> None:
    workers = await start_three(cluster, marking_folder)
    gone = workers[name]
    gone.host.stop()
    assert await gone.task == 0
    others = sorted(workers.keys() - {name})
    await eventually(lambda: [info.model.name for info in cluster.frontend.generation.models()] == others)
    assert await listed(cluster) == others
    error = await failure(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY, model=name))
    assert (error.code, error.retry_after is not None) == (grpc.StatusCode.UNAVAILABLE, True)
    assert repr(name) in error.message
    async with http(cluster) as client:
        body = {"model": name, "prompt": "x", "max_tokens": 1}
        assert (await client.post("/v1/completions", json=body)).status_code == 503
    other = "single" if name == "pair" else "pair"
    assert (await cluster.client.generate(token_ids=PROMPT, sampling=GREEDY, model=other)).token_ids
    await cluster.start_worker(
        gone.config.role, served_model_name=name, model_folder=marking_folder if name == "single" else None
    )
    await cluster.routable(4)
    assert await listed(cluster) == ["pair", "single", "vectors"]
    answer = await cluster.client.generate(token_ids=PROMPT, sampling=GREEDY, model=name)
    assert answer.token_ids == expected_tokens(PROMPT, 8)


async def test_a_model_that_stays_away_is_unknown_at_last(
    cluster: FakeCluster, marking_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.frontend.router.worker_set._REMEMBERED_SECONDS", 1.0)
    workers = await start_three(cluster, marking_folder)
    workers["single"].host.stop()
    workers["vectors"].host.stop()
    await cluster.routable(2)
    assert (
        await failure(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY, model="single"))
    ).code is grpc.StatusCode.UNAVAILABLE
    assert (await failure(cluster.client.embed(["x"], model="vectors"))).code is grpc.StatusCode.UNAVAILABLE

    async def unknown() -> bool:
        generating = await failure(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY, model="single"))
        embedding = await failure(cluster.client.embed(["x"], model="vectors"))
        return {generating.code, embedding.code} == {grpc.StatusCode.NOT_FOUND}

    await eventually(unknown)
    answer = await cluster.client.generate(token_ids=PROMPT, sampling=GREEDY)
    assert answer.token_ids, "the only one left needs no name"


async def test_what_left_lately_makes_no_name_necessary(cluster: FakeCluster, marking_folder: Path) -> None:
    workers = await start_three(cluster, marking_folder)
    workers["single"].host.stop()
    await eventually(lambda: len(cluster.frontend.workers.all()) == 3)
    assert (await cluster.client.generate(token_ids=PROMPT, sampling=GREEDY)).token_ids


async def test_one_models_unroutable_workers_are_no_reason_of_anothers(
    cluster: FakeCluster, marking_folder: Path
) -> None:
    workers = await start_three(cluster, marking_folder)
    for worker in cluster.frontend.workers.all():
        worker._set_answers(False, "because of the test")
    error = await failure(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY, model="single"))
    told = [worker.instance_id for worker in cluster.frontend.workers.all() if worker.instance_id in error.message]
    assert len(told) == 1
    assert str(workers["single"].config.port) in told[0]


async def test_a_draining_frontend_lists_nothing_however_many_models_it_has(
    cluster: FakeCluster, marking_folder: Path
) -> None:
    workers = await start_three(cluster, marking_folder)
    workers["single"].engine.behaviour.token_seconds = 0.1
    running = asyncio.create_task(
        cluster.client.generate(
            token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=20, temperature=0), model="single"
        )
    )
    await eventually(lambda: workers["single"].engine.live)
    draining = asyncio.create_task(cluster.frontend.drain())
    await eventually(lambda: cluster.frontend.generation.draining)
    await asyncio.sleep(0.1)
    assert await listed(cluster) == []
    assert (await running).token_ids
    await draining


async def test_health_follows_the_last_model(cluster: FakeCluster) -> None:
    assert await listed(cluster) == []
    prefill = await cluster.start_worker(Role.PREFILL, served_model_name="pair")
    await cluster.routable(1)
    assert await listed(cluster) == [], "half a pair serves nothing"
    vectors = await cluster.start_worker(Role.EMBEDDING, served_model_name="vectors")
    await cluster.routable(2)
    assert await listed(cluster) == ["vectors"]
    vectors.host.stop()
    await cluster.routable(1)
    await asyncio.sleep(0.05)
    assert await listed(cluster) == []
    prefill.host.stop()
