"""No request reaches an engine that has no slot for it, and none reaches a pair that has not proven itself."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from kvbaton.client import Client, SamplingParams
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import generate_pb2, generate_pb2_grpc
from services.requests import Role, Sampling
from services.worker.engines.simulated.oracle import expected_tokens as simulated_tokens
from tests.support.cluster import FakeCluster
from tests.support.fake_engine import Behaviour, expected_tokens
from tests.support.processes import Processes, answering
from tests.support.simulator import Simulator
from tests.support.waiting import eventually

PROMPT = [5, 6, 7]
GREEDY = SamplingParams(max_new_tokens=8, temperature=0)
FRONTENDS = ("frontend", "second", "third", "fourth")
WINDOW = 4


@pytest_asyncio.fixture
async def processes(etcd_endpoint: str, tmp_path: Path) -> AsyncIterator[Processes]:
    processes = Processes(etcd_endpoint, tmp_path)
    try:
        yield processes
    finally:
        await asyncio.to_thread(processes.stop)


@pytest.mark.peers(4)
async def test_a_burst_of_32_through_four_frontends_on_a_window_of_four(processes: Processes) -> None:
    for name in FRONTENDS:
        processes.frontend("--link", "session", name=name)
    processes.worker("prefill", "prefill")
    processes.worker("decode", "decode", "--window", str(WINDOW), sim="decode_step=0.005,max_running_requests=64")
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(Client(f"127.0.0.1:{processes.grpc_ports[name]}", timeout=60))
            for name in FRONTENDS
        ]
        await asyncio.gather(*(answering(client) for client in clients))
        prompts = [[*range(100, 160), number] for number in range(32)]
        sampling = SamplingParams(max_new_tokens=40, temperature=0)
        answers = await asyncio.gather(
            *(clients[i % 4].generate(token_ids=prompt, sampling=sampling) for i, prompt in enumerate(prompts))
        )
        oracle = Sampling(max_new_tokens=40, temperature=0.0)
        assert [a.token_ids for a in answers] == [simulated_tokens(prompt, oracle) for prompt in prompts]
        async with Simulator(processes.system_endpoints["decode"]) as decode:
            (rank,) = (await decode.state())["ranks"]
        assert 2 <= rank["most_holding"] <= WINDOW, "the engine alone would have run 64"
        # Nothing is left promised to anyone: one frontend alone gets the whole window.
        burst = await asyncio.gather(
            *(clients[0].generate(token_ids=prompt, sampling=sampling) for prompt in prompts[:WINDOW])
        )
        assert len(burst) == WINDOW


async def test_a_frontend_that_is_killed_gives_its_slots_back(processes: Processes) -> None:
    for name in FRONTENDS[:2]:
        processes.frontend("--link", "session", name=name)
    processes.worker("prefill", "prefill")
    processes.worker("decode", "decode", "--window", "2", sim="decode_step=0.05")
    async with (
        Client(f"127.0.0.1:{processes.grpc_ports['frontend']}", timeout=60) as first,
        Client(f"127.0.0.1:{processes.grpc_ports['second']}", timeout=60) as second,
    ):
        await asyncio.gather(answering(first), answering(second))
        long = SamplingParams(max_new_tokens=1000, temperature=0)
        doomed = [asyncio.create_task(first.generate(token_ids=[n, 9], sampling=long)) for n in range(4)]
        await asyncio.sleep(0.5)
        processes.processes["frontend"].kill()
        answer = await asyncio.wait_for(second.generate(token_ids=PROMPT, sampling=GREEDY), 15)
        assert len(answer.token_ids) == 8
        ended = await asyncio.gather(*doomed, return_exceptions=True)
        assert all(isinstance(error, RequestError) for error in ended)


@pytest.fixture
def link() -> str:
    return "session"


def hanging(priority: int = 0) -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=PROMPT),
        sampling=generate_pb2.SamplingParams(max_new_tokens=8, temperature=0),
        priority=priority,
    )


@pytest_asyncio.fixture
async def small(etcd_endpoint: str, model_folder: Path) -> AsyncIterator[FakeCluster]:
    """A queue of two in front of a window of one."""
    async with FakeCluster(
        etcd_endpoint, f"t-{time.time_ns()}", model_folder, link="session", heartbeat=2.0, max_queued_requests=2
    ) as cluster:
        yield cluster


async def test_a_full_queue_refuses_at_once_with_retry_info(small: FakeCluster) -> None:
    await small.start_worker(Role.PREFILL)
    decode = await small.start_worker(Role.DECODE, Behaviour(hang=True), window=1)
    await small.routable(2)
    running = [asyncio.create_task(small.client.generate(token_ids=PROMPT, sampling=GREEDY))]
    await eventually(lambda: len(decode.engine.live) == 1)
    running += [asyncio.create_task(small.client.generate(token_ids=PROMPT, sampling=GREEDY)) for _ in range(2)]
    await asyncio.sleep(0.2)
    began = time.monotonic()
    with pytest.raises(RequestError) as caught:
        await small.client.generate(token_ids=PROMPT, sampling=GREEDY)
    assert time.monotonic() - began < 1.0
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUEUE_FULL)
    assert caught.value.retry_after is not None
    assert len(decode.engine.live) == 1, "never more than the window"
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await eventually(lambda: not decode.engine.live)


async def test_more_full_workers_than_are_asked_at_once_serve_two_frontends(
    etcd_endpoint: str, model_folder: Path
) -> None:
    """A dozen workers of one slot each; every frontend asks eight of them and hears of the others."""
    namespace, workers, requests = f"t-{time.time_ns()}", 12, 120
    async with (
        FakeCluster(etcd_endpoint, namespace, model_folder, link="session", heartbeat=2.0) as cluster,
        FakeCluster(etcd_endpoint, namespace, model_folder, link="session", heartbeat=2.0) as other,
    ):
        slow = Behaviour(token_seconds=0.01)
        await asyncio.gather(*(cluster.start_worker(Role.AGGREGATED, slow, window=1) for _ in range(workers)))
        await asyncio.gather(cluster.routable(workers), other.routable(workers))
        clients = [each.client for each in (cluster, other)]
        prompts = [[*PROMPT, number] for number in range(requests)]
        running = [
            asyncio.create_task(clients[number % 2].generate(token_ids=prompt, sampling=GREEDY))
            for number, prompt in enumerate(prompts)
        ]
        busiest = 0
        while not all(task.done() for task in running):
            busiest = max(busiest, *(len(worker.engine.live) for worker in cluster.workers))
            await asyncio.sleep(0.005)
        answers = await asyncio.gather(*running)
        assert [answer.token_ids for answer in answers] == [expected_tokens(prompt, 8) for prompt in prompts]
        assert busiest == 1, "never more than the window"
        served = [len(worker.engine.seen) for worker in cluster.workers]
        assert min(served) > requests / workers / 3, "no worker idles while requests wait"


async def test_the_more_urgent_request_goes_first(small: FakeCluster) -> None:
    await small.start_worker(Role.PREFILL)
    decode = await small.start_worker(Role.DECODE, Behaviour(hang=True), window=1)
    await small.routable(2)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{small.frontend.grpc_port}") as channel:
        stub = generate_pb2_grpc.GenerateServiceStub(channel)
        order: list[int] = []

        async def one(priority: int) -> None:
            order.extend(
                [priority async for response in stub.Generate(hanging(priority)) if response.HasField("finished")]
            )

        first = asyncio.create_task(small.client.generate(token_ids=PROMPT, sampling=GREEDY, request_id="first"))
        await eventually(lambda: len(decode.engine.live) == 1)
        waiting = [asyncio.create_task(one(0))]
        await asyncio.sleep(0.1)
        waiting.append(asyncio.create_task(one(7)))
        await asyncio.sleep(0.1)
        decode.engine.behaviour.hang = False
        await small.client.abort("first")
        await asyncio.gather(*waiting)
        with pytest.raises(RequestError):
            await first
    assert order == [7, 0]


async def test_a_request_that_waits_too_long_says_so(etcd_endpoint: str, model_folder: Path) -> None:
    async with FakeCluster(
        etcd_endpoint, f"t-{time.time_ns()}", model_folder, link="session", heartbeat=2.0, queue_timeout=0.5
    ) as cluster:
        prefill = await cluster.start_worker(Role.PREFILL)
        decode = await cluster.start_worker(Role.DECODE, Behaviour(hang=True), window=1)
        await cluster.routable(2)
        running = asyncio.create_task(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY))
        await eventually(lambda: len(decode.engine.live) == 1)
        with pytest.raises(RequestError) as caught:
            await cluster.client.generate(token_ids=PROMPT, sampling=GREEDY)
        assert (caught.value.code, caught.value.reason) == (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            Reason.DEADLINE_QUEUE,
        )
        assert len(prefill.engine.seen) == 1, "no prefill is spent on a request that decode can't take"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.peers(6)
async def test_cancelling_a_request_that_waits_costs_no_engine_anything(cluster: FakeCluster) -> None:
    prefill = await cluster.start_worker(Role.PREFILL)
    decode = await cluster.start_worker(Role.DECODE, Behaviour(hang=True), window=1)
    await cluster.routable(2)
    running = asyncio.create_task(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY, request_id="a"))
    await eventually(lambda: len(decode.engine.live) == 1)
    waiting = asyncio.create_task(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY, request_id="b"))
    await asyncio.sleep(0.2)
    assert await cluster.client.abort("b")
    with pytest.raises(RequestError) as caught:
        await waiting
    assert caught.value.code is grpc.StatusCode.CANCELLED
    decode.engine.behaviour.hang = False
    await cluster.client.abort("a")
    await asyncio.gather(running, return_exceptions=True)
    answer = await cluster.client.generate(token_ids=PROMPT, sampling=GREEDY)
    assert answer.token_ids == expected_tokens(PROMPT, 8)
    assert len(prefill.engine.seen) == 2


@pytest_asyncio.fixture(params=["streams", "session"])
async def checking(
    etcd_endpoint: str, model_folder: Path, request: pytest.FixtureRequest
) -> AsyncIterator[FakeCluster]:
    """A frontend that lets pairs prove themselves."""
    async with FakeCluster(
        etcd_endpoint, f"t-{time.time_ns()}", model_folder, link=request.param, heartbeat=2.0, check_pairs=True
    ) as cluster:
        yield cluster


async def test_a_pair_proves_itself_once_with_one_page(checking: FakeCluster) -> None:
    prefill, decode = await checking.start_pair()
    answers = await asyncio.gather(*(checking.client.generate(token_ids=PROMPT, sampling=GREEDY) for _ in range(6)))
    assert all(answer.token_ids == expected_tokens(PROMPT, 8) for answer in answers)
    for engine in (prefill.engine, decode.engine):
        pages = [request for request in engine.seen if len(request.token_ids) == 16]
        assert len(pages) == 1
        assert engine.seen.index(pages[0]) == 0, "before every request"
        assert len(engine.seen) == 7


async def test_a_replaced_worker_proves_itself_again(checking: FakeCluster) -> None:
    await checking.start_pair()
    await checking.client.generate(token_ids=PROMPT, sampling=GREEDY)
    old = checking.workers[0]
    old.host.stop()
    await old.task
    await checking.routable(1)
    prefill = await checking.start_worker(Role.PREFILL)
    await checking.routable(2)
    await checking.client.generate(token_ids=PROMPT, sampling=GREEDY)
    assert [len(request.token_ids) for request in prefill.engine.seen] == [16, 3]


async def test_a_pair_that_can_not_hand_over_costs_no_request_anything(checking: FakeCluster) -> None:
    bad = await checking.start_worker(Role.PREFILL, Behaviour(abort_message="no route to decode"))
    good = await checking.start_worker(Role.PREFILL)
    await checking.start_worker(Role.DECODE)
    await checking.routable(3)
    for _ in range(6):
        answer = await checking.client.generate(token_ids=PROMPT, sampling=GREEDY)
        assert answer.token_ids == expected_tokens(PROMPT, 8)
    assert all(len(request.token_ids) == 16 for request in bad.engine.seen), "only pages were tried on it"
    assert len(good.engine.seen) == 7


async def test_requests_wait_until_their_only_pair_has_recovered(checking: FakeCluster) -> None:
    prefill, _ = await checking.start_pair()
    prefill.engine.behaviour.abort_message = "not yet"
    running = asyncio.create_task(checking.client.generate(token_ids=PROMPT, sampling=GREEDY))
    await eventually(lambda: prefill.engine.seen)
    await asyncio.sleep(0.2)
    assert not running.done()
    prefill.engine.behaviour.abort_message = ""
    assert (await asyncio.wait_for(running, 10)).token_ids == expected_tokens(PROMPT, 8)


async def test_a_worker_refuses_a_priority_by_name(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED)
    await cluster.routable(1)
    async with grpc.aio.insecure_channel(worker.endpoint) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in generate_pb2_grpc.GenerateServiceStub(channel).Generate(hanging(3)):
                pass
    assert RequestError.from_rpc_error(caught.value).field == "priority"


async def test_requests_wait_for_workers_that_are_about_to_come(etcd_endpoint: str, model_folder: Path) -> None:
    async with FakeCluster(
        etcd_endpoint, f"t-{time.time_ns()}", model_folder, heartbeat=2.0, ready_queue_timeout=20.0
    ) as cluster:
        early = [asyncio.create_task(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY)) for _ in range(3)]
        aborted = asyncio.create_task(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY, request_id="gone"))
        await asyncio.sleep(0.3)
        assert await cluster.client.abort("gone")
        with pytest.raises(RequestError) as caught:
            await aborted
        assert caught.value.code is grpc.StatusCode.CANCELLED
        await cluster.start_worker(Role.AGGREGATED)
        for answer in await asyncio.gather(*early):
            assert answer.token_ids == expected_tokens(PROMPT, 8)


async def test_requests_do_not_wait_longer_than_promised_for_workers(etcd_endpoint: str, model_folder: Path) -> None:
    async with FakeCluster(
        etcd_endpoint, f"t-{time.time_ns()}", model_folder, heartbeat=2.0, ready_queue_timeout=0.5
    ) as cluster:
        began = time.monotonic()
        with pytest.raises(RequestError) as caught:
            await cluster.client.generate(token_ids=PROMPT, sampling=GREEDY)
        assert 0.4 < time.monotonic() - began < 3
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.NO_WORKER)
        assert caught.value.retry_after is not None
