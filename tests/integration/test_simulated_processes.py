"""`kvbaton prefill|decode --engine simulated` and a frontend, as processes, answering through gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from kvbaton.client import Client, SamplingParams
from kvbaton.errors import RequestError
from kvbaton.v1 import worker_pb2
from services.requests import Sampling
from services.worker.engines.simulated.oracle import expected_tokens
from tests.support.ports import free_port
from tests.support.simulator import Simulator
from tests.support.waiting import eventually

PROMPT = list(range(100, 160))
ROOT = Path(__file__).parents[2]


class Processes:
    """A frontend and its workers."""

    def __init__(self, etcd_endpoint: str, logs: Path) -> None:
        self.grpc_port = free_port()
        self.system_endpoints: dict[str, str] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._etcd = ("--etcd-endpoints", etcd_endpoint, "--namespace", f"t-{uuid.uuid4().hex[:12]}")
        self._logs = logs

    def frontend(self) -> None:
        self._start("frontend", "frontend", "--port", str(self.grpc_port), "--http-port", str(free_port()))

    def worker(self, name: str, *arguments: str, sim: str = "") -> None:
        system_port = free_port()
        self.system_endpoints[name] = f"127.0.0.1:{system_port}"
        ports = ("--port", str(free_port()), "--system-port", str(system_port))
        bootstrap = ("--disaggregation-bootstrap-port", str(free_port()))
        engine = ("--engine", "simulated", "--sim", sim, "--model-path", "no-model", "--drain-grace", "0.1")
        self._start(name, *arguments, *ports, *bootstrap, *engine)

    def _start(self, name: str, *arguments: str) -> None:
        with (self._logs / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "services.cli", *arguments, *self._etcd],
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def log(self, name: str) -> str:
        return (self._logs / f"{name}.log").read_text()

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest_asyncio.fixture
async def processes(etcd_endpoint: str, tmp_path: Path) -> AsyncIterator[Processes]:
    processes = Processes(etcd_endpoint, tmp_path)
    processes.frontend()
    try:
        yield processes
    finally:
        await asyncio.to_thread(processes.stop)


async def answering(client: Client) -> None:
    """Waits until the frontend can place a request."""

    async def once() -> bool:
        with contextlib.suppress(RequestError):
            await client.generate(token_ids=[1], sampling=SamplingParams(max_new_tokens=1), timeout=5)
            return True
        return False

    await eventually(once, within=60, every=0.2, what="an answer")


async def test_a_pair_answers_as_the_oracle_does(processes: Processes) -> None:
    processes.worker("prefill", "prefill", sim="dp_size=2")
    processes.worker("decode", "decode", sim="dp_size=2,decode_step=0.001")
    async with Client(f"127.0.0.1:{processes.grpc_port}", timeout=20) as client:
        await answering(client)

        async def one(index: int) -> None:
            prompt = [*PROMPT, index]
            answer = await client.generate(
                token_ids=prompt, sampling=SamplingParams(max_new_tokens=40, temperature=0.7, seed=index)
            )
            sampling = Sampling(max_new_tokens=40, temperature=0.7, seed=index)
            assert answer.token_ids == expected_tokens(prompt, sampling)

        await asyncio.gather(*(one(index) for index in range(64)))

        async with Simulator(processes.system_endpoints["decode"]) as decode:
            state = await decode.state()
            assert sum(rank["requests"] for rank in state["ranks"]) >= 64
            with pytest.raises(ValueError, match="do: 'dance'"):
                await decode.command("dance")
            await decode.abort_chunk(count=8, after_tokens=2)
            with pytest.raises(RequestError, match="simulated abort"):
                await client.generate(token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=20, temperature=0))
            await decode.clear()
            answer = await client.generate(token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=20, temperature=0))
            assert answer.token_ids == expected_tokens(PROMPT, Sampling(max_new_tokens=20, temperature=0.0))

            await decode.kill_scheduler()
            status = await asyncio.to_thread(processes.processes["decode"].wait, 20)
            assert status == 1, processes.log("decode")
        async with Simulator(processes.system_endpoints["prefill"]) as prefill:
            await prefill.kill_process()
            assert await asyncio.to_thread(processes.processes["prefill"].wait, 20) == -9


async def test_the_aggregated_worker_answers_alike(processes: Processes) -> None:
    processes.worker("worker", "decode", "--disaggregation-mode", "null", "--page-size", "8")
    async with Client(f"127.0.0.1:{processes.grpc_port}", timeout=20) as client:
        await answering(client)
        answer = await client.generate(token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=30, temperature=0))
        assert answer.token_ids == expected_tokens(PROMPT, Sampling(max_new_tokens=30, temperature=0.0))
        info = await client.status()
        assert info.state == worker_pb2.WORKER_STATE_SERVING


async def test_bad_options_end_the_worker_with_their_name(processes: Processes) -> None:
    processes.worker("decode", "decode", sim="speed=3")
    assert await asyncio.to_thread(processes.processes["decode"].wait, 60) == 1
    assert "there is no 'speed'" in processes.log("decode")
