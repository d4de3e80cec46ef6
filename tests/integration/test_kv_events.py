"""KvEventService over a real socket: a subscriber knows what the engine holds, whenever and however often it comes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from kvbaton.client import Client, SamplingParams
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import kv_events_pb2, kv_events_pb2_grpc
from services.requests import Role
from services.worker.engines.kv_events import BlockRemoved, BlockStored, KvChange
from services.worker.kv_events import hub
from tests.support.cluster import FakeCluster
from tests.support.kv_view import KvView
from tests.support.processes import Processes, answering
from tests.support.waiting import eventually

GREEDY = SamplingParams(max_new_tokens=1, temperature=0)


async def subscribe_error(endpoint: str) -> RequestError:
    async with grpc.aio.insecure_channel(endpoint) as channel:
        call = kv_events_pb2_grpc.KvEventServiceStub(channel).Subscribe(kv_events_pb2.SubscribeRequest())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
    return RequestError.from_rpc_error(caught.value)


async def test_a_decode_worker_refuses_by_name(cluster: FakeCluster) -> None:
    _, decode = await cluster.start_pair()
    error = await subscribe_error(decode.endpoint)
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.NO_KV_EVENTS)


async def test_an_engine_that_is_not_there_yet_is_unavailable(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.PREFILL, built=False)
    assert (await subscribe_error(worker.endpoint)).code is grpc.StatusCode.UNAVAILABLE


async def test_snapshot_changes_and_resumption(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.PREFILL)
    await cluster.routable(1)
    changes = worker.engine.kv_changes
    changes.put_nowait(KvChange(0, BlockStored([-1, 2], None, list(range(32)), 16)))
    await eventually(changes.empty)
    async with KvView(worker.endpoint) as view:
        await eventually(lambda: view.exact)
        assert view.cached_tokens([*range(32), 77]) == 32
        changes.put_nowait(KvChange(0, BlockStored([3], 2, list(range(32, 48)), 16)))
        await eventually(lambda: view.cached_tokens(range(48)) == 48)
        changes.put_nowait(KvChange(0, BlockRemoved([3])))
        await eventually(lambda: view.cached_tokens(range(48)) == 32)
    changes.put_nowait(KvChange(0, BlockStored([4], 2, [5] * 16, 16)))
    await eventually(changes.empty)
    async with KvView(worker.endpoint, after=view) as resumed:
        await eventually(lambda: resumed.cached_tokens([*range(32), *[5] * 16]) == 48)
        assert resumed.opened is not None
        assert resumed.opened.resumed
        assert (resumed.snapshot_chunks, resumed.changes) == (0, 1)


async def test_a_subscriber_from_another_life_gets_a_snapshot(cluster: FakeCluster) -> None:
    first, second = await cluster.start_worker(Role.PREFILL), await cluster.start_worker(Role.PREFILL)
    await cluster.routable(2)
    async with KvView(first.endpoint) as view:
        await eventually(lambda: view.exact)
    async with KvView(second.endpoint, after=view) as other:
        await eventually(lambda: other.exact)
        assert other.opened is not None
        assert not other.opened.resumed


async def test_a_subscriber_that_does_not_read_is_cut_off(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub.KvEventHub.__init__, "__kwdefaults__", {"kept": 100, "queued": 20})
    worker = await cluster.start_worker(Role.PREFILL)
    await cluster.routable(1)
    async with grpc.aio.insecure_channel(worker.endpoint) as channel:
        call = kv_events_pb2_grpc.KvEventServiceStub(channel).Subscribe(kv_events_pb2.SubscribeRequest())
        messages = aiter(call)
        assert (await anext(messages)).HasField("opened")
        for name in range(3000):  # more than flow control lets through unread
            worker.engine.kv_changes.put_nowait(KvChange(0, BlockStored([name], None, [name] * 160, 160)))
        await eventually(worker.engine.kv_changes.empty)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _read_all(messages)
    error = RequestError.from_rpc_error(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.SLOW_SUBSCRIBER)


async def _read_all(messages: AsyncIterator[kv_events_pb2.SubscribeResponse]) -> None:
    async for _ in messages:
        pass


async def test_nonsense_from_the_engine_forgets_everything_and_goes_on(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.kv_events.feed._RETRY_SECONDS", 0.05)
    worker = await cluster.start_worker(Role.PREFILL)
    await cluster.routable(1)
    async with KvView(worker.endpoint) as view:
        await eventually(lambda: view.exact)
        worker.engine.kv_changes.put_nowait(KvChange(0, BlockStored([1], None, [1] * 16, 16)))
        await eventually(lambda: view.cached_tokens([1] * 16) == 16)
        broken = worker.engine.kv_changes
        broken.put_nowait(KvChange(0, BlockStored([2], 1, [1], 16)))
        await eventually(lambda: view.cached_tokens([1] * 16) == 0)
        await eventually(lambda: worker.engine.kv_changes is not broken)
        worker.engine.kv_changes.put_nowait(KvChange(0, BlockStored([1], None, [1] * 16, 16)))
        await eventually(lambda: view.cached_tokens([1] * 16) == 16)


async def test_subscriptions_do_not_hold_up_the_end(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.PREFILL)
    await cluster.routable(1)
    async with KvView(worker.endpoint) as view:
        await eventually(lambda: view.exact)
        worker.host.stop()
        assert view.following is not None
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(view.following, 10)
    assert RequestError.from_rpc_error(caught.value).reason is Reason.SHUTTING_DOWN


async def test_early_and_late_subscribers_agree_about_a_real_worker(etcd_endpoint: str, tmp_path: Path) -> None:
    """The simulated engine in its process: two ranks, a cache too small for all prompts, so that it evicts."""
    rng = random.Random(1)
    processes = Processes(etcd_endpoint, tmp_path)
    processes.frontend()
    processes.worker(
        "worker", "decode", "--disaggregation-mode", "null", sim="dp_size=2,max_total_tokens=1024,decode_step=0.001"
    )
    endpoint = processes.grpc_endpoints["worker"]
    try:
        async with Client(f"127.0.0.1:{processes.grpc_port}", timeout=20) as client:
            await answering(client)
            prefixes = [[rng.randrange(1000) for _ in range(64)] for _ in range(4)]

            async def load(count: int) -> None:
                for _ in range(count):
                    prompt = rng.choice(prefixes) + [rng.randrange(1000) for _ in range(rng.randint(1, 120))]
                    await client.generate(token_ids=prompt, sampling=GREEDY)

            async with KvView(endpoint) as early:
                await load(60)
                async with KvView(endpoint) as late:
                    await load(20)
                    await eventually(lambda: early.sequence == late.sequence and late.exact)
                    assert early.ranks == late.ranks
                    assert early.changes > 60, "and there were evictions among them"
                    assert late.changes < early.changes
            await load(5)
            async with KvView(endpoint, after=early) as resumed, KvView(endpoint) as fresh:
                await eventually(lambda: fresh.exact and resumed.sequence == fresh.sequence)
                assert resumed.ranks == fresh.ranks
    finally:
        await asyncio.to_thread(processes.stop)
