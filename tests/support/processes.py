"""A frontend and simulated workers as real processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

from kvbaton.client import Client, SamplingParams
from kvbaton.errors import RequestError
from tests.support.ports import free_port
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]


class Processes:
    """A frontend and its workers. `environment` is added to what the test's own process has."""

    def __init__(self, etcd_endpoint: str, logs: Path, environment: Mapping[str, str] | None = None) -> None:
        self.grpc_ports: dict[str, int] = {}
        self.bootstrap_ports: dict[str, int] = {}
        self.http_ports: dict[str, int] = {}
        self.system_endpoints: dict[str, str] = {}
        self.grpc_endpoints: dict[str, str] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.namespace = f"t-{uuid.uuid4().hex[:12]}"
        self._etcd = ("--etcd-endpoints", etcd_endpoint, "--namespace", self.namespace)
        self._logs = logs
        self._commands: dict[str, list[str]] = {}
        self._environment = dict(environment or {})
        self._own_environments: dict[str, dict[str, str]] = {}

    @property
    def grpc_port(self) -> int:
        """Of the first frontend."""
        return next(iter(self.grpc_ports.values()))

    def frontend(self, *arguments: str, name: str = "frontend") -> None:
        port, http_port = self.grpc_ports[name], self.http_ports[name] = free_port(), free_port()
        ports = ("--port", str(port), "--http-port", str(http_port))
        self._start(name, "frontend", *ports, *arguments)

    @property
    def http_port(self) -> int:
        """Of the first frontend."""
        return next(iter(self.http_ports.values()))

    @property
    def target(self) -> str:
        """host:port of the first frontend's gRPC."""
        return f"127.0.0.1:{self.grpc_port}"

    def target_of(self, name: str) -> str:
        """host:port of a frontend's gRPC."""
        return f"127.0.0.1:{self.grpc_ports[name]}"

    @property
    def metrics_endpoints(self) -> dict[str, str]:
        """host:port of every process's /metrics, by its name."""
        frontends = {name: f"127.0.0.1:{port}" for name, port in self.http_ports.items()}
        return {**frontends, **self.system_endpoints}

    def pid(self, name: str) -> int:
        return self.processes[name].pid

    def signal(self, name: str, number: signal.Signals) -> None:
        self.processes[name].send_signal(number)

    def kill(self, name: str) -> None:
        """SIGKILL; returns once the process is gone."""
        self.processes[name].kill()
        self.processes[name].wait(10)

    def terminate(self, name: str, within: float = 60.0) -> int:
        """SIGTERM; the exit status, once the process is gone."""
        self.processes[name].terminate()
        return self.processes[name].wait(within)

    def restart(self, name: str) -> None:
        """Starts what has ended once more, with the same ports and flags; its log goes on."""
        assert self.processes[name].poll() is not None, f"{name} still runs"
        self._launch(name)

    def worker(
        self,
        name: str,
        *arguments: str,
        sim: str = "",
        sglang: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """A worker with a simulated engine, or with SGLang on the CPU for the model in that folder.

        `environment` is its own, beside that of all.
        """
        self._own_environments[name] = dict(environment or {})
        system_port = free_port()
        self.system_endpoints[name] = f"127.0.0.1:{system_port}"
        grpc_port = free_port()
        self.grpc_endpoints[name] = f"127.0.0.1:{grpc_port}"
        ports = ("--port", str(grpc_port), "--system-port", str(system_port))
        bootstrap: tuple[str, ...] = ()
        if "prefill" in arguments:
            self.bootstrap_ports[name] = free_port()
            bootstrap = ("--disaggregation-bootstrap-port", str(self.bootstrap_ports[name]))
        engine = ("--engine", "simulated", "--sim", sim, "--model-path", "no-model")
        if sglang is not None:
            engine = ("--device", "cpu", "--model-path", str(sglang))
        self._start(name, *arguments, *ports, *bootstrap, *engine, "--drain-grace", "0.1")

    def _start(self, name: str, *arguments: str) -> None:
        self._commands[name] = [sys.executable, "-m", "services.cli", *arguments, *self._etcd]
        self._launch(name)

    def _launch(self, name: str) -> None:
        with (self._logs / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self._commands[name],
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | self._environment | self._own_environments.get(name, {}),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def log(self, name: str) -> str:
        return (self._logs / f"{name}.log").read_text()

    def stop(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


async def all_proven(processes: Processes, client: Client, pairs: int) -> None:
    """Waits until so many pairs have proven that they can hand over, which they do for their first requests."""

    async def proven() -> bool:
        sampling = SamplingParams(max_new_tokens=1)
        await asyncio.gather(*(client.generate(token_ids=[1], sampling=sampling, timeout=30) for _ in range(pairs)))
        return processes.log("frontend").count("pair proven") >= pairs

    await eventually(proven, within=60, every=0.1, what=f"{pairs} proven pairs")


async def all_routable(client: Client, count: int, *, within: float = 60.0) -> None:
    """Waits until the frontend can route to `count` workers."""

    async def routable() -> bool:
        with contextlib.suppress(RequestError):
            return sum(worker.routable for worker in (await client.status()).workers) == count
        return False

    await eventually(routable, within=within, every=0.2, what=f"{count} routable workers")


async def answering(client: Client) -> None:
    """Waits until the frontend can place a request."""

    async def once() -> bool:
        with contextlib.suppress(RequestError):
            await client.generate(token_ids=[1], sampling=SamplingParams(max_new_tokens=1), timeout=5)
            return True
        return False

    await eventually(once, within=60, every=0.2, what="an answer")
