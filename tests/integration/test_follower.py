"""A node behind the first of a multi-node engine: seen and measured, never asked."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import Metric

from kvbaton.client import Client, SamplingParams
from kvbaton.errors import RequestError
from kvbaton.v1 import worker_pb2
from services.config.common import EtcdFlags
from services.config.worker import WorkerConfig
from services.registry.etcd import EtcdClient
from services.registry.lookup import list_workers
from services.requests import Role
from services.worker.follower import FollowerHost
from tests.support.fake_engine import FakeEngine, Rooms
from tests.support.ports import free_port
from tests.support.waiting import eventually


@dataclass
class Follower:
    """A running follower."""

    host: FollowerHost
    engine: FakeEngine
    config: WorkerConfig
    task: asyncio.Task[int]

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.config.port}"

    async def get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.config.system_port}") as http:
            return await http.get(path)

    async def healthy(self) -> bool:
        async with grpc.aio.insecure_channel(self.endpoint) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
        return answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest_asyncio.fixture
async def follower(etcd_endpoint: str) -> AsyncIterator[Follower]:
    config = WorkerConfig(
        role=Role.PREFILL,
        port=free_port(),
        system_port=free_port(),
        etcd=EtcdFlags(etcd_endpoints=etcd_endpoint, namespace=f"t-{uuid.uuid4().hex[:12]}"),
    )
    host, engine, listening = FollowerHost(config), FakeEngine(Role.PREFILL, Rooms()), asyncio.Event()
    follower = Follower(host, engine, config, asyncio.create_task(host.run(listening.set)))
    await eventually(listening.is_set)
    yield follower
    host.stop()
    await asyncio.gather(follower.task, return_exceptions=True)


async def test_it_publishes_metrics_and_serves_no_requests(follower: Follower) -> None:
    assert not await follower.healthy()
    assert (await follower.get("/health")).status_code == 503
    family = Metric("sglang:tokens", "of a scheduler", "gauge")
    family.add_sample("sglang:tokens", {"tp_rank": "8"}, 5)
    follower.engine.metrics = [family]
    follower.host.engine_built(follower.engine)
    await eventually(follower.healthy)
    assert (await follower.get("/health")).status_code == 200
    page = (await follower.get("/metrics")).text
    assert 'sglang:tokens{tp_rank="8"} 5.0' in page
    assert "kvbaton_worker_state" in page
    async with Client(follower.endpoint) as client:
        assert (await client.status()).state == worker_pb2.WORKER_STATE_SERVING
        with pytest.raises(RequestError) as caught:
            await client.generate(token_ids=[1], sampling=SamplingParams(max_new_tokens=1))
        assert caught.value.code is grpc.StatusCode.UNIMPLEMENTED
    async with EtcdClient(follower.config.etcd.endpoints) as client:
        assert list(await list_workers(client, follower.config.etcd.namespace)) == []
    follower.host.stop()
    assert await asyncio.wait_for(follower.task, 10) == 0


async def test_a_dead_scheduler_ends_it_with_the_cause(follower: Follower) -> None:
    follower.host.engine_built(follower.engine)
    await eventually(follower.healthy)
    follower.engine.die("SGLang's process 7 ended")
    assert await asyncio.wait_for(follower.task, 10) == 1
    assert follower.host.cause == "SGLang's process 7 ended"


async def test_a_failed_launch_ends_it_with_the_cause(follower: Follower) -> None:
    follower.host.engine_failed(RuntimeError("no route to node 0"))
    assert await asyncio.wait_for(follower.task, 10) == 1
    assert "no route to node 0" in follower.host.cause
