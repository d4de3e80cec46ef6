"""A worker whose engine stops answering leaves service everywhere at once, and comes back when it answers again."""

from __future__ import annotations

from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvbaton.client import Client, SamplingParams
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import worker_pb2
from services.registry.etcd import EtcdClient
from services.registry.lookup import list_workers
from services.requests import Role
from tests.support.cluster import FakeCluster, HostedWorker
from tests.support.fake_engine import Behaviour, expected_tokens
from tests.support.waiting import eventually

GREEDY = SamplingParams(max_new_tokens=4, temperature=0)
QUICK: dict[str, Any] = {"canary_interval": 0.1, "engine_silence_timeout": 0.5}


@pytest.fixture(params=["streams", "session"])
def link(request: pytest.FixtureRequest) -> str:
    return request.param


async def serves(worker: HostedWorker) -> bool:
    async with grpc.aio.insecure_channel(worker.endpoint) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
    return answer.status == health_pb2.HealthCheckResponse.SERVING


async def recorded_state(cluster: FakeCluster) -> int:
    async with EtcdClient(cluster.etcd.endpoints) as client:
        (record,) = await list_workers(client, cluster.etcd.namespace)
    return record.state


@pytest.mark.peers(7)
async def test_a_failing_canary_takes_the_worker_out_and_a_passing_one_back_in(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED, **QUICK)
    await cluster.routable(1)
    worker.engine.behaviour.probe_fails = "the probe got 0 tokens and then abort out of memory"
    await cluster.routable(0)
    assert not await serves(worker)
    await eventually(lambda: _is(cluster, worker_pb2.WORKER_STATE_UNHEALTHY))
    async with Client(worker.endpoint) as client:
        status = await client.status()
        assert status.state == worker_pb2.WORKER_STATE_UNHEALTHY
        assert "out of memory" in status.detail
        assert status.load.live_requests == 0
        with pytest.raises(RequestError) as caught:
            await client.generate(token_ids=[1], sampling=GREEDY)
        assert caught.value.reason is Reason.WORKER_NOT_SERVING
        assert caught.value.retry_after is not None
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{worker.config.system_port}") as http:
        health, live = await http.get("/health"), await http.get("/live")
        assert (health.status_code, live.status_code) == (503, 200)
        assert "out of memory" in health.json()["detail"]

    worker.engine.behaviour.probe_fails = ""
    await cluster.routable(1)
    assert await serves(worker)
    await eventually(lambda: _is(cluster, worker_pb2.WORKER_STATE_SERVING))
    answer = await cluster.client.generate(token_ids=[1], sampling=GREEDY)
    assert answer.token_ids == expected_tokens([1], 4)


async def _is(cluster: FakeCluster, state: worker_pb2.WorkerState) -> bool:
    return await recorded_state(cluster) == state


async def test_canaries_are_no_traffic(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED, **QUICK)
    await cluster.routable(1)
    before = worker.engine.probes
    await eventually(lambda: worker.engine.probes > before + 3)
    assert worker.engine.seen == [], "no leg was ever generated"
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{worker.config.system_port}") as http:
        text = (await http.get("/metrics")).text
    assert 'kvbaton_worker_canaries_total{outcome="answered",role="aggregated"}' in text


async def test_the_operators_payload_is_what_is_probed(cluster: FakeCluster) -> None:
    payload = '{"token_ids": {"ids": [9, 8]}, "sampling": {"max_new_tokens": 2}}'
    worker = await cluster.start_worker(Role.AGGREGATED, Behaviour(dp_size=2), health_check_payload=payload, **QUICK)
    await cluster.routable(1)
    await eventually(lambda: worker.engine.probes >= 5)
    warm_up, canaries = worker.engine.probed[:2], worker.engine.probed[3:]
    assert [rank for rank, _ in warm_up] == [0, 1]
    assert {rank for rank, _ in canaries[:2]} == {0, 1}
    for _, probed in worker.engine.probed:
        assert probed is not None
        assert (probed.token_ids, probed.sampling.max_new_tokens) == ((9, 8), 2)


async def test_a_payload_that_the_model_cannot_take_ends_the_start(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED, health_check_payload='{"token_ids": {"ids": [999999]}}')
    assert await worker.task == 1


@pytest.mark.peers(7)
async def test_a_silent_engine_with_a_live_request_makes_the_worker_unhealthy(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED, Behaviour(hang=True), **QUICK)
    await cluster.routable(1)
    worker.engine.behaviour.probe_hangs = True
    async with Client(worker.endpoint) as client:
        with pytest.raises(RequestError):
            await client.generate(token_ids=[1], sampling=GREEDY, timeout=2.0)
        assert (await client.status()).state == worker_pb2.WORKER_STATE_UNHEALTHY
    await cluster.routable(0)


async def test_an_unhealthy_worker_still_drains(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED, **QUICK)
    await cluster.routable(1)
    worker.engine.behaviour.probe_fails = "broken"
    await cluster.routable(0)
    worker.host.stop()
    assert await worker.task == 0
