"""Tokens per second through one frontend process against several, and what they cost in CPU time.

    python -m benchmarks.processes [--processes 2] [--concurrency 64] [--osl 64] [--seconds 8] [--rounds 2]

etcd, simulated aggregated workers and the load generator are processes of this machine, on 127.0.0.1: with few cores
they take from the frontend what it could use. The two frontends take turns; compare within one run only. The tokens per
CPU-second of the frontend, all its processes together, don't depend on who else is busy as much.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from kvbaton.client import Client, SamplingParams
from kvbaton.errors import RequestError
from services.registry.local import LocalEtcd

ROOT = Path(__file__).parents[1]
PORT, HTTP_PORT, WORKER_PORT = 50981, 50982, 50991
CONNECTIONS = 16
_COMMAND = (sys.executable, "-m", "services.cli")


@dataclass(frozen=True, slots=True)
class Measured:
    """One frontend under load for a while."""

    tokens_per_second: float
    requests_per_second: float
    tokens_per_cpu_second: float
    share: float
    """Of the busiest process in the frontend's CPU time."""


def start(*arguments: str, etcd: str) -> subprocess.Popen[bytes]:
    """A process of Baton that says warnings only."""
    command = (*_COMMAND, *arguments, "--log-level", "warning", "--etcd-endpoints", etcd)
    return subprocess.Popen(command, cwd=ROOT)


def cpu_seconds(frontend: int) -> list[float]:
    """Of each process that serves."""
    parent = psutil.Process(frontend)
    times = [each.cpu_times() for each in parent.children() or [parent]]
    return [each.user + each.system for each in times]


async def answered(client: Client) -> None:
    """Returns once a request through this connection is answered."""
    while True:
        try:
            await client.generate(token_ids=[1], sampling=SamplingParams(max_new_tokens=1), timeout=5)
        except RequestError:
            await asyncio.sleep(0.2)
        else:
            return


async def measure(processes: int, options: argparse.Namespace, etcd: str) -> Measured:
    """Starts a frontend, keeps `concurrency` requests running through it for `seconds`, stops it."""
    ports = ("--port", str(PORT), "--http-port", str(HTTP_PORT))
    frontend = start("frontend", *ports, "--processes", str(processes), "--max-connection-age", "0", etcd=etcd)
    try:
        async with AsyncExitStack() as stack:
            connect = [Client(f"127.0.0.1:{PORT}", timeout=60) for _ in range(CONNECTIONS)]
            clients = [await stack.enter_async_context(client) for client in connect]
            await asyncio.gather(*map(answered, clients))
            requests = tokens = 0
            over = asyncio.Event()

            async def load(index: int) -> None:
                nonlocal requests, tokens
                sampling = SamplingParams(max_new_tokens=options.osl, temperature=0)
                prompt = list(range(index + 1, index + 65))
                while not over.is_set():
                    async for chunk in clients[index % CONNECTIONS].stream(token_ids=prompt, sampling=sampling):
                        tokens += len(chunk.token_ids)
                    requests += 1

            loads = [asyncio.create_task(load(index)) for index in range(options.concurrency)]
            await asyncio.sleep(1.0)
            cpu, began, requests, tokens = cpu_seconds(frontend.pid), time.monotonic(), 0, 0
            await asyncio.sleep(options.seconds)
            spent = [after - before for after, before in zip(cpu_seconds(frontend.pid), cpu, strict=True)]
            seconds = time.monotonic() - began
            result = Measured(
                tokens / seconds, requests / seconds, tokens / max(sum(spent), 0.01), max(spent) / max(sum(spent), 0.01)
            )
            over.set()
            await asyncio.gather(*loads)
            return result
    finally:
        frontend.terminate()
        await asyncio.to_thread(frontend.wait, 30)


async def compare(options: argparse.Namespace, etcd: str) -> None:
    """Alternates the two and prints the table."""
    measured: dict[int, list[Measured]] = {1: [], options.processes: []}
    for _ in range(options.rounds):
        for processes, results in measured.items():
            results.append(await measure(processes, options, etcd))
    print(
        f"{options.concurrency} requests of {options.osl} tokens at once over {CONNECTIONS} connections,"
        f" {options.rounds} rounds of {options.seconds:g} s, {os.cpu_count()} cores; medians"
    )
    print("processes   tokens/s   requests/s   tokens per CPU-second of the frontend   busiest process")
    for processes, results in measured.items():
        tokens = statistics.median(each.tokens_per_second for each in results)
        requests = statistics.median(each.requests_per_second for each in results)
        per_cpu = statistics.median(each.tokens_per_cpu_second for each in results)
        share = statistics.median(each.share for each in results)
        print(f"{processes:>9} {tokens:>10,.0f} {requests:>12,.1f} {per_cpu:>39,.0f} {share:>16.0%} of its CPU time")
    for what in ("tokens_per_second", "tokens_per_cpu_second"):
        pairs = zip(measured[1], measured[options.processes], strict=True)
        ratios = sorted(getattr(many, what) / getattr(one, what) for one, many in pairs)
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{what.replace('_', ' ')}, {options.processes} processes to one, round by round: {shown}")


async def main() -> None:
    """Starts etcd and the workers, compares, stops them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--osl", type=int, default=64)
    parser.add_argument("--step", type=float, default=0.005, help="seconds of one decode step of the simulated engine")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if options.processes < 2:
        parser.error("--processes must be at least 2: one is what they are compared with")
    with tempfile.TemporaryDirectory() as folder:
        async with LocalEtcd(Path(folder)) as etcd:
            simulated = f"decode_step={options.step},max_running_requests=4096,max_total_tokens=4000000"
            engine = ("--engine", "simulated", "--model-path", "no-model", "--sim", simulated)
            workers = [
                start(
                    *("decode", "--disaggregation-mode", "null", *engine),
                    *("--port", str(WORKER_PORT + 2 * index), "--system-port", str(WORKER_PORT + 2 * index + 1)),
                    etcd=etcd.endpoint,
                )
                for index in range(options.workers)
            ]
            try:
                await compare(options, etcd.endpoint)
            finally:
                for worker in workers:
                    worker.terminate()
                for worker in workers:
                    await asyncio.to_thread(worker.wait, 20)


if __name__ == "__main__":
    asyncio.run(main())
