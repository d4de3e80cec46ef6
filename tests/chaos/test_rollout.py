"""Workers and frontends come and go under load as an operator lets them: no request fails, and none hangs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from kvbaton.client import Client
from kvbaton.errors import Reason, RequestError
from tests.support.processes import Processes, all_proven, all_routable
from tests.support.subject import Bystanders
from tests.support.traffic import ask

CLIENTS = 12
# Longer than a drain's grace, shorter than its time-out.
READY_TIMEOUT = 3.0
SLACK = 3.0
# Long enough to be in the middle of an answer when a worker drains.
DECODE = "decode_step=0.02"


@pytest_asyncio.fixture
async def running(processes: Processes) -> AsyncIterator[Client]:
    """Two pairs that have proven themselves behind one frontend, and a client of it."""
    processes.frontend("--ready-queue-timeout", str(READY_TIMEOUT))
    for number in range(2):
        processes.worker(f"prefill{number}", "prefill")
        processes.worker(f"decode{number}", "decode", sim=DECODE)
    async with Client(processes.target, timeout=60) as client:
        await all_routable(client, 4)
        await all_proven(processes, client, 4)
        yield client


@contextlib.asynccontextmanager
async def load(client: Client) -> AsyncGenerator[Bystanders]:
    """Requests that all must succeed, before, during and after what happens inside."""
    async with Bystanders([client] * CLIENTS).running() as others:
        await others.more(CLIENTS)
        yield others
        await others.more(2 * CLIENTS)


async def roll(processes: Processes, client: Client, name: str) -> None:
    """SIGTERM, and the worker again at the same address."""
    assert await asyncio.to_thread(processes.terminate, name) == 0
    processes.restart(name)
    await all_routable(client, 4)


@pytest.mark.parametrize("name", ["prefill0", "decode0"])
async def test_a_worker_drains_without_a_failed_request(processes: Processes, running: Client, name: str) -> None:
    async with load(running):
        assert await asyncio.to_thread(processes.terminate, name) == 0
        await all_routable(running, 3)


async def test_a_frontend_drains_without_a_failed_request(processes: Processes, running: Client) -> None:
    """What it has accepted it answers; what comes later finds the other frontend."""
    processes.frontend(name="other")
    async with Client(processes.target_of("other"), timeout=60) as other:
        await all_routable(other, 4)
        accepted = [asyncio.create_task(ask(running, prompt_tokens=40, tokens=40)) for _ in range(CLIENTS)]

        async def all_live() -> bool:
            return (await running.status()).live_requests == CLIENTS

        async with load(other):
            await asyncio.sleep(0.3)
            assert not any(task.done() for task in accepted), "they would prove nothing"
            assert await asyncio.to_thread(processes.terminate, "frontend") == 0
            await asyncio.gather(*accepted)
        with pytest.raises(RequestError) as caught:
            await ask(running, prompt_tokens=40, tokens=4, timeout=5)
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE


async def test_all_workers_are_replaced_without_a_failed_request(processes: Processes, running: Client) -> None:
    async with load(running):
        for name in ("prefill0", "decode0", "prefill1", "decode1"):
            await roll(processes, running, name)


async def test_requests_wait_for_workers_or_are_told_to_come_again(processes: Processes, running: Client) -> None:
    """Scale to zero and back: who comes early is refused in time, who comes late enough is served."""
    names = ("prefill0", "decode0", "prefill1", "decode1")
    for name in names:
        processes.processes[name].terminate()
    for name in names:
        assert await asyncio.to_thread(processes.processes[name].wait, 30) == 0
    await all_routable(running, 0)

    async with asyncio.timeout(SLACK * READY_TIMEOUT):
        refused = await asyncio.gather(
            *(ask(running, prompt_tokens=40, tokens=4) for _ in range(CLIENTS)), return_exceptions=True
        )
    for error in refused:
        assert isinstance(error, RequestError)
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert error.reason in {Reason.NO_WORKER, Reason.NO_PREFILL_WORKER, Reason.NO_DECODE_WORKER}
        assert error.retry_after

    for name in names:
        processes.restart(name)
    await asyncio.wait_for(asyncio.gather(*(come_again(running) for _ in range(CLIENTS))), 60)


async def come_again(client: Client) -> None:
    """As a client that heeds RetryInfo."""
    while True:
        try:
            return await ask(client, prompt_tokens=40, tokens=4)
        except RequestError as error:
            if error.retry_after is None:
                raise
            await asyncio.sleep(error.retry_after)


@pytest.mark.parametrize("name", ["prefill0", "decode0"])
async def test_after_a_replacement_at_the_same_address_the_next_request_works(processes: Processes, name: str) -> None:
    """The one pair that there is: decode still believes in the old prefill until its heartbeat has failed, as SGLang."""
    processes.frontend("--ready-queue-timeout", "30")
    processes.worker("prefill0", "prefill")
    processes.worker("decode0", "decode", sim="heartbeat_interval=0.5,heartbeat_timeout=0.5")
    async with Client(processes.target, timeout=60) as client:
        await all_routable(client, 2)
        await all_proven(processes, client, 1)
        await asyncio.to_thread(processes.kill, name)
        processes.restart(name)
        # At once, and again and again: each one works or waits.
        async with asyncio.timeout(60):
            for _ in range(CLIENTS):
                await ask(client, prompt_tokens=40, tokens=4)
