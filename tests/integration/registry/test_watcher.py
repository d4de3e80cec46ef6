"""What a frontend can rely on: it sees every worker, whatever etcd does, and tells leaving from vanishing."""

import asyncio

import pytest
from structlog.testing import capture_logs

from kvbaton.v1.worker_pb2 import WORKER_STATE_DRAINING
from services.registry.etcd import EtcdClient, Listing
from services.registry.watcher import RegistrySynced, WorkerPut, WorkerUnregistered, WorkerWithdrawn

pytestmark = pytest.mark.integration


async def test_workers_there_before_and_after_the_list_are_both_seen(harness) -> None:
    async with harness.worker(harness.record("before")), harness.frontend() as frontend:
        assert frontend.names() == {"before"}
        async with harness.worker(harness.record("after")):
            await harness.until(lambda: frontend.names() == {"before", "after"})
        assert [event.key.instance_id for event in frontend.of(WorkerPut)] == ["before", "after"]


async def test_draining_then_delete_is_a_withdrawal(harness) -> None:
    async with harness.frontend() as frontend, harness.worker(harness.record()) as worker:
        await worker.publisher.withdraw()
        await worker.publisher.delete()
        await harness.until(lambda: frontend.of(WorkerWithdrawn))
        states = [event.record.state for event in frontend.of(WorkerPut)]
        assert states == [worker.record.state, WORKER_STATE_DRAINING]
        assert not frontend.of(WorkerUnregistered)


async def test_an_expired_lease_is_not_a_withdrawal(harness, ttl) -> None:
    async with harness.frontend() as frontend, EtcdClient([harness.etcd.endpoint]) as client:
        async with harness.worker(harness.record()) as worker:
            key, held = worker.key, await client.get(worker.key.path)
            assert held is not None
            await worker.publisher.close()
            await worker.client.close()  # as a frozen worker: nothing is renewed, nothing revoked
            await harness.until(lambda: frontend.of(WorkerUnregistered), within=3 * ttl)
        assert frontend.of(WorkerUnregistered) == [WorkerUnregistered(key, worker.record)]
        assert not frontend.of(WorkerWithdrawn)
        assert not frontend.names()


async def test_a_restarted_worker_shows_its_new_incarnation_under_the_same_key(harness) -> None:
    async with (
        harness.frontend() as frontend,
        harness.worker(harness.record(created_us=1000)),
        harness.worker(harness.record(created_us=2000)) as newer,
    ):
        await harness.until(lambda: len(frontend.of(WorkerPut)) == 2)
        assert frontend.of(WorkerPut)[1] == WorkerPut(newer.key, newer.record)
        assert not frontend.of(WorkerUnregistered)


async def test_namespaces_do_not_see_each_other(harness) -> None:
    async with harness.frontend() as frontend, harness.worker(harness.record("mine")):
        other = "/kvbaton/v1/test2/workers/prefill/other"
        await harness.etcdctl("put", other, "{}")
        await harness.until(lambda: frontend.names() == {"mine"})
        assert len(frontend.of(WorkerPut)) == 1


class ForgetfulClient(EtcdClient):
    """Between the first list and its watch, things happen and etcd compacts them away."""

    def __init__(self, endpoint: str, meanwhile) -> None:
        super().__init__([endpoint])
        self._meanwhile = meanwhile
        self.lists = 0

    async def list_prefix(self, prefix: str, *, deadline: float | None = None) -> Listing:
        listing = await super().list_prefix(prefix, deadline=deadline)
        self.lists += 1
        if self.lists == 1:
            await self._meanwhile()
        return listing


@pytest.mark.peers(5)
async def test_events_lost_to_compaction_are_recovered_by_a_new_list(harness) -> None:
    async with harness.worker(harness.record("leaves")) as leaves, harness.worker(harness.record("comes")) as comes:
        await comes.publisher.delete()

        async def meanwhile() -> None:
            await leaves.publisher.delete()
            await comes.publisher.publish(comes.record)
            revision = (await comes.client.status()).revision
            await harness.etcdctl("compaction", str(revision))

        async with ForgetfulClient(harness.etcd.endpoint, meanwhile) as client, harness.frontend(client) as frontend:
            await harness.until(lambda: frontend.names() == {"comes"})
            assert client.lists == 2
            assert [event.key.instance_id for event in frontend.of(WorkerUnregistered)] == ["leaves"]


async def test_a_compaction_under_an_open_watch_loses_nothing(harness) -> None:
    async with harness.frontend() as frontend, harness.worker(harness.record("a")) as a:
        await harness.etcdctl("compaction", str((await a.client.status()).revision))
        async with harness.worker(harness.record("b")):
            await harness.until(lambda: frontend.names() == {"a", "b"})


@pytest.mark.peers(5)
@pytest.mark.parametrize("with_data", [True, False])
async def test_no_worker_is_lost_when_etcd_is_killed_and_restarted(harness, ttl, with_data: bool) -> None:
    with capture_logs() as logs:
        async with (
            harness.frontend() as frontend,
            harness.worker(harness.record("a", 1)) as a,
            harness.worker(harness.record("b", 2)) as b,
        ):
            await harness.until(lambda: frontend.names() == {"a", "b"})
            await harness.etcd.kill()
            await harness.until(lambda: any(line["event"] == "registry_lost" for line in logs))
            assert frontend.names() == {"a", "b"}
            synced = len(frontend.of(RegistrySynced))
            await harness.restart(with_data=with_data)
            await harness.until(lambda: len(frontend.of(RegistrySynced)) > synced)
            await harness.until(lambda: frontend.names() == {"a", "b"}, within=3 * ttl)
            assert dict(frontend.watcher.workers) == {a.key: a.record, b.key: b.record}
            assert not frontend.of(WorkerWithdrawn)
            if with_data:
                assert not frontend.of(WorkerUnregistered)
            else:
                gone = {event.key.instance_id for event in frontend.of(WorkerUnregistered)}
                assert gone <= {"a", "b"}
    for change in ("registry_lost", "registry_regained"):
        assert sum(line["event"] == change for line in logs) == 1


async def test_after_a_data_loss_the_absent_are_unregistered_not_withdrawn(harness) -> None:
    async with harness.frontend() as frontend:
        async with harness.worker(harness.record("gone")) as worker:
            await harness.until(lambda: frontend.names() == {"gone"})
            await harness.etcd.kill()
            await worker.publisher.close()
            await worker.keeper.close(deadline=0.1)
        await harness.restart(with_data=False)
        await harness.until(lambda: not frontend.names())
        assert [event.key.instance_id for event in frontend.of(WorkerUnregistered)] == ["gone"]
        assert not frontend.of(WorkerWithdrawn)
        # The watch follows the new store, though its revisions are far behind the old one's.
        async with harness.worker(harness.record("new")):
            await harness.until(lambda: frontend.names() == {"new"})


@pytest.mark.peers(5)
async def test_a_freeze_longer_than_the_leases_loses_no_worker_and_leaves_no_ghost(harness, ttl) -> None:
    async with harness.frontend() as frontend, harness.worker(harness.record("stays")) as stays:
        async with harness.worker(harness.record("dies")) as dies:
            await harness.until(lambda: frontend.names() == {"stays", "dies"})
            harness.freeze()
            await dies.publisher.close()
            await dies.keeper.close(deadline=0.1)
        await asyncio.sleep(2 * ttl)  # the freeze itself
        assert frontend.names() == {"stays", "dies"}
        harness.thaw()
        await harness.until(lambda: frontend.names() == {"stays"}, within=3 * ttl)
        await harness.until(lambda: stays.keeper.state().alive, within=3 * ttl)
        await asyncio.sleep(ttl)  # past the last instant at which an old lease could take the record along
        assert frontend.names() == {"stays"}
        assert not frontend.of(WorkerWithdrawn)


async def test_a_frozen_etcd_is_noticed_and_shows_in_the_synced_age(harness) -> None:
    with capture_logs() as logs:
        async with harness.frontend(silence_deadline=1.5) as frontend, harness.worker(harness.record()):
            await harness.until(lambda: frontend.names() == {"prefill-0"})
            harness.freeze()
            await harness.until(lambda: any(line["event"] == "registry_lost" for line in logs), within=3 * 1.5)
            age = frontend.watcher.last_synced_age()
            assert age is not None
            assert age > 1.0
            harness.thaw()
            await harness.until(lambda: (frontend.watcher.last_synced_age() or 0) < 0.5)
            await harness.until(lambda: any(line["event"] == "registry_regained" for line in logs))


async def test_an_idle_registry_stays_synced_without_reconnecting(harness) -> None:
    async with harness.frontend() as frontend:
        for _ in range(25):
            age = frontend.watcher.last_synced_age()
            assert age is not None
            assert age < 3 * 0.5
            await asyncio.sleep(0.1)
        assert len(frontend.of(RegistrySynced)) == 1


async def test_the_list_is_audited_without_a_gap(harness) -> None:
    async with harness.frontend(audit_interval=0.1) as frontend:
        for n in range(5):
            async with harness.worker(harness.record(f"w{n}")) as worker:
                await harness.until(lambda name=f"w{n}": frontend.names() == {name})
                await worker.publisher.withdraw()
                await worker.publisher.delete()
            await harness.until(lambda: not frontend.names())
        assert len(frontend.of(WorkerWithdrawn)) + len(frontend.of(WorkerUnregistered)) == 5


async def test_a_corrupt_value_is_logged_once_and_harms_nobody(harness) -> None:
    path = "/kvbaton/v1/test/workers/prefill/broken"
    with capture_logs() as logs:
        async with harness.frontend(audit_interval=0.1) as frontend, harness.worker(harness.record("fine")) as fine:
            await harness.etcdctl("put", path, "{not json")
            await harness.etcdctl("put", "/kvbaton/v1/test/workers/strange", "x")
            lists = len(frontend.of(RegistrySynced))
            await harness.until(lambda: len(frontend.of(RegistrySynced)) > lists + 10)
            assert frontend.names() == {"fine"}
            # A known worker whose value turns unreadable keeps its last readable record.
            await fine.publisher.close()
            await harness.etcdctl("put", fine.key.path, "{not json")
            await harness.until(lambda: any(line.get("key") == fine.key.path for line in corrupt(logs)))
            assert frontend.watcher.workers[fine.key] == fine.record
    assert [line["key"] for line in corrupt(logs)].count(path) == 1


def corrupt(logs) -> list[dict[str, str]]:
    return [line for line in logs if line["event"] == "record_corrupt"]
