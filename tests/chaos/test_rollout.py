"""Workers and frontends come and go under load as an operator lets them: no request fails, and none hangs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

import grpc
import pytest
import pytest_asyncio

from kvbaton.client import Client
from kvbaton.errors import Reason, RequestError
from tests.support.processes import Processes, all_proven, all_routable
from tests.support.resources import gauges
from tests.support.subject import Bystanders
from tests.support.traffic import ask
from tests.support.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

CLIENTS = 12
# Longer than a drain's grace, shorter than its time-out.
READY_TIMEOUT = 3.0
SLACK = 3.0
# Long enough to be in the middle of an answer when a worker drains.
DECODE = "decode_step=0.02"
# Seconds of tokens: the frontend is told to stop long before it ends.
LONG_ANSWER = 500


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(etcd_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Processes]:
    """Two pairs and two frontends, for all tests; each leaves them as they were."""
    folder = tmp_path_factory.mktemp("rollout")
    processes = Processes(etcd_endpoint, folder, {"XDG_CACHE_HOME": str(folder / "cache")})
    try:
        processes.frontend("--ready-queue-timeout", str(READY_TIMEOUT))
        processes.frontend(name="other")
        for number in range(2):
            processes.worker(f"prefill{number}", "prefill")
            processes.worker(f"decode{number}", "decode", sim=DECODE)
        yield processes
    finally:
        await asyncio.to_thread(processes.stop)


@pytest_asyncio.fixture(loop_scope="module")
async def client(cluster: Processes) -> AsyncIterator[Client]:
    """Of the first frontend, which has all workers. What a test has ended, or one that failed, is started again."""
    for name, process in cluster.processes.items():
        if process.poll() is not None:
            cluster.restart(name)
    async with Client(cluster.target, timeout=60) as client:
        await all_routable(client, 4)
        await all_proven(cluster, client, 4)
        yield client


@contextlib.asynccontextmanager
async def load(client: Client) -> AsyncGenerator[Bystanders]:
    """Requests that all must succeed, before, during and after what happens inside."""
    async with Bystanders([client] * CLIENTS).running() as others:
        await others.more(CLIENTS)
        yield others
        await others.more(2 * CLIENTS)


async def roll(cluster: Processes, client: Client, name: str) -> None:
    """SIGTERM, and the worker again at the same address."""
    assert await asyncio.to_thread(cluster.terminate, name) == 0
    cluster.restart(name)
    await all_routable(client, 4)


@pytest.mark.peers(8)
@pytest.mark.parametrize("name", ["prefill0", "decode0"])
async def test_a_worker_drains_without_a_failed_request(cluster: Processes, client: Client, name: str) -> None:
    async with load(client):
        assert await asyncio.to_thread(cluster.terminate, name) == 0
        await all_routable(client, 3)


async def test_a_frontend_drains_without_a_failed_request(cluster: Processes, client: Client) -> None:
    """What it has accepted it answers; what comes later finds the other frontend, or a refusal."""

    async def all_live() -> bool:
        return (await gauges(cluster.metrics_endpoints["frontend"]))["kvbaton_live_requests"] == CLIENTS

    async with Client(cluster.target_of("other"), timeout=60) as other:
        await all_routable(other, 4)
        accepted = [asyncio.create_task(ask(client, prompt_tokens=40, tokens=LONG_ANSWER)) for _ in range(CLIENTS)]
        await eventually(all_live, what="all accepted")
        async with load(other):
            assert not any(each.done() for each in accepted), "the drain has something to wait for"
            assert await asyncio.to_thread(cluster.terminate, "frontend") == 0
            await asyncio.gather(*accepted)
        with pytest.raises(RequestError) as caught:
            await ask(client, prompt_tokens=40, tokens=4, timeout=5)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.peers(2, 8)
async def test_all_workers_are_replaced_without_a_failed_request(cluster: Processes, client: Client) -> None:
    async with load(client):
        for name in ("prefill0", "decode0", "prefill1", "decode1"):
            await roll(cluster, client, name)


async def test_requests_wait_for_workers_or_are_told_to_come_again(cluster: Processes, client: Client) -> None:
    """Scale to zero and back: who comes early is refused in time, who comes late enough is served."""
    names = ("prefill0", "decode0", "prefill1", "decode1")
    for name in names:
        cluster.processes[name].terminate()
    for name in names:
        assert await asyncio.to_thread(cluster.processes[name].wait, 30) == 0
    await all_routable(client, 0)

    async with asyncio.timeout(SLACK * READY_TIMEOUT):
        refused = await asyncio.gather(
            *(ask(client, prompt_tokens=40, tokens=4) for _ in range(CLIENTS)), return_exceptions=True
        )
    for error in refused:
        assert isinstance(error, RequestError)
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert error.reason in {Reason.NO_WORKER, Reason.NO_PREFILL_WORKER, Reason.NO_DECODE_WORKER}
        assert error.retry_after

    for name in names:
        cluster.restart(name)
    await asyncio.wait_for(asyncio.gather(*(come_again(client) for _ in range(CLIENTS))), 120)


async def come_again(client: Client) -> None:
    """As a client that heeds RetryInfo."""
    while True:
        try:
            return await ask(client, prompt_tokens=40, tokens=4)
        except RequestError as error:
            if error.retry_after is None:
                raise
            await asyncio.sleep(error.retry_after)


@pytest.mark.peers(2)
@pytest.mark.parametrize("name", ["prefill0", "decode0"])
async def test_after_a_replacement_at_the_same_address_the_next_request_works(processes: Processes, name: str) -> None:
    """The only pair. As SGLang's, decode takes a new prefill for the old one until its heartbeat has failed.

    So an engine's start must outlast a few heartbeats, as SGLang's does by far.
    """
    processes.frontend("--ready-queue-timeout", "120", "--queue-timeout", "120")
    processes.worker("prefill0", "prefill", sim="start_seconds=5")
    processes.worker("decode0", "decode", sim="heartbeat_interval=0.5,heartbeat_timeout=0.5")
    async with Client(processes.target, timeout=120) as client:
        await all_routable(client, 2)
        await all_proven(processes, client, 1)
        await asyncio.to_thread(processes.kill, name)
        processes.restart(name)
        # At once, and again and again: each one works or waits.
        async with asyncio.timeout(120):
            for _ in range(CLIENTS):
                await ask(client, prompt_tokens=40, tokens=4)
