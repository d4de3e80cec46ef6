"""A worker that says it is well and fails its requests gets no more of them, until it generates again."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from kvbaton.client import SamplingParams
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import health_pb2
from services.config.frontend import BreakerFlags
from services.frontend.router.worker import Worker
from services.requests import Role
from tests.support.cluster import FakeCluster, HostedWorker
from tests.support.fake_engine import Behaviour, expected_tokens
from tests.support.waiting import eventually

PROMPT = [5, 6, 7]
GREEDY = SamplingParams(max_new_tokens=8, temperature=0)
FAULTS = 3
# A failed hand-over counts half, and round robin brings every second request to the bad one of two.
MANY = 8 * FAULTS

QUICKLY_PROBED = pytest.mark.parametrize(
    "breaker", [BreakerFlags(breaker_faults=FAULTS, breaker_pause=0.1, breaker_longest_pause=0.2)], ids=["probed"]
)


@pytest.fixture
def link() -> str:
    return "session"


@pytest.fixture
def breaker() -> BreakerFlags:
    """No probe comes during the test."""
    return BreakerFlags(breaker_faults=FAULTS, breaker_pause=600.0, breaker_longest_pause=600.0)


@pytest.fixture
def check_pairs() -> bool:
    return False


@pytest_asyncio.fixture
async def cluster(
    etcd_endpoint: str, model_folder: Path, link: str, breaker: BreakerFlags, check_pairs: bool
) -> AsyncIterator[FakeCluster]:
    """A frontend without workers."""
    namespace = f"t-{uuid.uuid4().hex[:12]}"
    async with FakeCluster(
        etcd_endpoint, namespace, model_folder, link=link, heartbeat=2.0, breaker=breaker, check_pairs=check_pairs
    ) as cluster:
        yield cluster


def seen(cluster: FakeCluster, worker: HostedWorker) -> Worker:
    """As the frontend has it."""
    return next(each for each in cluster.frontend.workers.all() if each.instance_id == worker.instance_id)


async def answered(cluster: FakeCluster) -> None:
    answer = await cluster.client.generate(token_ids=PROMPT, sampling=GREEDY)
    assert answer.token_ids == expected_tokens(PROMPT, 8)


async def answered_until(cluster: FakeCluster, condition: Callable[[], object]) -> None:
    """Answered requests, one after the other."""
    for _ in range(MANY):
        if condition():
            return
        await answered(cluster)
    raise AssertionError(f"not within {MANY} requests")


async def until_opened(cluster: FakeCluster, worker: HostedWorker) -> None:
    """Answered requests until its breaker opens; a probe may have closed it again by then."""
    breaker = seen(cluster, worker).breaker
    await answered_until(cluster, lambda: breaker.opened_at)


async def failing(cluster: FakeCluster, reason: Reason) -> None:
    with pytest.raises(RequestError) as caught:
        await cluster.client.generate(token_ids=PROMPT, sampling=GREEDY)
    assert caught.value.reason is reason


@pytest.mark.parametrize("sick", [Role.PREFILL, Role.DECODE])
@pytest.mark.peers(8)
async def test_a_worker_that_fails_every_request_is_ejected_and_its_partners_are_not(
    cluster: FakeCluster, sick: Role
) -> None:
    bad = await cluster.start_worker(sick, Behaviour(abort_message="transfer failed"))
    roles = [Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE]
    roles.remove(sick)
    for role in roles:
        await cluster.start_worker(role)
    await cluster.routable(4)
    await until_opened(cluster, bad)
    await cluster.routable(3)
    assert [worker.instance_id for worker in cluster.frontend.workers.all() if worker.ejected] == [bad.instance_id]
    tried = len(bad.engine.seen)
    for _ in range(4):
        await answered(cluster)
    assert len(bad.engine.seen) == tried, "nothing is sent there any more"

    (described,) = [
        worker for worker in (await cluster.client.status()).workers if worker.record.instance_id == bad.instance_id
    ]
    assert described.breaker == health_pb2.BREAKER_STATE_OPEN
    assert not described.routable
    assert "ejected by its breaker: UNAVAILABLE ENGINE_ABORTED" in described.reason


async def test_what_can_not_migrate_counts_all_the_same(cluster: FakeCluster) -> None:
    """Sampling without a seed, as most requests: the client is told NOT_MIGRATABLE, the breaker what happened."""
    bad = await cluster.start_worker(Role.AGGREGATED, Behaviour(token_seconds=0.02, abort_behind=2))
    good = await cluster.start_worker(Role.AGGREGATED)
    await cluster.routable(2)
    for _ in range(MANY):
        if seen(cluster, bad).ejected:
            break
        sampling = SamplingParams(max_new_tokens=8, temperature=1)
        with contextlib.suppress(RequestError):
            await cluster.client.generate(token_ids=PROMPT, sampling=sampling)
    assert seen(cluster, bad).ejected
    assert "ENGINE_ABORTED" in seen(cluster, bad).breaker.last_fault
    assert not seen(cluster, good).breaker.opened_at


async def test_of_several_choices_only_the_failed_ones_worker_is_blamed(cluster: FakeCluster) -> None:
    bad = await cluster.start_worker(Role.AGGREGATED, Behaviour(token_seconds=0.02, abort_behind=2))
    good = await cluster.start_worker(Role.AGGREGATED, Behaviour(token_seconds=0.05))
    await cluster.routable(2)
    for _ in range(MANY):
        if seen(cluster, bad).ejected:
            break
        with pytest.raises(RequestError):
            await cluster.client.generate(
                token_ids=PROMPT, n=2, sampling=SamplingParams(max_new_tokens=200, temperature=1)
            )
    assert seen(cluster, bad).ejected
    assert not seen(cluster, good).breaker.last_fault


@pytest.mark.peers(8)
async def test_of_two_sick_workers_one_stays_as_the_last_resort(cluster: FakeCluster) -> None:
    behaviour = Behaviour(abort_message="out of sorts")
    workers = [await cluster.start_worker(Role.AGGREGATED, behaviour) for _ in range(2)]
    await cluster.routable(2)

    async def both_open() -> bool:
        await failing(cluster, Reason.ENGINE_ABORTED)
        return not any(seen(cluster, worker).breaker.closed for worker in workers)

    await eventually(both_open)
    await cluster.routable(1)
    behaviour.abort_message = ""
    await answered(cluster)


@QUICKLY_PROBED
async def test_the_ejected_worker_is_probed_and_comes_back(cluster: FakeCluster, breaker: BreakerFlags) -> None:
    bad = await cluster.start_worker(Role.AGGREGATED, Behaviour(abort_message="ill"))
    await cluster.start_worker(Role.AGGREGATED)
    await cluster.routable(2)
    # Its own warm-up is over.
    bad.engine.behaviour.probe_fails = "still ill"
    await until_opened(cluster, bad)
    await cluster.routable(1)
    probes = bad.engine.probes
    await eventually(lambda: bad.engine.probes >= probes + 2, what="it is asked again and again")
    assert not seen(cluster, bad).breaker.closed
    bad.engine.behaviour.abort_message = bad.engine.behaviour.probe_fails = ""
    await cluster.routable(2)
    assert seen(cluster, bad).breaker.closed
    tried = len(bad.engine.seen)
    for _ in range(4):
        await answered(cluster)
    assert len(bad.engine.seen) > tried


@pytest.mark.parametrize("check_pairs", [True], ids=["check-pairs"])
@QUICKLY_PROBED
async def test_whether_it_can_hand_over_again_shows_no_client(cluster: FakeCluster, breaker: BreakerFlags) -> None:
    """A probe goes through the engine alone, so a worker that only its transfers fail answers it."""
    bad = await cluster.start_worker(Role.PREFILL)
    await cluster.start_worker(Role.PREFILL)
    await cluster.start_worker(Role.DECODE)
    await cluster.routable(3)
    # Every pair proves itself before it fails.
    await answered_until(cluster, lambda: len(bad.engine.seen) >= 2)
    bad.engine.behaviour.abort_message = "transfer failed"
    worker = seen(cluster, bad)
    await until_opened(cluster, bad)
    await eventually(lambda: worker.breaker.closed and worker.routable, what="a probe that succeeds")
    tried = len(bad.engine.seen)
    await answered_until(cluster, lambda: len(bad.engine.seen) > tried)
    assert max(len(request.token_ids) for request in bad.engine.seen[tried:]) > len(PROMPT), "the proof's own page"


@pytest.mark.peers(8)
async def test_bad_input_full_queues_and_cancels_open_nothing(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    for _ in range(4 * FAULTS):
        with pytest.raises(RequestError):
            await cluster.client.generate(token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=4, top_p=0))
    prefill.engine.behaviour.hang = True
    for number in range(4 * FAULTS):
        running = asyncio.create_task(
            cluster.client.generate(token_ids=PROMPT, sampling=GREEDY, request_id=f"r{number}")
        )
        await eventually(lambda: prefill.engine.live)
        assert await cluster.client.abort(f"r{number}")
        await asyncio.gather(running, return_exceptions=True)
        await eventually(lambda: not prefill.engine.live and not decode.engine.live)
    for worker in cluster.frontend.workers.all():
        assert worker.breaker.closed
        assert not worker.breaker.last_fault


async def test_a_new_incarnation_starts_closed(cluster: FakeCluster) -> None:
    bad = await cluster.start_worker(Role.AGGREGATED, Behaviour(abort_message="ill"))
    await cluster.routable(1)
    for _ in range(FAULTS):
        await failing(cluster, Reason.ENGINE_ABORTED)
    old = seen(cluster, bad)
    await eventually(lambda: not old.breaker.closed)
    bad.host.stop()
    await bad.task
    await cluster.start_worker(Role.AGGREGATED, port=bad.config.port)
    await eventually(lambda: any(each.routable and each is not old for each in cluster.frontend.workers.all()))
    (new,) = cluster.frontend.workers.all()
    assert new.instance_id == old.instance_id
    assert new.breaker.closed
    await answered(cluster)


async def test_an_embedding_worker_has_one_too(cluster: FakeCluster) -> None:
    bad = await cluster.start_worker(Role.EMBEDDING, Behaviour(embed_fails="ill"))
    await cluster.start_worker(Role.EMBEDDING)
    await cluster.routable(2)
    for _ in range(MANY):
        if not seen(cluster, bad).breaker.closed:
            break
        await cluster.client.embed([PROMPT])
    assert not seen(cluster, bad).breaker.closed
    await cluster.routable(1)
    await cluster.client.embed([PROMPT])
