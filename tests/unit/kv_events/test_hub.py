"""Numbers without gaps, snapshots exact for theirs, resumption while it lasts, and no waiting for the slow."""

from __future__ import annotations

import asyncio

import pytest

from services.worker.engines.kv_events import AllBlocksCleared, BlockStored, KvChange
from services.worker.kv_events.hub import KvEventHub, NumberedChange, Subscription, SubscriptionEndedError
from services.worker.kv_events.wire import snapshot_messages


def page(name: int, rank: int = 0) -> KvChange:
    return KvChange(rank, BlockStored([name], None, [name, name], 2))


def hub(*, kept: int = 100, queued: int = 100, ranks: int = 2) -> KvEventHub:
    made = KvEventHub("aggregated", kept=kept, queued=queued)
    made.open(ranks, 2)
    return made


async def take(subscription: Subscription, count: int) -> list[NumberedChange]:
    taken: list[NumberedChange] = []
    async with asyncio.timeout(1):
        async for change in subscription.changes():
            taken.append(change)
            if len(taken) == count:
                break
    return taken


async def test_a_snapshot_and_the_changes_after_it_leave_nothing_out() -> None:
    events = hub()
    for name in range(3):
        events.apply(page(name, name % 2))
    subscription = events.subscribe(None)
    events.apply(page(7, 1))
    assert subscription.sequence == 3
    assert subscription.blocks is not None
    assert [[block.block_hash for block in rank] for rank in subscription.blocks] == [[0, 2], [1]]
    assert [(change.sequence, change.dp_rank) for change in await take(subscription, 1)] == [(4, 1)]


async def test_what_changes_nothing_has_no_number() -> None:
    events = hub()
    events.apply(page(1))
    events.apply(page(1))
    events.apply(KvChange(1, AllBlocksCleared()))
    assert events.sequence == 1


async def test_resuming_gets_what_was_missed_and_then_the_rest() -> None:
    events = hub()
    for name in range(5):
        events.apply(page(name))
    subscription = events.subscribe(2)
    events.apply(page(5))
    assert subscription.blocks is None
    assert [change.sequence for change in await take(subscription, 4)] == [3, 4, 5, 6]
    assert events.subscribe(6).blocks is None, "nothing missed is resumed too"


@pytest.mark.parametrize("after", [0, 1, 2, 11])
async def test_what_is_no_longer_held_or_never_was_is_a_snapshot(after: int) -> None:
    events = hub(kept=3)
    for name in range(6):
        events.apply(page(name))
    assert events.subscribe(after).blocks is not None
    assert events.subscribe(3).blocks is None


async def test_a_slow_subscriber_is_cut_off_alone() -> None:
    events = hub(queued=2)
    slow, quick = events.subscribe(None), events.subscribe(None)
    for name in range(3):
        events.apply(page(name))
        assert [change.sequence for change in await take(quick, 1)] == [name + 1]
    with pytest.raises(SubscriptionEndedError, match="slow"):
        await take(slow, 1)
    assert await take(events.subscribe(1), 2), "it can go on where it was"


async def test_a_long_absence_is_not_slowness() -> None:
    events = hub(queued=2)
    for name in range(10):
        events.apply(page(name))
    assert len(await take(events.subscribe(0), 10)) == 10


async def test_closing_ends_every_subscription() -> None:
    events = hub()
    subscription = events.subscribe(None)
    events.close()
    with pytest.raises(SubscriptionEndedError, match="closed"):
        await take(subscription, 1)


async def test_a_rank_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="dp rank 2 of 2"):
        hub().apply(page(1, rank=2))


async def test_a_large_snapshot_comes_in_pieces_and_an_empty_rank_in_one() -> None:
    events = hub()
    for name in range(10):
        events.apply(page(name))
    blocks = events.subscribe(None).blocks
    assert blocks is not None
    messages = list(snapshot_messages(10, blocks, pages_per_chunk=4))
    assert [(each.dp_rank, each.snapshot.last) for each in messages] == [(0, False), (0, False), (0, True), (1, True)]
    assert sum(len(stored.block_hashes) for each in messages for stored in each.snapshot.stored) == 10
