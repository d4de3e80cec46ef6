"""Whatever etcd does, no request fails, no worker is lost, and none is left that is gone.

PEERS' "etcd" and invariant 2 of the design: real etcd processes, a frontend and workers of their own, and requests all
the time, each compared with the oracle. In each outage a worker dies and another one starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from kvbaton.client import Client
from kvbaton.errors import RequestError
from kvbaton.v1 import health_pb2
from services.registry.etcd import EtcdClient, EtcdError
from services.registry.local import LocalEtcd
from services.registry.lookup import list_workers
from tests.support.etcd import etcdctl
from tests.support.etcd_cluster import EtcdCluster
from tests.support.freezing import freeze, thaw
from tests.support.ports import free_port
from tests.support.processes import Processes, all_proven, all_routable
from tests.support.traffic import steady
from tests.support.waiting import eventually

LEASE = 2.0
DEATHS = 2
PER_SECOND = 20
# Until leases have run out, and workers have put their records again; and as much again for a busy machine.
SETTLED_WITHIN = 15 * LEASE
STAYING = ("prefill", "decode")
# It takes no requests, so that its death is etcd's affair alone.
DOOMED = "embedding"
LATE = "late-decode"


class Cluster:
    """The processes around one etcd, or several members."""

    def __init__(self, processes: Processes, endpoints: str) -> None:
        self.processes = processes
        self._endpoints = endpoints.split(",")
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        assert self._client is not None
        return self._client

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        self.processes.frontend("--heartbeat", "2")
        for name in STAYING:
            self.start(name, name)
        self.start(DOOMED, "decode", "--embedding-worker")
        async with Client(self.processes.target) as self._client:
            await all_routable(self.client, 3)
            await all_proven(self.processes, self.client, 1)
            yield

    def start(self, name: str, *arguments: str) -> None:
        self.processes.worker(name, *arguments, "--lease-ttl", f"{LEASE:g}")

    async def kill_one_and_start_one(self) -> None:
        """What nobody can tell etcd of."""
        await asyncio.to_thread(self.processes.kill, DOOMED)
        self.start(LATE, "decode")
        await eventually(self._serves_by_itself, within=60, every=0.1, what="the late worker's start")

    async def _serves_by_itself(self) -> bool:
        async with httpx.AsyncClient() as http:
            with contextlib.suppress(httpx.HTTPError):
                return (await http.get(f"http://{self.processes.system_endpoints[LATE]}/health")).status_code == 200
        return False

    async def status(self) -> health_pb2.StatusResponse:
        return await self.client.status()

    async def followed(self) -> bool:
        """Whether the frontend hears etcd."""
        view = (await self.status()).registry
        return not view.problem and view.age.ToNanoseconds() < LEASE * 1e9

    async def settled(self, *names: str) -> None:
        """Waits until etcd and the frontend have exactly these workers."""
        living = {self.processes.grpc_endpoints[name] for name in names}
        ids: set[str] = set()

        async def equal() -> bool:
            with contextlib.suppress(EtcdError, RequestError):
                async with EtcdClient(self._endpoints, deadline=3.0) as etcd:
                    records = await list_workers(etcd, self.processes.namespace)
                known = (await self.status()).workers
                ids.update(worker.record.instance_id for worker in known if worker.record.grpc_endpoint in living)
                routable = {worker.record.grpc_endpoint for worker in known if worker.routable}
                registered = {worker.record.grpc_endpoint for worker in known if worker.registered}
                return {record.grpc_endpoint for record in records} == routable == registered == living
            return False

        await eventually(equal, within=SETTLED_WITHIN, every=0.1, what=f"exactly {', '.join(names)}")
        await eventually(self.followed, within=SETTLED_WITHIN, every=0.1, what="a view that is up to date")
        assert not ids & self.told_of("worker gone"), "what etcd forgets is unregistered, not gone"

    def followed_endpoint(self) -> str:
        """Where the frontend's watch is: with the first member until that has failed."""
        moves = re.findall(r"registry_regained +endpoint=(\S+)", self.processes.log("frontend"))
        return moves[-1] if moves else self._endpoints[0]

    async def moved_from(self, endpoint: str) -> None:
        """Waits until the frontend follows another member."""
        await eventually(
            lambda: self.followed_endpoint() != endpoint,
            within=SETTLED_WITHIN,
            what=f"the frontend goes from {endpoint} to another member",
        )

    def told_of(self, event: str) -> set[str]:
        """The workers of which the frontend has logged it."""
        return set(re.findall(rf"{event} .*\bworker=(\S+)", self.processes.log("frontend")))

    def changes(self, name: str = "frontend") -> list[str]:
        """The log lines of one process about etcd, in order."""
        return re.findall(
            r"registry_lost|registry_regained|lease_renewal_failing|lease_renewal_regained", self.processes.log(name)
        )


def told_once(changes: list[str]) -> bool:
    """Whether there is a line for each loss of etcd and each return, in turn, none for a retry, and etcd is back.

    A busy machine may lose it more often than the test lets it.
    """
    lost, found = changes[::2], changes[1::2]
    return (
        len(lost) == len(found)
        and set(lost) <= {"registry_lost", "lease_renewal_failing"}
        and set(found) <= {"registry_regained", "lease_renewal_regained"}
    )


@contextlib.asynccontextmanager
async def around(endpoints: str, folder: Path) -> AsyncGenerator[Cluster]:
    processes = Processes(endpoints, folder, {"XDG_CACHE_HOME": str(folder / "cache")})
    cluster = Cluster(processes, endpoints)
    try:
        async with cluster.running():
            yield cluster
    finally:
        await asyncio.to_thread(processes.stop)


@pytest_asyncio.fixture
async def etcd(tmp_path: Path) -> AsyncIterator[LocalEtcd]:
    async with LocalEtcd(tmp_path / "etcd", port=free_port()) as etcd:
        yield etcd


@pytest_asyncio.fixture
async def cluster(etcd: LocalEtcd, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with around(etcd.endpoint, tmp_path) as cluster:
        yield cluster


@pytest.mark.peers(5)
async def test_frozen_for_three_lease_times(cluster: Cluster, etcd: LocalEtcd) -> None:
    async with steady(cluster.client, PER_SECOND):
        freeze(etcd.pid)
        thawing = asyncio.get_running_loop().time() + 3 * LEASE
        await cluster.kill_one_and_start_one()
        await asyncio.sleep(max(0.0, thawing - asyncio.get_running_loop().time()))
        assert (await cluster.status()).registry.age.ToNanoseconds() > 2 * LEASE * 1e9, "the view's age is shown"
        thaw(etcd.pid)
        await cluster.settled(*STAYING, LATE)
    # The frontend may not have missed it.
    assert told_once(cluster.changes())


@pytest.mark.parametrize("with_data", [True, False], ids=["with-data", "without-data"])
@pytest.mark.peers(5)
async def test_killed_and_restarted(cluster: Cluster, etcd: LocalEtcd, tmp_path: Path, with_data: bool) -> None:
    async with steady(cluster.client, PER_SECOND):
        before = {name: len(cluster.changes(name)) for name in STAYING}
        await etcd.kill()

        async def said() -> bool:
            return etcd.endpoint in (await cluster.status()).registry.problem

        await eventually(said, within=30, what="the frontend says that etcd is unreachable")
        await cluster.kill_one_and_start_one()
        for name in STAYING:  # an outage between two renewals of its lease is none to a worker
            await eventually(
                lambda name=name: cluster.changes(name)[before[name] :],
                within=30,
                what=f"{name} tells that it lost etcd",
            )
        port = int(etcd.endpoint.rpartition(":")[2])
        async with LocalEtcd(tmp_path / ("etcd" if with_data else "fresh"), port=port):
            await cluster.settled(*STAYING, LATE)
            assert cluster.changes(), "the frontend tells that it lost etcd"
            assert told_once(cluster.changes()), "a line a change, not one a retry"
            for name in STAYING:
                await eventually(
                    lambda name=name: told_once(cluster.changes(name)[before[name] :]),
                    within=30,
                    what=f"{name} tells that it found etcd again",
                )


@pytest.mark.peers(5)
async def test_every_lease_revoked(cluster: Cluster, etcd: LocalEtcd) -> None:
    """The frontend hears of it before any worker does, and goes on with all of them."""
    async with steady(cluster.client, PER_SECOND):
        for lease in (await etcdctl(etcd.endpoint, "lease", "list")).split()[3:]:
            with contextlib.suppress(subprocess.CalledProcessError):  # it may have run out by itself
                await etcdctl(etcd.endpoint, "lease", "revoke", lease)
        await eventually(
            lambda: len(cluster.told_of("worker unregistered")) == len(STAYING) + 1,
            what="the frontend has seen every record go",
        )
        await cluster.settled(*STAYING, DOOMED)
    assert told_once(cluster.changes())


@pytest.mark.peers(5)
async def test_compacted_while_workers_come_and_go(cluster: Cluster, etcd: LocalEtcd) -> None:
    async def compact() -> None:
        async with EtcdClient([etcd.endpoint]) as client:
            await etcdctl(etcd.endpoint, "compaction", str((await client.status()).revision))

    async with steady(cluster.client, PER_SECOND):
        await compact()
        await cluster.kill_one_and_start_one()
        await compact()
        await etcdctl(etcd.endpoint, "defrag")
        await cluster.settled(*STAYING, LATE)


@pytest.mark.peers(5)
async def test_of_three_members_the_one_that_the_frontend_follows_is_killed(tmp_path: Path) -> None:
    async with EtcdCluster(tmp_path) as members, around(members.endpoints, tmp_path) as cluster:
        async with steady(cluster.client, PER_SECOND):
            for death in range(DEATHS):
                followed = cluster.followed_endpoint()
                number = members.members.index(followed)
                await members.kill(number)
                if not death:
                    await cluster.kill_one_and_start_one()
                await cluster.moved_from(followed)
                # Two of three are enough.
                await cluster.settled(*STAYING, LATE)
                members.start(number)
                await members.ready(followed)
        assert told_once(cluster.changes())


@pytest.mark.parametrize("leads", [True, False], ids=["leader", "follower"])
@pytest.mark.peers(5)
async def test_of_three_members_the_one_that_all_are_connected_to_is_frozen(tmp_path: Path, leads: bool) -> None:
    async with EtcdCluster(tmp_path) as members, around(members.endpoints, tmp_path) as cluster:
        followed = cluster.followed_endpoint()
        number = members.members.index(followed)
        await members.make_leader(number if leads else (number + 1) % len(members.members))
        async with steady(cluster.client, PER_SECOND):
            members.freeze(number)
            thawing = asyncio.get_running_loop().time() + 3 * LEASE
            await cluster.kill_one_and_start_one()
            await cluster.moved_from(followed)
            # Two of three are enough.
            await cluster.settled(*STAYING, LATE)
            await asyncio.sleep(max(0.0, thawing - asyncio.get_running_loop().time()))
            members.thaw(number)
            await members.ready(followed)
            await cluster.settled(*STAYING, LATE)
        assert told_once(cluster.changes())
