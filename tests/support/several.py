"""A frontend of several processes as real processes, and connections that reach each of them."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from kvbaton.client import Client
from kvbaton.errors import RequestError
from kvbaton.v1 import worker_pb2
from tests.support.processes import Processes
from tests.support.waiting import eventually

# The kernel draws a process for each connection. With two processes all of them are the same one once in 2^39 times.
CONNECTIONS = 40


@contextlib.asynccontextmanager
async def connections(processes: Processes, **options: Any) -> AsyncGenerator[dict[int, list[Client]]]:
    """`CONNECTIONS` clients by the number of the process that each has reached; every process serves a model."""
    for number in (1, 2):
        await reachable(processes, number, **options)
    async with AsyncExitStack() as stack:
        reached: dict[int, list[Client]] = {}

        async def connect() -> None:
            client = await stack.enter_async_context(
                Client(f"127.0.0.1:{processes.grpc_port}", timeout=60, call_timeout=20, **options)
            )

            async def number() -> int:
                with contextlib.suppress(RequestError):
                    status = await client.status()
                    if status.state == worker_pb2.WORKER_STATE_SERVING:
                        return int(status.detail.split()[1])
                return 0

            reached.setdefault(await eventually(number, within=60, every=0.2, what="SERVING"), []).append(client)

        for _ in range(CONNECTIONS):
            await connect()
        yield reached


async def reachable(processes: Processes, number: int, **options: Any) -> None:
    """Waits until new connections can reach that process."""

    async def reached() -> bool:
        async with Client(f"127.0.0.1:{processes.grpc_port}", call_timeout=20, **options) as client:
            with contextlib.suppress(RequestError):
                return (await client.status()).detail.startswith(f"process {number} ")
        return False

    await eventually(reached, within=90, every=0.1, what=f"a connection to process {number}")


async def scrape(processes: Processes) -> dict[str, float]:
    """/metrics over a connection of its own: samples by name and labels, as in the text."""
    async with httpx.AsyncClient(timeout=20) as http:
        text = (await http.get(f"http://127.0.0.1:{processes.http_port}/metrics")).text
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def finished(page: dict[str, float]) -> float:
    """Requests that a page says were answered, whatever the model."""
    return sum(value for name, value in page.items() if re.match(r"kvbaton_requests_total.*finished", name))


def pids(processes: Processes) -> dict[int, int]:
    """Of the processes that serve, by their numbers."""
    return {
        int(child.cmdline()[-3]): child.pid
        for child in psutil.Process(processes.pid("frontend")).children()
        if "services.frontend.processes.child" in child.cmdline()
    }


async def all_gone(processes: dict[int, int], within: float = 30.0) -> None:
    """Waits until none of them runs."""

    def gone() -> bool:
        return not any(psutil.pid_exists(pid) and _runs(pid) for pid in processes.values())

    await eventually(gone, within=within, every=0.1, what="no process left")


def _runs(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


async def ended(processes: Processes, name: str, within: float = 60.0) -> int:
    """The exit status."""
    return await asyncio.to_thread(processes.processes[name].wait, within)


def folders(base: Path) -> list[Path]:
    """What frontends keep in their temporary folder."""
    return list(base.glob("kvbaton-frontend-*"))
