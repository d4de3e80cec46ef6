"""A cluster to break: two prefill and two decode workers behind relays, frontends, an etcd of its own."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from kvbaton.client import Client
from kvbaton.errors import RequestError
from services.registry.local import LocalEtcd
from tests.support import freezing
from tests.support.ports import free_port
from tests.support.processes import Processes, all_routable
from tests.support.relay import RELAYED_HOST, Relay
from tests.support.simulator import Simulator
from tests.support.waiting import eventually

# SGLang needs a second or two for the pages of a killed prefill's transfer, and up to 5 s to take a prefill for
# dead. The simulated one knows both earlier, so that what is seen here is the time that Baton takes.
_DECODE = "release_on_disconnect=true,reconnect=true,heartbeat_interval=0.4,heartbeat_timeout=0.4,heartbeat_failures=2"
_PREFILL = "prefix_cache=false"


class FaultCluster:
    """Use it as an async context manager. Everything is started once; what a fault has ended is started again."""

    def __init__(
        self,
        folder: Path,
        *,
        prefills: int = 2,
        decodes: int = 2,
        prefill: str = "",
        decode: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`prefill` and `decode` are further options of the engines."""
        self.etcd = LocalEtcd(folder / "etcd", port=free_port())
        self.prefills = [f"prefill{number}" for number in range(prefills)]
        self.decodes = [f"decode{number}" for number in range(decodes)]
        self.relays: dict[str, list[Relay]] = {}
        """Of each worker's gRPC; of a prefill worker behind it those of its bootstrap server and its data socket."""
        self.frozen: set[str] = set()
        self._folder = folder
        self._engines = {"prefill": f"{_PREFILL},{prefill}", "decode": f"{_DECODE},{decode}"}
        self._environment = {"XDG_CACHE_HOME": str(folder / "cache"), **(environment or {})}
        self._frontends: dict[str, list[str]] = {"frontend": []}
        self._stack = contextlib.AsyncExitStack()
        self.processes: Processes

    def also_frontend(self, name: str, *arguments: str) -> None:
        """One more, before the start."""
        self._frontends[name] = list(arguments)

    @property
    def workers(self) -> list[str]:
        return [*self.prefills, *self.decodes]

    async def __aenter__(self) -> Self:
        await self.etcd.start()
        self._stack.push_async_callback(self.etcd.stop)
        self.processes = Processes(self.etcd.endpoint, self._folder, self._environment)
        self._stack.push_async_callback(asyncio.to_thread, self.processes.stop)
        for name, arguments in self._frontends.items():
            self.processes.frontend("--heartbeat", "0.5", "--log-format", "json", *arguments, name=name)
        for name in self.workers:
            await self._start_worker(name)
        self.clients = {
            name: await self._stack.enter_async_context(Client(self.processes.target_of(name), timeout=60))
            for name in self._frontends
        }
        self.simulators = {
            name: await self._stack.enter_async_context(Simulator(self.processes.system_endpoints[name]))
            for name in self.workers
        }
        await self.whole()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _start_worker(self, name: str) -> None:
        role = name.rstrip("0123456789")
        data_port = free_port()
        sim = self._engines[role] + (f",data_port={data_port}" if role == "prefill" else "")
        self.processes.worker(name, role, "--advertise-host", RELAYED_HOST, sim=sim)
        ports = [int(self.processes.grpc_endpoints[name].rpartition(":")[2])]
        if role == "prefill":
            ports += [self.processes.bootstrap_ports[name], data_port]
        self.relays[name] = [Relay(port) for port in ports]
        for relay in self.relays[name]:
            await relay.listen()
            self._stack.callback(relay.close)

    def session_relay(self, worker: str) -> Relay:
        """Between it and every frontend."""
        return self.relays[worker][0]

    def kv_relays(self, prefill: str) -> list[Relay]:
        """Between it and every decode worker."""
        return self.relays[prefill][1:]

    async def kill(self, name: str) -> None:
        """SIGKILL to a worker or a frontend."""
        self.processes.signal(name, signal.SIGKILL)
        for relay in self.relays.get(name, []):
            relay.refuse()
        await asyncio.to_thread(self.processes.kill, name)

    async def restart(self, name: str) -> None:
        """What was killed, at the same address."""
        self.processes.restart(name)
        for relay in self.relays.get(name, []):
            await relay.listen()

    def freeze(self, name: str) -> None:
        """SIGSTOP."""
        self.frozen.add(name)
        freezing.freeze(self.processes.processes[name].pid)

    def thaw(self, name: str) -> None:
        """SIGCONT."""
        freezing.thaw(self.processes.processes[name].pid)
        self.frozen.discard(name)

    def freeze_etcd(self) -> None:
        """SIGSTOP."""
        freezing.freeze(self.etcd.pid)

    def thaw_etcd(self) -> None:
        """SIGCONT."""
        freezing.thaw(self.etcd.pid)

    async def state(self, name: str) -> dict[str, Any]:
        """What the one rank of a worker holds; its `hold` beside it."""
        state = await self.simulators[name].state()
        return state["ranks"][0] | {"hold": state["hold"]}

    async def total(self, what: str, workers: Iterable[str] | None = None) -> int:
        """A number of the ranks' state, summed over workers."""
        states = await asyncio.gather(*(self.state(name) for name in workers or self.workers))
        return sum(state[what] for state in states)

    async def release(self, workers: Iterable[str] | None = None) -> None:
        """Whatever is held goes on; of workers that are frozen or gone nothing is asked."""
        for name in workers or self.workers:
            if name not in self.frozen:
                with contextlib.suppress(httpx.HTTPError):
                    await self.simulators[name].release()

    async def whole(self, *, within: float = 60.0) -> None:
        """Waits until every frontend can route to every worker."""
        await asyncio.gather(
            *(all_routable(client, len(self.workers), within=within) for client in self.clients.values())
        )

    async def routable(self) -> set[str]:
        """The workers that the first frontend can route to now; none if it doesn't say."""
        try:
            status = await self.clients["frontend"].status()
        except RequestError:
            return set()
        endpoints = {worker.record.grpc_endpoint.rpartition(":")[2] for worker in status.workers if worker.routable}
        return {name for name in self.workers if self.processes.grpc_endpoints[name].rpartition(":")[2] in endpoints}

    async def at_rest(self, *, within: float = 45.0) -> None:
        """Waits until no engine has a request or a page for one."""

        async def nothing_held() -> bool:
            return not await self.total("live") and not await self.total("holding")

        await eventually(nothing_held, within=within, every=0.05, what="no leg and no page held")
