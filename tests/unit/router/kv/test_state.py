"""A worker's messages: applied in order, and doubted as soon as they can't be what the worker holds."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvbaton.v1 import kv_events_pb2, worker_pb2
from services.frontend.router.kv.index import Holder, KvIndex
from services.frontend.router.kv.state import DoubtError, NoHashesError, WorkerPages

LIFE = worker_pb2.Incarnation(created_us=1, uuid="a")
W0, W1 = Holder("w", 0), Holder("w", 1)
Message = kv_events_pb2.SubscribeResponse


def opened(sequence: int, *, resumed: bool = False, life: worker_pb2.Incarnation = LIFE, size: int = 16) -> Message:
    content = kv_events_pb2.KvOpened(incarnation=life, resumed=resumed, dp_size=2, page_size=1, hashed_page_size=size)
    return Message(sequence=sequence, opened=content)


def snapshot(sequence: int, rank: int, hashes: Sequence[int] = (), *, last: bool = True) -> Message:
    chunk = kv_events_pb2.KvSnapshotChunk(stored=[kv_events_pb2.KvStored(prefix_hashes=hashes)], last=last)
    return Message(sequence=sequence, dp_rank=rank, snapshot=chunk)


def stored(sequence: int, rank: int, *hashes: int) -> Message:
    return Message(sequence=sequence, dp_rank=rank, stored=kv_events_pb2.KvStored(prefix_hashes=hashes))


def removed(sequence: int, rank: int, *hashes: int) -> Message:
    return Message(sequence=sequence, dp_rank=rank, removed=kv_events_pb2.KvRemoved(prefix_hashes=hashes))


def cleared(sequence: int, rank: int) -> Message:
    return Message(sequence=sequence, dp_rank=rank, cleared=kv_events_pb2.KvCleared())


def gathered(last: int, *messages: Message) -> Message:
    changes = kv_events_pb2.KvChanges()
    for each in messages:
        change = changes.changes.add(dp_rank=each.dp_rank)
        kind = each.WhichOneof("content")
        assert kind is not None
        getattr(change, kind).CopyFrom(getattr(each, kind))
    return Message(sequence=last, changes=changes)


def following(index: KvIndex | None = None) -> WorkerPages:
    """After a snapshot at 5: rank 0 has 1 and 2, rank 1 nothing."""
    pages = WorkerPages(index if index is not None else KvIndex(), "w", LIFE)
    pages.next_request()
    for message in (opened(5), snapshot(5, 0, [1], last=False), snapshot(5, 0, [2]), snapshot(5, 1)):
        assert not pages.exact
        pages.take(message)
    assert pages.exact
    return pages


def test_a_snapshot_and_the_changes_after_it() -> None:
    index = KvIndex()
    pages = following(index)
    assert index.pages() == {W0: {1, 2}}
    pages.take(stored(6, 1, 1, 9))
    pages.take(removed(7, 0, 2))
    pages.take(stored(8, 0))
    assert index.pages() == {W0: {1}, W1: {1, 9}}
    pages.take(gathered(11, stored(9, 0, 3), cleared(10, 1), stored(11, 1, 4)))
    assert index.pages() == {W0: {1, 3}, W1: {4}}
    assert (pages.exact, pages.sequence, pages.hashed_page_size) == (True, 11, 16)


def test_it_asks_for_a_snapshot_first_and_goes_on_where_a_stream_broke() -> None:
    index = KvIndex()
    assert not WorkerPages(index, "w", LIFE).next_request().HasField("after_sequence")
    pages = following(index)
    pages.broken()
    assert not pages.exact
    assert index.pages() == {W0: {1, 2}}, "kept for a worker that comes back"
    request = pages.next_request()
    assert (request.after_sequence, request.incarnation, request.hashes_only) == (5, LIFE, True)
    pages.take(opened(5, resumed=True))
    assert pages.exact
    pages.take(stored(6, 0, 3))
    assert index.pages() == {W0: {1, 2, 3}}


def test_a_worker_that_no_longer_holds_what_was_missed_sends_a_snapshot() -> None:
    index = KvIndex()
    pages = following(index)
    pages.next_request()
    for message in (opened(50), snapshot(50, 1, [8]), snapshot(50, 0)):
        pages.take(message)
    assert index.pages() == {W1: {8}}
    assert (pages.exact, pages.sequence) == (True, 50)


def test_half_a_snapshot_is_nothing_to_go_on_from() -> None:
    index = KvIndex()
    pages = WorkerPages(index, "w", LIFE)
    pages.next_request()
    pages.take(opened(5))
    pages.take(snapshot(5, 0, [1]))
    assert not pages.next_request().HasField("after_sequence")
    assert index.pages() == {}


@pytest.mark.parametrize(
    "message",
    [
        stored(7, 0, 3),  # a gap
        stored(5, 0, 3),  # a repeat
        gathered(8, stored(7, 0, 3), stored(8, 0, 4)),
        gathered(6, stored(5, 0, 3), stored(6, 0, 4)),
        stored(6, 2, 3),  # no such rank
        removed(6, 0, 3),  # never was there
        removed(6, 1, 1),
        snapshot(5, 0, [3]),  # not asked for
        opened(5),
        Message(sequence=6),  # of a kind that this version doesn't know
        Message(sequence=6, changes=kv_events_pb2.KvChanges(changes=[kv_events_pb2.KvChange()])),
    ],
)
def test_what_makes_no_sense_is_doubted(message: Message) -> None:
    with pytest.raises(DoubtError):
        following().take(message)


@pytest.mark.parametrize(
    "messages",
    [
        [stored(6, 0, 1)],
        [opened(5, resumed=True)],
        [opened(5, life=worker_pb2.Incarnation(created_us=2, uuid="b"))],
        [opened(5), stored(6, 0, 1)],
        [opened(5), snapshot(6, 0)],
        [opened(5), snapshot(5, 2)],
        [opened(5), snapshot(5, 0), snapshot(5, 0)],
    ],
)
def test_a_stream_that_begins_wrongly_is_doubted(messages: list[Message]) -> None:
    pages = WorkerPages(KvIndex(), "w", LIFE)
    pages.next_request()
    *fine, wrong = messages
    for message in fine:
        pages.take(message)
    with pytest.raises(DoubtError):
        pages.take(wrong)
    assert not pages.exact


def test_resuming_elsewhere_than_asked_is_doubted() -> None:
    pages = following()
    pages.next_request()
    with pytest.raises(DoubtError):
        pages.take(opened(4, resumed=True))


def test_after_a_doubt_there_is_a_snapshot() -> None:
    index = KvIndex()
    pages = following(index)
    pages.forget("doubt")
    assert index.pages() == {}
    assert not pages.next_request().HasField("after_sequence")


def test_a_worker_without_prefix_hashes_says_so_by_leaving_them_out() -> None:
    pages = WorkerPages(KvIndex(), "w", LIFE)
    pages.next_request()
    with pytest.raises(NoHashesError):
        pages.take(opened(5, size=0))


def test_a_full_index_is_no_reason_for_doubt() -> None:
    index = KvIndex(10)
    pages = following(index)
    pages.take(stored(6, 0, *range(100, 150)))
    assert index.evicted
    pages.take(removed(7, 0, *range(100, 150), 1, 2))
    assert index.pages() == {}
    assert pages.exact


def test_what_was_assumed_gives_way_to_what_is_known() -> None:
    index = KvIndex()
    index.routed(W0, [1, 2, 3])
    following(index)
    assert index.pages() == {W0: {1, 2}}
