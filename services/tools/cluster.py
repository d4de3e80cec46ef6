"""A whole cluster on this machine: started, watched until it can answer, stopped without leftovers.

async with LocalCluster(ClusterOptions(device="cpu")) as cluster:
    async with Client(cluster.grpc_endpoint) as client:
        ...
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import grpc.aio

from kvbaton.client import bearer
from kvbaton.v1 import health_pb2, health_pb2_grpc, worker_pb2
from services.config.errors import ConfigError
from services.models import smollm2
from services.models.store import Manifest, models_root
from services.registry.local import LocalEtcd
from services.tools.options import (
    FRONTEND,
    ClusterOptions,
    ProcessPlan,
    command,
    environment,
    give_ports,
    plan_processes,
)
from services.tools.ports import Ports, reachable_host
from services.tools.progress import Board
from services.tools.supervisor import Child, ChildDiedError, describe_exit, group_members, stop_all
from services.transport import join_host_port, make_channel

_POLL_SECONDS = 0.25
_STATUS_TIMEOUT = 2.0
_ETCD_STOP_SECONDS = 5.0
# What a process says when it lost a port between our choice and its own start (a PortTakenError of any of its servers).
_PORT_LOST = "can't listen on"


class NotReadyError(Exception):
    """The cluster can't answer requests in time; the message says what each process was doing."""


class LocalCluster:
    """etcd, a frontend and the workers. Use it as an async context manager: inside the block it answers requests.

    Belongs to one event loop, in the main thread (on Linux the children end with the thread that started them).
    Clusters that start at the same time share `ports`: a free one is not taken until its process is that far.
    """

    def __init__(self, options: ClusterOptions, board: Board | None = None, ports: Ports | None = None) -> None:
        self.options = options
        self.board = board or Board()
        self.state_dir = options.state_dir or default_state_dir()
        self.plans: dict[str, ProcessPlan] = {}
        self.children: dict[str, Child] = {}
        self.killed: list[str] = []
        self.workers: dict[str, worker_pb2.WorkerRecord] = {}
        self._ports = ports or Ports()
        self._etcd: LocalEtcd | None = None
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._hurry = asyncio.Event()
        self._retried: set[str] = set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def log_dir(self) -> Path:
        """One file per process."""
        return self.state_dir / "logs"

    @property
    def etcd_endpoints(self) -> str:
        """As --etcd-endpoints takes it; known once etcd runs."""
        return self.options.etcd_endpoints or (self._etcd.endpoint if self._etcd is not None else "")

    @property
    def grpc_endpoint(self) -> str:
        """Of the frontend."""
        return self.endpoint(FRONTEND)

    @property
    def http_url(self) -> str:
        """Of the frontend, without a slash at the end."""
        return f"http://{join_host_port(reachable_host(self.options.host), self.plans[FRONTEND].http_port)}"

    def endpoint(self, name: str) -> str:
        """host:port of a process's gRPC services, as this machine reaches them."""
        return join_host_port(self._host(name), self.plans[name].grpc_port)

    def system_url(self, name: str) -> str:
        """Of a worker's system HTTP."""
        return f"http://{join_host_port(self._host(name), self.plans[name].http_port)}"

    async def start(self) -> None:
        """Returns when requests can be answered; stops everything again where that fails.

        Raises ChildDiedError, NotReadyError, ConfigError, EtcdNotFoundError, EtcdStartError, OSError.
        """
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            if not self.options.etcd_endpoints:
                await self._start_etcd()
            await self._fetch_model()
            for plan in plan_processes(self.options, self._ports):
                self.plans[plan.name] = plan
                self._launch(plan)
            await self.wait_ready()
        except BaseException:
            await self.stop()
            raise

    async def wait_ready(self) -> None:
        """Returns when the frontend routes to every worker. Raises ChildDiedError, NotReadyError."""
        try:
            async with asyncio.timeout(self.options.ready_timeout):
                while True:
                    if await self._look():
                        return
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            doing = "\n".join(f"  {row.name}: {row.phase} {row.detail}" for row in self.board.rows.values())
            seconds = self.options.ready_timeout
            raise NotReadyError(
                f"not ready after --ready-timeout {seconds:g} s:\n{doing}\nLogs: {self.log_dir}"
            ) from None

    async def wait_for_death(self) -> Exception:
        """Returns when a process ends that nobody stopped: what to tell the operator."""
        while True:
            for child in self.children.values():
                if child.exit_status() is not None:
                    self.board.set(child.name, "failed", describe_exit(child.exit_status()), done=True)
                    return ChildDiedError(child)
            if self._etcd is not None and (status := self._etcd.exit_code()) is not None:
                return RuntimeError(f"etcd {describe_exit(status)}; its log: {self._etcd.log_file}")
            await asyncio.sleep(_POLL_SECONDS)

    async def restart(self, name: str) -> None:
        """Starts a process again at its address, after stopping it if it runs. Doesn't wait until it is ready."""
        child = self.children[name]
        await child.stop(self.options.stop_timeout)
        child.start()
        self.board.set(name, "starting", self._where(name), restart=True)

    def hurry(self) -> None:
        """Whatever `stop` waits for, it waits no longer."""
        self._hurry.set()

    async def stop(self) -> None:
        """Frontend first, so that its requests can end while the workers live; then they; then etcd. Idempotent."""
        frontend = [child for name, child in self.children.items() if name == FRONTEND]
        others = [child for name, child in self.children.items() if name != FRONTEND]
        for stage in (frontend, others):
            for child in stage:
                if child.running:
                    self.board.set(child.name, "stopping", restart=True)
            killed = await stop_all(stage, self.options.stop_timeout, self._hurry)
            self.killed += killed
            for child in stage:
                if self.board.phase(child.name) != "failed":
                    how = "killed" if child.name in killed else "stopped"
                    self.board.set(child.name, how, describe_exit(child.exit_status()), done=True)
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
        if self._etcd is not None:
            etcd, self._etcd = self._etcd, None
            await etcd.stop(_ETCD_STOP_SECONDS)
            await asyncio.to_thread(shutil.rmtree, self.state_dir / "etcd" / "data", ignore_errors=True)
            self.board.set("etcd", "stopped", done=True)

    def leftovers(self) -> list[str]:
        """Processes that are still there after `stop`, in words; empty when all is well. Ports go with processes."""
        return [
            f"{child.name}: process {member}" for child in self.children.values() for member in group_members(child.pid)
        ]

    async def _start_etcd(self) -> None:
        self.board.set("etcd", "starting")
        folder = self.state_dir / "etcd"
        # In another terminal's cluster the usual port is taken; our own children must not get etcd's either.
        self._etcd = LocalEtcd(folder)
        await self._etcd.start()
        link = self.log_dir / "etcd.log"
        if not link.is_symlink():
            link.symlink_to(Path("..") / "etcd" / self._etcd.log_file.name)
        self.board.set("etcd", "serving", f"{self._etcd.endpoint}, pid {self._etcd.pid}", done=True)

    async def _fetch_model(self) -> None:
        """The known small model is converted once, before two workers wait for it."""
        folder = models_root() / smollm2.NAME
        if self.options.model_path != smollm2.NAME:
            return
        manifest = await asyncio.to_thread(Manifest.read, folder)
        if manifest is not None and not manifest.defects(folder, full=False):
            return
        fetch = Child(
            "model",
            [sys.executable, "-P", "-m", "services.cli", "model", "fetch", smollm2.NAME],
            self.log_dir / "model.log",
            environment(ProcessPlan("model", None, 0), self.options, os.environ),
        )
        fetch.start()
        self.children["model"] = fetch
        while fetch.running:
            self.board.set("model", "fetching", "".join(fetch.log_tail(1)))
            await asyncio.sleep(_POLL_SECONDS)
        if fetch.exit_status() != 0:
            raise ChildDiedError(fetch)
        del self.children["model"]
        self.board.set("model", "ready", str(folder), done=True)

    def _launch(self, plan: ProcessPlan) -> None:
        child = Child(
            plan.name,
            command(plan, self.options, self.etcd_endpoints),
            self.log_dir / f"{plan.name}.log",
            environment(plan, self.options, os.environ),
        )
        child.start()
        self.children[plan.name] = child
        self.board.set(plan.name, "starting", self._where(plan.name))

    async def _look(self) -> bool:
        """One look at every process: deaths, states, the frontend's opinion. True when all are ready."""
        for child in list(self.children.values()):
            if child.exit_status() is not None:
                self._after_death(child)
        names = list(self.plans)
        answers = dict(zip(names, await asyncio.gather(*map(self._status, names)), strict=True))
        frontend = answers.pop(FRONTEND)
        known = {worker.record.incarnation.uuid: worker for worker in frontend.workers} if frontend is not None else {}
        routable = [self._show_worker(name, status, known) for name, status in answers.items()]
        serving = frontend is not None and frontend.state == worker_pb2.WORKER_STATE_SERVING
        phase = "serving" if serving else ("starting" if frontend is None else "waiting for workers")
        self.board.set(FRONTEND, phase, self._where(FRONTEND), done=serving)
        return serving and all(routable)

    def _show_worker(
        self, name: str, status: health_pb2.StatusResponse | None, known: dict[str, health_pb2.KnownWorker]
    ) -> bool:
        """Puts one worker on the board; True when requests can be routed to it."""
        if status is None:
            self.board.set(name, "starting", self._where(name))
            return False
        state = worker_pb2.WorkerState.Name(status.state).removeprefix("WORKER_STATE_").lower()
        seen = known.get(status.incarnation.uuid)
        if status.state != worker_pb2.WORKER_STATE_SERVING or seen is None:
            self.board.set(name, state, status.detail or self._where(name))
            return False
        self.workers[name] = seen.record
        self.board.set(
            name,
            "routable" if seen.routable else "registered",
            self._where(name) if seen.routable else seen.reason,
            done=seen.routable,
        )
        return seen.routable

    def _after_death(self, child: Child) -> None:
        """A second try, with other ports, where somebody else was faster. Raises ChildDiedError otherwise."""
        lost_port = any(_PORT_LOST in line for line in child.log_tail())
        if not lost_port or child.name in self._retried:
            self.board.set(child.name, "failed", describe_exit(child.exit_status()), done=True)
            raise ChildDiedError(child)
        self._retried.add(child.name)
        plan = self.plans[child.name]
        give_ports(plan, self.options, self._ports)
        self._launch(plan)

    async def _status(self, name: str) -> health_pb2.StatusResponse | None:
        target = self.endpoint(name)
        if target not in self._channels:
            self._channels[target] = make_channel(target)
        metadata = bearer(self.options.api_key) if name == FRONTEND else ()
        try:
            stub = health_pb2_grpc.HealthServiceStub(self._channels[target])
            return await stub.Status(health_pb2.StatusRequest(), timeout=_STATUS_TIMEOUT, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise ConfigError(f"--api-key: the frontend says: {error.details()}") from error
            return None

    def _host(self, name: str) -> str:
        return reachable_host(self.options.host if name == FRONTEND else self.options.worker_host)

    def _where(self, name: str) -> str:
        return f"gRPC {self.endpoint(name)}, pid {self.children[name].pid}"


def default_state_dir() -> Path:
    """A new folder's name under $XDG_STATE_HOME/kvbaton, ~/.local/state/kvbaton by default."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path(base) / "kvbaton" / f"up-{stamp}-{os.getpid()}"
