"""Three etcd members on the loopback address, each of which may be killed and started again, or frozen."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from services.registry.etcd import EtcdClient, EtcdError
from services.registry.local import find_binary
from tests.support import freezing
from tests.support.etcd import etcdctl
from tests.support.ports import free_port
from tests.support.waiting import eventually

MEMBERS = 3


class EtcdCluster:
    """Use it as an async context manager: inside, all members run and agree on a leader."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._client_ports = [free_port() for _ in range(MEMBERS)]
        self._peer_ports = [free_port() for _ in range(MEMBERS)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    @property
    def members(self) -> list[str]:
        """host:port of each member's client side."""
        return [f"127.0.0.1:{port}" for port in self._client_ports]

    @property
    def endpoints(self) -> str:
        """As --etcd-endpoints takes them."""
        return ",".join(self.members)

    async def __aenter__(self) -> Self:
        try:
            for number in range(MEMBERS):
                self.start(number)
            for member in self.members:
                await self.ready(member)
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def start(self, number: int) -> None:
        """With the data that it had, if any."""
        cluster = ",".join(f"m{n}=http://127.0.0.1:{port}" for n, port in enumerate(self._peer_ports))
        client, peer = (f"http://127.0.0.1:{ports[number]}" for ports in (self._client_ports, self._peer_ports))
        command = [
            str(find_binary()),
            f"--name=m{number}",
            f"--data-dir={self._folder / f'm{number}'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster={cluster}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        ]
        with (self._folder / f"m{number}.log").open("ab") as log:
            self._processes[number] = subprocess.Popen(command, stdout=log, stderr=log)

    async def ready(self, member: str) -> None:
        """Waits until the member answers and knows a leader."""

        async def answers() -> bool:
            with contextlib.suppress(EtcdError):
                async with EtcdClient([member], deadline=1.0) as client:
                    return bool((await client.status()).leader) and await client.get("any") is None
            return False

        await eventually(answers, within=30, every=0.1, what=f"etcd member {member}")

    async def kill(self, number: int) -> None:
        """SIGKILL."""
        process = self._processes.pop(number)
        process.kill()
        await asyncio.to_thread(process.wait, 10)

    def freeze(self, number: int) -> None:
        """SIGSTOP."""
        freezing.freeze(self._processes[number].pid)

    def thaw(self, number: int) -> None:
        """SIGCONT."""
        freezing.thaw(self._processes[number].pid)

    async def make_leader(self, number: int) -> None:
        """While all of them run; returns when they know."""

        async def leads() -> bool:
            answers = json.loads(await etcdctl(self.endpoints, "endpoint", "status", "--write-out=json"))
            ids = {answer["Endpoint"]: int(answer["Status"]["header"]["member_id"]) for answer in answers}
            leaders = {int(answer["Status"]["leader"]) for answer in answers}
            wanted = ids[self.members[number]]
            for endpoint, member in ids.items():
                if leaders == {member} and member != wanted:
                    with contextlib.suppress(subprocess.CalledProcessError):  # it may have lost the lead by itself
                        await etcdctl(endpoint, "move-leader", f"{wanted:x}")
            return leaders == {wanted}

        await eventually(leads, within=30, every=0.1, what=f"member {number} leads")

    async def stop(self) -> None:
        for number in list(self._processes):
            await self.kill(number)
