"""What an operator relies on, with real processes around simulated engines: registration, pairing, counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from kvbaton.client import Client
from kvbaton.errors import Reason, RequestError
from services.registry.etcd import EtcdClient
from services.registry.watcher import RegistryWatcher, WorkerPut
from tests.support.processes import Processes, all_routable, answering
from tests.support.traffic import fresh_prompt, greedy
from tests.support.waiting import eventually


@pytest_asyncio.fixture
async def processes(etcd_endpoint: str, tmp_path: Path) -> AsyncIterator[Processes]:
    processes = Processes(etcd_endpoint, tmp_path)
    try:
        yield processes
    finally:
        await asyncio.to_thread(processes.stop)


@pytest.mark.peers(7)
async def test_a_worker_whose_warm_up_fails_never_appears_in_etcd(processes: Processes, etcd_endpoint: str) -> None:
    seen: set[str] = set()

    async def watch(watcher: RegistryWatcher) -> None:
        async for event in watcher.events():
            if isinstance(event, WorkerPut):
                seen.add(event.record.instance_id)

    async with EtcdClient([etcd_endpoint]) as etcd, RegistryWatcher(etcd, processes.namespace) as watcher:
        watching = asyncio.create_task(watch(watcher))
        processes.worker("fails", "prefill", "--warmup-timeout", "0.5", sim="prefill_base=5")
        assert await asyncio.to_thread(processes.processes["fails"].wait, 60) == 1
        assert "--warmup-timeout" in processes.log("fails").splitlines()[-1]
        processes.worker("works", "prefill")
        await eventually(lambda: seen, within=30, what="the watch does see workers that serve")
        watching.cancel()
    assert len(seen) == 1


async def test_workers_with_different_page_sizes_are_never_paired_and_the_error_says_why(processes: Processes) -> None:
    processes.frontend("--ready-queue-timeout", "0")
    processes.worker("prefill", "prefill", "--page-size", "16")
    processes.worker("decode", "decode", "--page-size", "32")
    async with Client(processes.target, timeout=20) as client:
        await all_routable(client, 2)
        with pytest.raises(RequestError) as caught:
            await client.generate(token_ids=[1, 2, 3], sampling=greedy(4))
        assert caught.value.reason is Reason.NO_COMPATIBLE_PAIR
        assert "page_size: decode 32, prefill 16" in caught.value.message
        processes.worker("fitting", "decode", "--page-size", "16")
        await answering(client)


async def counts(endpoint: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels; the whole page must parse."""
    async with httpx.AsyncClient() as http:
        response = await http.get(f"http://{endpoint}/metrics")
    families = list(text_string_to_metric_families(response.text))
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


async def test_the_metrics_of_all_three_processes_agree_with_a_counted_load(processes: Processes) -> None:
    processes.frontend("--no-check-pairs")
    processes.worker("prefill", "prefill")
    processes.worker("decode", "decode", sim="decode_step=0.005")
    frontend = processes.metrics_endpoints["frontend"]
    async with Client(processes.target, timeout=20) as client:
        await all_routable(client, 2)
        await asyncio.gather(*(client.generate(token_ids=fresh_prompt(20), sampling=greedy(7)) for _ in range(30)))
        for number in range(5):
            doomed = asyncio.create_task(
                client.generate(token_ids=fresh_prompt(20), sampling=greedy(1000), request_id=f"doomed-{number}")
            )
            await eventually(lambda: _live(processes, 1))
            await client.abort(f"doomed-{number}")
            with pytest.raises(RequestError):
                await doomed
        with pytest.raises(RequestError):
            await client.generate(token_ids=[10**6], sampling=greedy(1))
        await eventually(lambda: _live(processes, 0))
    assert await counts(frontend, "kvbaton_requests_total", outcome="finished") == 30
    assert await counts(frontend, "kvbaton_requests_total", outcome="CANCELLED") == 5
    assert await counts(frontend, "kvbaton_requests_total", outcome="INVALID_ARGUMENT") == 1
    assert await counts(frontend, "kvbaton_prompt_tokens_total") == 30 * 20
    assert await counts(frontend, "kvbaton_completion_tokens_total") == 30 * 7
    assert await counts(frontend, "kvbaton_time_to_first_token_seconds_count") == 30
    assert await counts(frontend, "kvbaton_live_requests") == 0
    prefill, decode = (processes.system_endpoints[name] for name in ("prefill", "decode"))
    for endpoint in (prefill, decode):
        assert await counts(endpoint, "kvbaton_worker_legs_total") == 35
    assert await counts(decode, "kvbaton_worker_legs_total", outcome="finished") == 30
    assert await counts(decode, "kvbaton_worker_legs_total", outcome="aborted") == 5


async def _live(processes: Processes, count: int) -> bool:
    return await counts(processes.system_endpoints["decode"], "kvbaton_worker_live_legs") == count
