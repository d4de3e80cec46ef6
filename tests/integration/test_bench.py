"""`kvbaton bench` against a frontend and workers over real sockets, and as the process that an operator starts."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from services.requests import Role
from services.tools.bench.command import bench
from services.tools.bench.options import BenchFlags
from services.tools.bench.report import Report
from services.tools.bench.samples import Kind
from services.tools.client_flags import ClientFlags
from tests.support.cluster import FakeCluster
from tests.support.fake_engine import VOCABULARY, Behaviour
from tests.support.waiting import eventually

LIMIT = 60.0


async def measure(cluster: FakeCluster, *, endpoint: str = "", **options: object) -> Report:
    client = ClientFlags(endpoint=endpoint or f"127.0.0.1:{cluster.frontend.grpc_port}")
    flags = replace(BenchFlags(isl="16", osl="4"), client=client, **options)  # type: ignore[arg-type]
    async with asyncio.timeout(LIMIT):
        report = await bench(flags, asyncio.Event())
    assert report is not None
    return report


async def start(cluster: FakeCluster, *arguments: str) -> asyncio.subprocess.Process:
    endpoint = f"127.0.0.1:{cluster.frontend.grpc_port}"
    command = [sys.executable, "-m", "services.cli", "bench", "--endpoint", endpoint, "--isl", "16", *arguments]
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    async with asyncio.timeout(LIMIT):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


def live(cluster: FakeCluster) -> int:
    return sum(len(worker.engine.live) for worker in cluster.workers)


async def test_a_closed_loop_keeps_so_many_in_flight_and_sends_the_seeded_prompts(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    decode.engine.behaviour.token_seconds = 0.005
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            # Where they run: the frontend counts a request a moment longer, until both legs have ended.
            most = max(most, len(decode.engine.live))
            await asyncio.sleep(0.002)

    watching = asyncio.create_task(watch())
    report = await measure(cluster, concurrency=3, requests=30, warmup=5, channels=2)
    watching.cancel()
    results = report.results
    assert (results.count(Kind.FINISHED), len(results), len(report.warmup)) == (30, 30, 5)
    assert most == 3
    assert results.total("output_tokens") == 30 * 4
    assert results.total("prompt_tokens") == 30 * 16
    assert len({tuple(request.token_ids) for request in prefill.engine.seen}) == 35
    assert all(0 <= token < VOCABULARY for request in prefill.engine.seen for token in request.token_ids)
    assert 0.004 < results.latency("itl").mean < 0.5
    assert results.latency("itl").count <= 30 * 3
    assert results.latency("e2e").mean > results.latency("ttft").mean > 0
    assert report.succeeded


async def test_an_open_loop_sends_when_it_is_due_whatever_is_in_flight(cluster: FakeCluster) -> None:
    _, decode = await cluster.start_pair()
    decode.engine.behaviour.token_seconds = 0.1
    report = await measure(cluster, rate=50.0, requests=40)
    results = report.results
    assert results.count(Kind.FINISHED) == 40
    # One after the other they would take 16 s.
    assert 0.8 < results.elapsed < 6.0
    assert results.latency("send_lag").count == 40
    starts = [row.start for row in sorted(results.rows(), key=lambda row: row.index)]
    assert starts == sorted(starts)


async def test_a_duration_ends_the_sending_and_lets_the_last_answers_come(cluster: FakeCluster) -> None:
    _, decode = await cluster.start_pair()
    decode.engine.behaviour.token_seconds = 0.05
    for rate, concurrency in ((20.0, None), (None, 2)):
        report = await measure(cluster, duration=0.5, rate=rate, concurrency=concurrency)
        assert len(report.results) == report.results.count(Kind.FINISHED) > 1
        assert report.results.elapsed < 5.0


async def test_cancelled_requests_are_counted_and_nothing_of_them_stays(cluster: FakeCluster) -> None:
    _, decode = await cluster.start_pair()
    decode.engine.behaviour.token_seconds = 0.02
    report = await measure(cluster, concurrency=8, requests=60, osl="20", cancel_rate=0.5, cancel_after="0:0.3")
    results = report.results
    cancelled, finished = results.count(Kind.CANCELLED), results.count(Kind.FINISHED)
    assert 10 < cancelled <= results.cancels_planned < 50
    assert cancelled + finished == 60
    assert report.succeeded
    await eventually(lambda: live(cluster) == 0, what="engines without requests")


async def test_errors_are_counted_by_code_and_reason(cluster: FakeCluster) -> None:
    await cluster.start_worker(Role.AGGREGATED, Behaviour(abort_message="out of memory"))
    await cluster.routable(1)
    report = await measure(cluster, concurrency=2, requests=6, expect_errors="ENGINE_ABORTED")
    ((outcome, count),) = report.results.errors()
    assert (outcome.reason, count) == ("ENGINE_ABORTED", 6)
    assert "out of memory" in report.results.examples[outcome]
    assert report.succeeded
    assert not replace(report, flags=replace(report.flags, expect_errors="")).succeeded


async def test_the_deadline_of_a_request_is_an_error_of_its_own(cluster: FakeCluster) -> None:
    await cluster.start_worker(Role.AGGREGATED, Behaviour(hang=True))
    await cluster.routable(1)
    report = await measure(cluster, concurrency=2, requests=2, timeout=0.3)
    assert [(o.code, o.reason) for o, _ in report.results.errors()] == [("DEADLINE_EXCEEDED", "UNTYPED")]


async def test_an_aggregated_worker_can_be_asked_directly(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED)
    await cluster.routable(1)
    report = await measure(cluster, endpoint=worker.endpoint, concurrency=2, requests=10)
    assert report.results.count(Kind.FINISHED) == 10


async def test_texts_and_their_measured_lengths(cluster: FakeCluster, tmp_path: Path) -> None:
    await cluster.start_pair()
    file = tmp_path / "prompts.txt"
    file.write_text("abc\nabcdef\n")
    report = await measure(cluster, isl=None, text_file=file, concurrency=2, requests=12)
    assert {row.prompt_tokens for row in report.results.rows()} == {3, 6}


async def test_the_command_prints_a_table_and_writes_json(cluster: FakeCluster, tmp_path: Path) -> None:
    await cluster.start_pair()
    file = tmp_path / "report.json"
    process = await start(
        cluster, "--requests", "20", "--osl", "4", "--goodput", "ttft=30", "--json", str(file), "--json-requests"
    )
    status, out, err = await ended(process)
    assert status == 0, err
    for part in ("20 finished", "TTFT", "ITL", "goodput"):
        assert part in out
    read = json.loads(file.read_text())
    assert read["environment"]["served"]["runtime"]["versions"]["engine"] == "fake"
    assert (read["goodput"]["good"], len(read["requests"])) == (20, 20)


async def test_the_exit_status_is_1_after_an_unexpected_error(cluster: FakeCluster) -> None:
    await cluster.start_worker(Role.AGGREGATED, Behaviour(abort_message="no"))
    await cluster.routable(1)
    status, out, _ = await ended(await start(cluster, "--requests", "2"))
    assert status == 1
    assert "ENGINE_ABORTED" in out


async def test_the_exit_status_is_1_when_nothing_is_served(cluster: FakeCluster) -> None:
    status, out, err = await ended(await start(cluster, "--requests", "2"))
    assert (status, out) == (1, "")
    assert "MODEL_NOT_FOUND" in err


async def test_the_exit_status_is_2_for_flags_that_make_no_sense(cluster: FakeCluster) -> None:
    status, _, err = await ended(await start(cluster, "--rate", "1", "--concurrency", "1"))
    assert status == 2
    assert "--rate" in err


@pytest.mark.parametrize("arguments", [("--rate", "20"), ("--concurrency", "4")])
async def test_ctrl_c_cancels_what_runs_and_still_reports(cluster: FakeCluster, arguments: tuple[str, ...]) -> None:
    _, decode = await cluster.start_pair()
    decode.engine.behaviour.token_seconds = 0.5
    process = await start(cluster, *arguments, "--duration", "60", "--osl", "200")
    await eventually(lambda: live(cluster) > 2, within=20.0, what="requests in the engine")
    process.send_signal(signal.SIGINT)
    status, out, err = await ended(process)
    assert status == 130, err
    assert "interrupted" in out
    await eventually(lambda: live(cluster) == 0, what="engines without requests")
