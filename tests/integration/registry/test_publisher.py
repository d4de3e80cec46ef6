"""What a worker can rely on: its record stays as it wants it, and an older process never overwrites a newer one."""

import asyncio
import json
import time

import pytest

from kvbaton.v1.worker_pb2 import WORKER_ROLE_PREFILL, WORKER_STATE_DRAINING, WORKER_STATE_WARMING
from services.registry.lookup import find_worker, list_workers
from services.registry.publisher import NewerIncarnationError
from services.registry.records import RecordError

pytestmark = pytest.mark.integration

NAMESPACE = "test"


async def test_a_record_is_readable_with_etcdctl(harness) -> None:
    async with harness.worker(harness.record()):
        printed = await harness.etcdctl("get", "--prefix", "/kvbaton")
    key, value = printed.splitlines()
    assert key == "/kvbaton/v1/test/workers/prefill/prefill-0"
    assert json.loads(value)["state"] == "WORKER_STATE_SERVING"


async def test_lookup_finds_one_worker_or_all(harness) -> None:
    async with harness.worker(harness.record("a")) as worker, harness.worker(harness.record("b")):
        assert await find_worker(worker.client, NAMESPACE, WORKER_ROLE_PREFILL, "a") == worker.record
        assert await find_worker(worker.client, NAMESPACE, WORKER_ROLE_PREFILL, "c") is None
        assert [record.instance_id for record in await list_workers(worker.client, NAMESPACE)] == ["a", "b"]


async def test_the_record_outlives_many_lease_times_while_the_worker_lives(harness, ttl) -> None:
    async with harness.worker(harness.record()) as worker:
        deadline = time.monotonic() + 2 * ttl
        while time.monotonic() < deadline:
            assert await worker.client.get(worker.key.path) is not None
            assert worker.keeper.state().alive
            await asyncio.sleep(0.1)


async def test_a_lost_lease_is_replaced_and_the_record_put_again(harness, ttl) -> None:
    async with harness.worker(harness.record()) as worker:
        lost = await worker.keeper.lease()
        await harness.etcdctl("lease", "revoke", f"{lost:x}")
        assert await worker.client.get(worker.key.path) is None

        async def back() -> bool:
            held = await worker.client.get(worker.key.path)
            return held is not None and held.lease != lost

        await harness.until_async(back, within=3 * ttl / 3)
        assert await worker.keeper.lease() != lost
        assert worker.keeper.state().alive


async def test_a_record_deleted_by_someone_is_put_again(harness, ttl) -> None:
    async with harness.worker(harness.record()) as worker:
        await harness.etcdctl("del", worker.key.path)
        await harness.until_async(lambda: worker.client.get(worker.key.path), within=3 * ttl)


async def test_an_older_process_does_not_overwrite_a_newer_one(harness) -> None:
    async with (
        harness.worker(harness.record(created_us=2000)) as newer,
        harness.worker(harness.record(created_us=1000), publish=False) as older,
    ):
        with pytest.raises(NewerIncarnationError) as refusal:
            await older.publisher.publish(older.record)
        assert refusal.value.newer == newer.record
        assert await older.publisher.withdraw()
        assert await older.publisher.delete()
        assert await find_worker(newer.client, NAMESPACE, WORKER_ROLE_PREFILL, "prefill-0") == newer.record


async def test_a_newer_process_takes_the_key_and_the_older_one_learns_it(harness, ttl) -> None:
    async with (
        harness.worker(harness.record(created_us=1000)) as older,
        harness.worker(harness.record(created_us=2000)) as newer,
    ):
        async with asyncio.timeout(3 * ttl):
            assert (await older.publisher.superseded()).newer == newer.record
        with pytest.raises(NewerIncarnationError):
            await older.publisher.update(older.record)
        await older.publisher.close()
        await older.keeper.close()  # revokes the older lease, which no longer holds the key
        assert await find_worker(newer.client, NAMESPACE, WORKER_ROLE_PREFILL, "prefill-0") == newer.record


async def test_the_newest_of_many_racing_processes_wins(harness) -> None:
    workers = [harness.worker(harness.record(created_us=1000 + n), publish=False) for n in range(6)]
    opened = [await worker.__aenter__() for worker in workers]
    outcomes = await asyncio.gather(
        *(worker.publisher.publish(worker.record) for worker in opened), return_exceptions=True
    )
    assert outcomes[-1] is True
    assert all(outcome is True or isinstance(outcome, NewerIncarnationError) for outcome in outcomes)
    held = await find_worker(opened[0].client, NAMESPACE, WORKER_ROLE_PREFILL, "prefill-0")
    assert held == opened[-1].record
    for worker in workers:
        await worker.__aexit__(None, None, None)


async def test_update_changes_state_but_never_identity(harness) -> None:
    async with harness.worker(harness.record()) as worker:
        changed = harness.record()
        changed.state = WORKER_STATE_WARMING
        assert await worker.publisher.update(changed)
        held = await find_worker(worker.client, NAMESPACE, WORKER_ROLE_PREFILL, "prefill-0")
        assert held is not None
        assert held.state == WORKER_STATE_WARMING
        with pytest.raises(RecordError):
            await worker.publisher.update(harness.record(created_us=3000))


async def test_withdraw_writes_draining_and_delete_removes_it_and_both_may_be_repeated(harness) -> None:
    async with harness.worker(harness.record()) as worker:
        for _ in range(2):
            assert await worker.publisher.withdraw()
            held = await find_worker(worker.client, NAMESPACE, WORKER_ROLE_PREFILL, "prefill-0")
            assert held is not None
            assert held.state == WORKER_STATE_DRAINING
        for _ in range(2):
            assert await worker.publisher.delete()
            assert await worker.client.get(worker.key.path) is None


async def test_a_late_update_does_not_undo_a_withdrawal(harness) -> None:
    async with harness.worker(harness.record()) as worker:
        await worker.publisher.withdraw()
        assert await worker.publisher.update(worker.record)
        held = await find_worker(worker.client, NAMESPACE, WORKER_ROLE_PREFILL, "prefill-0")
        assert held is not None
        assert held.state == WORKER_STATE_DRAINING


async def test_a_refused_process_may_try_again_once_the_newer_one_is_gone(harness) -> None:
    async with harness.worker(harness.record(created_us=1000), publish=False) as older:
        async with harness.worker(harness.record(created_us=2000)):
            with pytest.raises(NewerIncarnationError):
                await older.publisher.publish(older.record)
        assert await older.publisher.publish(older.record)


async def test_a_corrupt_value_under_the_workers_key_is_overwritten(harness) -> None:
    await harness.etcdctl("put", "/kvbaton/v1/test/workers/prefill/prefill-0", "{not json")
    async with harness.worker(harness.record()) as worker:
        assert await find_worker(worker.client, NAMESPACE, WORKER_ROLE_PREFILL, "prefill-0") == worker.record


@pytest.mark.parametrize("death", ["kill", "freeze"])
async def test_a_dead_etcd_never_blocks_a_shutdown(harness, death: str) -> None:
    async with harness.worker(harness.record()) as worker:
        if death == "kill":
            await harness.etcd.kill()
        else:
            harness.freeze()
        started = time.monotonic()
        assert not await worker.publisher.withdraw(deadline=0.5)
        assert not await worker.publisher.delete(deadline=0.5)
        await worker.publisher.close()
        await worker.keeper.close(deadline=0.5)
        assert time.monotonic() - started < 3 * 1.5


async def test_a_worker_that_starts_before_etcd_registers_when_etcd_comes(harness) -> None:
    await harness.etcd.kill()
    async with harness.worker(harness.record(), publish=False) as worker:
        assert not await worker.publisher.publish(worker.record, deadline=0.3)
        assert not worker.keeper.state().alive
        await harness.restart(with_data=True)
        await harness.until_async(lambda: worker.client.get(worker.key.path))
        assert worker.keeper.state().alive
