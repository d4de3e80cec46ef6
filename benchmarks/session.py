"""Tokens per CPU-second that the frontend spends on its link to a worker: one stream per leg against one session.

    python -m benchmarks.session [--concurrency 64] [--osl 256] [--rounds 3]

The worker is a real process with the simulated engine. This process is the frontend's side of the link, without the
client's side: no detokenizing, no gRPC to a client. The two links take turns; what counts is this process's CPU time.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from kvbaton.v1 import generate_pb2, health_pb2, health_pb2_grpc, worker_pb2
from services.frontend.link.protocol import Credit, LegEvent, LegFailed, LegFinished, LegTokens, WorkerLink
from services.frontend.link.session import SessionLink
from services.frontend.link.streams import StreamLink
from services.registry.local import LocalEtcd
from services.transport import make_channel

ROOT = Path(__file__).parents[1]
PORT, SYSTEM_PORT = 50971, 50972


async def wait_serving() -> worker_pb2.Incarnation:
    """The worker's incarnation, once it serves."""
    async with make_channel(f"127.0.0.1:{PORT}") as channel:
        stub = health_pb2_grpc.HealthServiceStub(channel)
        while True:
            status = await stub.Status(health_pb2.StatusRequest(), wait_for_ready=True, timeout=30)
            if status.state == worker_pb2.WORKER_STATE_SERVING:
                return status.incarnation
            await asyncio.sleep(0.1)


async def run(link: WorkerLink, concurrency: int, osl: int) -> tuple[int, float]:
    """Tokens received and CPU seconds spent for `concurrency` legs at once."""
    tokens = 0
    left = concurrency
    done = asyncio.Event()

    def sink(event: LegEvent) -> None:
        nonlocal tokens, left
        if isinstance(event, LegFailed):
            raise event.error
        if isinstance(event, LegTokens | LegFinished):
            tokens += len(event.token_ids)
        if isinstance(event, LegFinished):
            left -= 1
            if not left:
                done.set()

    link.ask(concurrency)
    credits: list[Credit] = []
    while len(credits) < concurrency:
        while (credit := link.take()) is not None:
            credits.append(credit)
        await asyncio.sleep(0.01)
    started = time.process_time()
    for number in range(concurrency):
        request = generate_pb2.GenerateRequest(
            request_id=uuid.uuid4().hex,
            token_ids=generate_pb2.TokenIds(ids=range(number + 1, number + 33)),
            sampling=generate_pb2.SamplingParams(max_new_tokens=osl, temperature=0),
        )
        link.submit(request, sink, credits[number], {})
    await asyncio.wait_for(done.wait(), 300)
    return tokens, time.process_time() - started


async def compare(concurrency: int, osl: int, rounds: int) -> None:
    """Alternates the two links and prints the table."""
    incarnation = await wait_serving()
    rates: dict[str, list[float]] = {"streams": [], "session": []}
    for _ in range(rounds):
        for name, measured in rates.items():
            channel = make_channel(f"127.0.0.1:{PORT}")
            link: WorkerLink
            if name == "streams":
                link = StreamLink(channel, worker="w", leg="aggregated", total_timeout=300)
            else:
                link = SessionLink(
                    channel,
                    incarnation,
                    worker="w",
                    leg="aggregated",
                    heartbeat=0.25,
                    changed=lambda: None,
                    credits_came=lambda: None,
                )
            while not link.healthy:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            tokens, seconds = await run(link, concurrency, osl)
            measured.append(tokens / seconds)
            await link.close()
    print(f"{concurrency} legs of {osl} tokens at once, {rounds} rounds, median (lowest to highest)")
    for name, measured in rates.items():
        low, middle, high = min(measured), statistics.median(measured), max(measured)
        print(f"  {name:<8} {middle:>10,.0f} tokens per CPU-second ({low:,.0f} to {high:,.0f})")
    ratios = [b / a for a, b in zip(rates["streams"], rates["session"], strict=True)]
    print(f"  ratio    {statistics.median(ratios):>10.1f} ({min(ratios):.1f} to {max(ratios):.1f}), round by round")


async def main() -> None:
    """Starts etcd and the worker, compares, stops them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--osl", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", type=float, default=0.01, help="seconds of one decode step of the simulated engine")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        async with LocalEtcd(Path(folder)) as etcd:
            worker = subprocess.Popen(  # noqa: ASYNC220 - before anything is measured
                [
                    *(sys.executable, "-m", "services.cli", "decode", "--disaggregation-mode", "null"),
                    *("--engine", "simulated", "--model-path", "no-model", "--log-level", "warning"),
                    *("--sim", f"decode_step={options.step},max_running_requests=4096,max_total_tokens=4000000"),
                    *("--port", str(PORT), "--system-port", str(SYSTEM_PORT), "--etcd-endpoints", etcd.endpoint),
                ],
                cwd=ROOT,
            )
            try:
                await compare(options.concurrency, options.osl, options.rounds)
            finally:
                worker.terminate()
                worker.wait(20)


if __name__ == "__main__":
    asyncio.run(main())
