"""Workers killed, drained, started again under a frontend that is never touched; cancelled requests leave nothing."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time

import grpc
import pytest

from kvbaton.client import Client, SamplingParams
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import worker_pb2
from services.registry.etcd import EtcdClient
from services.registry.lookup import list_workers
from tests.e2e.conftest import Pair
from tests.e2e.test_contract import sample
from tests.support.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

LEASE_SECONDS = 10.0
# Time bounds of a noisy machine.
SLACK = 3.0


async def routable(client: Client, role: worker_pb2.WorkerRole) -> bool:
    status = await client.status()
    return any(worker.routable for worker in status.workers if worker.record.role == role)


async def registered(pair: Pair) -> set[str]:
    async with EtcdClient([pair.cluster.etcd_endpoints]) as etcd:
        return {record.instance_id for record in await list_workers(etcd, pair.cluster.options.namespace)}


async def answer(client: Client) -> str:
    sampling = SamplingParams(max_new_tokens=4, temperature=0)
    return (await client.generate(text="The capital of France is", sampling=sampling)).text


async def test_two_hundred_requests_a_third_cancelled_leave_nothing(pair: Pair) -> None:
    rng = random.Random(20261122)
    frontend_metrics = f"{pair.cluster.http_url}/metrics"
    async with (
        pair.client() as client,
        Client(pair.cluster.endpoint("decode")) as decode,
        Client(pair.cluster.endpoint("prefill")) as prefill,
    ):
        await answer(client)

        async def used() -> tuple[int, int]:
            return (await prefill.status()).load.used_tokens, (await decode.status()).load.used_tokens

        baseline = await used()
        tasks = await sample(frontend_metrics, "kvbaton_event_loop_tasks")
        slots = asyncio.Semaphore(24)

        async def one(number: int) -> str:
            async with slots:
                prompt = [rng.randrange(100, 40_000) for _ in range(rng.randrange(4, 48))]
                call = asyncio.create_task(
                    client.generate(
                        token_ids=prompt, sampling=SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
                    )
                )
                if number % 3 == 0:
                    await asyncio.sleep(rng.uniform(0, 2.0))
                    call.cancel()
                await asyncio.wait({call})
                if call.cancelled():
                    return "cancelled"
                return "finished" if len(call.result().token_ids) == 8 else "short"

        outcomes = await asyncio.gather(*(one(number) for number in range(200)))
        print({outcome: outcomes.count(outcome) for outcome in set(outcomes)})
        assert set(outcomes) == {"finished", "cancelled"}
        assert outcomes.count("cancelled") > 20

        async def at_rest() -> bool:
            return all(now <= before for now, before in zip(await used(), baseline, strict=True))

        await eventually(at_rest, within=35, every=0.5, what=f"used tokens back at {baseline}")

        async def no_more_tasks() -> bool:
            return await sample(frontend_metrics, "kvbaton_event_loop_tasks") <= tasks

        await eventually(no_more_tasks, within=35, every=0.5, what=f"tasks back at {tasks}")
        assert await sample(frontend_metrics, "kvbaton_live_requests") == 0
        for worker in ("prefill", "decode"):
            assert await sample(f"{pair.cluster.system_url(worker)}/metrics", "kvbaton_worker_live_legs") == 0


async def test_sigterm_lets_requests_in_flight_finish(pair: Pair) -> None:
    async with pair.client() as client:
        sampling = SamplingParams(max_new_tokens=48, temperature=0, ignore_eos=True)
        running = [asyncio.create_task(client.generate(token_ids=[n, n + 7], sampling=sampling)) for n in (11, 12, 13)]
        async with Client(pair.cluster.endpoint("decode")) as decode:
            await eventually(lambda: _live(decode, 3), within=30)
        child = pair.cluster.children["decode"]
        os.kill(child.pid, signal.SIGTERM)
        answers = await asyncio.gather(*running)
        assert [len(a.token_ids) for a in answers] == [48, 48, 48]
        assert await asyncio.wait_for(child.wait(), 60) == 0
        with pytest.raises(RequestError) as caught:
            await answer(client)
        assert caught.value.reason is Reason.NO_DECODE_WORKER
        await pair.cluster.restart("decode")
        await pair.cluster.wait_ready()
        assert (await answer(client)).startswith(" Paris")


async def _live(decode: Client, count: int) -> bool:
    return (await decode.status()).load.live_requests == count


@pytest.mark.parametrize(
    ("name", "role", "reason"),
    [
        ("prefill", worker_pb2.WORKER_ROLE_PREFILL, Reason.NO_PREFILL_WORKER),
        ("decode", worker_pb2.WORKER_ROLE_DECODE, Reason.NO_DECODE_WORKER),
    ],
)
async def test_sigkill_then_start_again_without_touching_the_frontend(
    pair: Pair, name: str, role: worker_pb2.WorkerRole, reason: Reason
) -> None:
    cluster = pair.cluster
    frontend_pid = cluster.children["frontend"].pid
    instance = cluster.workers[name].instance_id
    async with pair.client() as client:
        assert instance in await registered(pair)
        child = cluster.children[name]
        os.kill(child.pid, signal.SIGKILL)
        killed = time.monotonic()

        async def gone() -> bool:
            return not await routable(client, role)

        await eventually(gone, within=1.0 * SLACK, what="unroutable within a second of the broken channel")
        print(f"{name} unroutable after {time.monotonic() - killed:.2f} s")
        with pytest.raises(RequestError) as caught:
            await answer(client)
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, reason)

        async def forgotten() -> bool:
            return instance not in await registered(pair)

        await eventually(forgotten, within=LEASE_SECONDS * SLACK, every=0.2, what="out of etcd within the lease")
        print(f"{name} out of etcd after {time.monotonic() - killed:.1f} s")
        await eventually(lambda: not child.group_exists(), within=10, what="the engine's children are gone too")

        await cluster.restart(name)
        await cluster.wait_ready()
        assert (await answer(client)).startswith(" Paris")
    assert cluster.children["frontend"].pid == frontend_pid
    assert cluster.children["frontend"].running
