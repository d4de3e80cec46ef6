"""AdminService: a drain that is SIGTERM's, and an empty cache on demand."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import grpc
import pytest

from kvbaton.client import Client, SamplingParams
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import admin_pb2, admin_pb2_grpc, worker_pb2
from services.requests import Role
from tests.support.cluster import FakeCluster, HostedWorker
from tests.support.fake_engine import Behaviour, expected_tokens
from tests.support.kv_view import KvView
from tests.support.processes import Processes, answering
from tests.support.simulator import Simulator
from tests.support.waiting import eventually


async def drain(endpoint: str) -> admin_pb2.DrainResponse:
    async with grpc.aio.insecure_channel(endpoint) as channel:
        return await admin_pb2_grpc.AdminServiceStub(channel).Drain(admin_pb2.DrainRequest(), timeout=10)


async def flush(endpoint: str) -> admin_pb2.FlushCacheResponse:
    async with grpc.aio.insecure_channel(endpoint) as channel:
        return await admin_pb2_grpc.AdminServiceStub(channel).FlushCache(admin_pb2.FlushCacheRequest(), timeout=10)


async def refused_flush(worker: HostedWorker) -> RequestError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await flush(worker.endpoint)
    return RequestError.from_rpc_error(caught.value)


async def test_a_drain_returns_at_once_and_lets_requests_finish_however_often_it_is_asked(
    cluster: FakeCluster,
) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED, Behaviour(token_seconds=0.1))
    await cluster.routable(1)
    async with Client(worker.endpoint) as client:
        running = asyncio.create_task(client.generate(token_ids=[1, 2], sampling=SamplingParams(max_new_tokens=20)))
        await eventually(lambda: worker.engine.live)
        for _ in range(3):
            assert (await drain(worker.endpoint)).live_requests == 1
            assert (await client.status()).state == worker_pb2.WORKER_STATE_DRAINING
        await cluster.routable(0)
        assert not running.done()
        assert (await running).token_ids == expected_tokens([1, 2], 20)
    assert await asyncio.wait_for(worker.task, 10) == 0


async def test_a_worker_that_still_loads_has_nothing_to_drain(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED, built=False)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drain(worker.endpoint)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    worker.host.engine_built(worker.engine)
    await cluster.routable(1)


async def test_the_cache_is_flushed_only_when_nothing_runs(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED, Behaviour(token_seconds=0.05))
    await cluster.routable(1)
    async with Client(worker.endpoint) as client:
        running = asyncio.create_task(client.generate(token_ids=[1], sampling=SamplingParams(max_new_tokens=10)))
        await eventually(lambda: worker.engine.live)
        error = await refused_flush(worker)
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.REQUESTS_RUNNING)
        assert worker.engine.flushes == 0, "the engine was not even asked"
        await running
    await eventually(lambda: not worker.engine.live)
    await flush(worker.endpoint)
    assert worker.engine.flushes == 1


async def test_an_engine_that_still_lets_go_refuses_too(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED)
    await cluster.routable(1)

    async def busy() -> bool:
        return False

    monkeypatch.setattr(worker.engine, "flush_cache", busy)
    assert (await refused_flush(worker)).reason is Reason.REQUESTS_RUNNING


async def test_real_processes_flush_drain_and_say_why_they_died(etcd_endpoint: str, tmp_path: Path) -> None:
    processes = Processes(etcd_endpoint, tmp_path)
    processes.frontend()
    processes.worker("first", "decode", "--disaggregation-mode", "null", sim="decode_step=0.05")
    prompt = list(range(64))
    try:
        async with Client(f"127.0.0.1:{processes.grpc_port}", timeout=20) as client:
            await answering(client)
            endpoint = processes.grpc_endpoints["first"]
            async with KvView(endpoint) as view:
                await client.generate(token_ids=prompt, sampling=SamplingParams(max_new_tokens=1))
                await eventually(lambda: view.cached_tokens(prompt) == 64)
                await flush(endpoint)
                await eventually(lambda: view.cached_tokens(prompt) == 0)
            running = asyncio.create_task(
                client.generate(token_ids=prompt, sampling=SamplingParams(max_new_tokens=40, ignore_eos=True))
            )
            await asyncio.sleep(0.5)
            assert (await drain(endpoint)).live_requests == 1
            # What Kubernetes does: SIGTERM after the preStop hook. It is the first signal and cuts nothing short.
            processes.signal("first", signal.SIGTERM)
            assert len((await running).token_ids) == 40
            assert await asyncio.to_thread(processes.processes["first"].wait, 20) == 0

            processes.worker("second", "decode", "--disaggregation-mode", "null")
            await answering(client)
            async with Simulator(processes.system_endpoints["second"]) as second:
                await second.kill_scheduler()
            assert await asyncio.to_thread(processes.processes["second"].wait, 20) == 1
            last = processes.log("second").strip().splitlines()[-1]
            assert "the simulated scheduler was killed" in last
    finally:
        await asyncio.to_thread(processes.stop)
