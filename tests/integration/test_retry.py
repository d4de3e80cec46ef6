"""Before the first token a failed attempt is repeated elsewhere. tests/integration/test_migration.py: behind it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from kvbaton.client import Answer, SamplingParams
from kvbaton.errors import Reason, RequestError
from services.requests import Role
from tests.support.cluster import FakeCluster, HostedWorker
from tests.support.fake_engine import Behaviour, expected_tokens
from tests.support.waiting import eventually

PROMPT = [5, 6, 7]
GREEDY = SamplingParams(max_new_tokens=8, temperature=0)


@pytest.fixture(params=["streams", "session"])
def link(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def two_and_two(
    cluster: FakeCluster, failing: Role, behaviour: Behaviour
) -> tuple[HostedWorker, list[HostedWorker]]:
    """Two pairs, one of whose workers misbehaves; it and the three others."""
    bad = await cluster.start_worker(failing, behaviour)
    roles = [Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE]
    roles.remove(failing)
    good = [await cluster.start_worker(role) for role in roles]
    await cluster.routable(4)
    return bad, good


@pytest.mark.parametrize("failing", [Role.PREFILL, Role.DECODE])
async def test_a_failing_worker_costs_no_request_while_another_pair_is_there(
    cluster: FakeCluster, failing: Role
) -> None:
    bad, _ = await two_and_two(cluster, failing, Behaviour(abort_message="transfer failed"))
    answers = [await cluster.client.generate(token_ids=PROMPT, sampling=GREEDY) for _ in range(8)]
    assert all(answer.token_ids == expected_tokens(PROMPT, 8) for answer in answers)
    assert bad.engine.seen, "the failing worker was really tried"


@pytest.mark.parametrize(("failing", "only"), [(Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)])
async def test_the_only_peer_of_a_failing_worker_is_not_given_up(
    cluster: FakeCluster, failing: Role, only: Role
) -> None:
    """A hand-over that failed may be either one's fault; where one role has a single worker, the other one is tried."""
    bad = await cluster.start_worker(failing, Behaviour(abort_message="transfer failed"))
    await cluster.start_worker(failing)
    await cluster.start_worker(only)
    await cluster.routable(3)
    answers = [await cluster.client.generate(token_ids=PROMPT, sampling=GREEDY) for _ in range(4)]
    assert all(answer.token_ids == expected_tokens(PROMPT, 8) for answer in answers)
    assert bad.engine.seen, "the failing worker was really tried"


async def test_every_attempt_has_its_own_room_and_ids(cluster: FakeCluster) -> None:
    _, good = await two_and_two(cluster, Role.PREFILL, Behaviour(abort_message="transfer failed"))
    for _ in range(4):
        await cluster.client.generate(token_ids=PROMPT, sampling=GREEDY)
    seen = [request for worker in cluster.workers for request in worker.engine.seen]
    assert len({request.engine_id for request in seen}) == len(seen)
    per_room: dict[int, int] = {}
    for request in seen:
        assert request.room is not None
        per_room[request.room.room] = per_room.get(request.room.room, 0) + 1
    # One leg only where the other was ended before it was sent.
    assert set(per_room.values()) <= {1, 2}, "a room belongs to the two legs of one attempt"
    for worker in cluster.workers:
        rooms = [request.room for request in worker.engine.seen]
        assert len(set(rooms)) == len(rooms)
    await eventually(lambda: not any(worker.engine.live for worker in good), within=5)


@pytest.mark.parametrize("killed", [Role.PREFILL, Role.DECODE])
async def test_a_dead_engine_before_the_first_token_is_no_clients_error(cluster: FakeCluster, killed: Role) -> None:
    bad, _ = await two_and_two(cluster, killed, Behaviour(hang=True))
    running = [asyncio.create_task(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY)) for _ in range(4)]
    await eventually(lambda: len(bad.engine.live) == 2)
    bad.engine.die("scheduler killed")
    answers = await asyncio.gather(*running)
    assert all(answer.token_ids == expected_tokens(PROMPT, 8) for answer in answers)


async def test_with_one_pair_the_error_is_typed_and_quick(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    prefill.engine.behaviour.hang = True
    running = asyncio.create_task(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY))
    await eventually(lambda: prefill.engine.live)
    killed_at = asyncio.get_running_loop().time()
    prefill.engine.die("scheduler killed")
    with pytest.raises(RequestError) as caught:
        await running
    assert asyncio.get_running_loop().time() - killed_at < 2.0
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.ENGINE_DEAD)
    assert caught.value.leg == "prefill"
    await eventually(lambda: not decode.engine.live, within=5)


async def test_no_more_attempts_than_promised(cluster: FakeCluster) -> None:
    for _ in range(5):
        await cluster.start_worker(Role.PREFILL, Behaviour(abort_message="transfer failed"))
        await cluster.start_worker(Role.DECODE)
    await cluster.routable(10)
    with pytest.raises(RequestError) as caught:
        await cluster.client.generate(token_ids=PROMPT, sampling=GREEDY)
    assert caught.value.reason is Reason.ENGINE_ABORTED
    tried = [worker for worker in cluster.workers if worker.config.role is Role.PREFILL and worker.engine.seen]
    assert len(tried) == 3, "the first attempt and two more, each with another worker"


@pytest.mark.peers(8)
async def test_the_requests_own_fault_is_not_tried_again(cluster: FakeCluster) -> None:
    prefill, _ = await cluster.start_pair()
    with pytest.raises(RequestError) as caught:
        await cluster.client.generate(token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=4, top_p=0))
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert prefill.engine.seen == []


async def test_cancelling_between_attempts_ends_the_request(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.frontend.request.retry._JITTER_SECONDS", 0.0)
    monkeypatch.setattr("services.frontend.request.retry.RetryPolicy.pause", lambda self: 5.0)
    bad, _ = await two_and_two(cluster, Role.PREFILL, Behaviour(abort_message="transfer failed"))
    running = [
        asyncio.create_task(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY, request_id=f"r{n}"))
        for n in range(2)
    ]
    await eventually(lambda: bad.engine.seen)
    await eventually(lambda: sum(task.done() for task in running) == 1, what="the other pair has answered")
    (waiting,) = [number for number, task in enumerate(running) if not task.done()]
    assert await cluster.client.abort(f"r{waiting}")
    with pytest.raises(RequestError) as caught:
        await asyncio.wait_for(running[waiting], 3)
    assert caught.value.code is grpc.StatusCode.CANCELLED


@contextlib.asynccontextmanager
async def one_pair_amid_a_request(
    etcd_endpoint: str, model_folder: Path, *, ready_queue_timeout: float
) -> AsyncGenerator[tuple[FakeCluster, HostedWorker, asyncio.Task[Answer]]]:
    """The cluster, its one prefill worker, which has the request and says nothing, and what asks."""
    async with FakeCluster(
        etcd_endpoint,
        f"t-{time.time_ns()}",
        model_folder,
        heartbeat=2.0,
        ready_queue_timeout=ready_queue_timeout,
    ) as cluster:
        prefill, decode = await cluster.start_pair()
        prefill.engine.behaviour.hang = True
        running = asyncio.create_task(cluster.client.generate(token_ids=PROMPT, sampling=GREEDY))
        await eventually(lambda: prefill.engine.live)
        yield cluster, prefill, running
        await eventually(lambda: not decode.engine.live, within=10)


async def test_a_request_that_loses_its_only_workers_waits_for_others(etcd_endpoint: str, model_folder: Path) -> None:
    async with one_pair_amid_a_request(etcd_endpoint, model_folder, ready_queue_timeout=20.0) as (
        cluster,
        prefill,
        running,
    ):
        prefill.engine.die("scheduler killed")
        await cluster.start_worker(Role.PREFILL)
        assert (await asyncio.wait_for(running, 20)).token_ids == expected_tokens(PROMPT, 8)


async def test_nobody_comes_and_the_workers_error_is_the_requests(etcd_endpoint: str, model_folder: Path) -> None:
    async with one_pair_amid_a_request(etcd_endpoint, model_folder, ready_queue_timeout=0.5) as (_, prefill, running):
        prefill.engine.die("scheduler killed")
        with pytest.raises(RequestError) as caught:
            await asyncio.wait_for(running, 10)
        assert caught.value.reason is Reason.ENGINE_DEAD


async def test_a_worker_that_only_lost_its_connection_is_used_again(etcd_endpoint: str, model_folder: Path) -> None:
    """Within the time for which others would be waited for, which is longer than the test."""
    async with one_pair_amid_a_request(etcd_endpoint, model_folder, ready_queue_timeout=300.0) as (
        cluster,
        prefill,
        running,
    ):
        prefill.engine.behaviour.hang = False
        (worker,) = (each for each in cluster.frontend.workers.all() if each.role is Role.PREFILL)
        cast("Any", worker.link)._outgoing.close()
        assert (await asyncio.wait_for(running, 20)).token_ids == expected_tokens(PROMPT, 8)
