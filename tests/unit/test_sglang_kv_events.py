"""SGLang's KV events off real ZMQ sockets: in order, gaps filled from replay, what is lost said and flushed."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import zmq
import zmq.asyncio

from services.worker.engines import sglang_kv_events
from services.worker.engines.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, CacheKind, KvChange
from services.worker.engines.sglang_kv_events import SglangKvEvents, decode_batch
from services.worker.engines.sglang_launch import KvSockets
from tests.support.waiting import eventually


def stored(name: int) -> dict[str, Any]:
    return {"type": "BlockStored", "block_hashes": [name], "token_ids": [name, name], "block_size": 2}


def expected(name: int, dp_rank: int = 0) -> KvChange:
    return KvChange(dp_rank, BlockStored([name], None, [name, name], 2))


class Publisher:
    """One rank's publisher as SGLang has it; it can lose what it publishes, and what it keeps for replay."""

    def __init__(self, context: zmq.asyncio.Context, sockets: KvSockets, dp_rank: int) -> None:
        self._published = context.socket(zmq.PUB)
        self._published.bind(sockets.events(dp_rank))
        self._replay = context.socket(zmq.ROUTER)
        self._replay.bind(sockets.replay(dp_rank))
        self.kept: list[tuple[int, bytes]] = []
        self.sequence = 0
        self.replays = 0
        self.task = asyncio.create_task(self._serve())

    async def publish(self, *events: Any, sent: bool = True) -> None:
        payload = msgspec.msgpack.encode([0.0, events, 0])
        self.kept.append((self.sequence, payload))
        if sent:
            await self._published.send_multipart([b"", self.sequence.to_bytes(8, "big"), payload])
        self.sequence += 1

    async def _serve(self) -> None:
        while True:
            client, _, first = await self._replay.recv_multipart()
            self.replays += 1
            for sequence, payload in self.kept:
                if sequence >= int.from_bytes(first, "big"):
                    await self._replay.send_multipart([client, b"", b"", sequence.to_bytes(8, "big"), payload])
            await self._replay.send_multipart([client, b"", b"", (-1).to_bytes(8, "big", signed=True), b""])

    def close(self) -> None:
        self.task.cancel()
        self._published.close(linger=0)
        self._replay.close(linger=0)


class Reader:
    """What comes out, and how often the cache was to be flushed."""

    def __init__(self, sockets: KvSockets, dp_size: int) -> None:
        self.changes: list[KvChange] = []
        self.flushes = 0
        self.busy = False
        self._events = SglangKvEvents(sockets, dp_size, self._flush)
        self.task = asyncio.create_task(self._read())

    async def _flush(self) -> bool:
        self.flushes += 1
        return not self.busy

    async def _read(self) -> None:
        async for change in self._events.changes():
            self.changes.append(change)


@pytest.fixture
def sockets() -> Iterator[KvSockets]:
    with tempfile.TemporaryDirectory(prefix="kv-", dir="/tmp") as folder:  # socket paths are short
        yield KvSockets(Path(folder))


@pytest_asyncio.fixture
async def publishers(sockets: KvSockets) -> AsyncIterator[list[Publisher]]:
    with zmq.asyncio.Context() as context:
        made = [Publisher(context, sockets, rank) for rank in range(2)]
        yield made
        for each in made:
            each.close()


@pytest_asyncio.fixture
async def reader(
    sockets: KvSockets, publishers: list[Publisher], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Reader]:
    monkeypatch.setattr(sglang_kv_events, "_FLUSH_RETRY_S", 0.02)
    monkeypatch.setattr(sglang_kv_events, "_REPLAY_TIMEOUT_S", 0.5)
    await publishers[0].publish(stored(0))
    reader = Reader(sockets, 2)
    await eventually(lambda: reader.changes)
    # Subscribed for good: ZMQ loses what is published before.
    probes = 0
    while len(reader.changes) < publishers[0].sequence:
        probes += 1
        await publishers[0].publish(stored(probes))
        await asyncio.sleep(0.05)
    yield reader
    reader.task.cancel()
    await asyncio.gather(reader.task, return_exceptions=True)


async def test_what_came_before_the_subscription_is_there(reader: Reader) -> None:
    assert reader.changes[0] == expected(0)


async def test_ranks_have_numbers_of_their_own(reader: Reader, publishers: list[Publisher]) -> None:
    await publishers[1].publish(stored(50))
    await publishers[1].publish(stored(51))
    await eventually(lambda: expected(51, 1) in reader.changes)
    assert [change for change in reader.changes if change.dp_rank == 1] == [expected(50, 1), expected(51, 1)]


async def test_a_gap_is_filled_in_order_and_nothing_comes_twice(reader: Reader, publishers: list[Publisher]) -> None:
    had = len(reader.changes)
    for name in range(100, 105):
        await publishers[0].publish(stored(name), sent=name in (100, 104))
    await eventually(lambda: expected(104) in reader.changes)
    assert reader.changes[had:] == [expected(name) for name in range(100, 105)]
    assert reader.flushes == 0


async def test_what_replay_has_forgotten_clears_the_rank_and_flushes_when_it_can(
    reader: Reader, publishers: list[Publisher]
) -> None:
    had, reader.busy = len(reader.changes), True
    await publishers[0].publish(stored(200), sent=False)
    await publishers[0].publish(stored(201), sent=False)
    publishers[0].kept = publishers[0].kept[-1:]
    await publishers[0].publish(stored(202))
    await eventually(lambda: expected(202) in reader.changes)
    assert reader.changes[had:] == [KvChange(0, AllBlocksCleared()), expected(201), expected(202)]
    await eventually(lambda: reader.flushes > 2)
    reader.busy = False
    flushes = reader.flushes
    await asyncio.sleep(0.2)
    assert reader.flushes <= flushes + 1, "once it could, not again"


async def test_a_replay_that_does_not_answer_is_a_loss_and_no_hang(reader: Reader, publishers: list[Publisher]) -> None:
    had = len(reader.changes)
    publishers[0].task.cancel()
    await publishers[0].publish(stored(300), sent=False)
    await publishers[0].publish(stored(301))
    await eventually(lambda: expected(301) in reader.changes)
    assert reader.changes[had:] == [KvChange(0, AllBlocksCleared()), expected(301)]


async def test_nonsense_ends_the_stream_with_an_error(reader: Reader, publishers: list[Publisher]) -> None:
    await publishers[0].publish({"type": "Dance"})
    with pytest.raises(ValueError, match="Dance"):
        await asyncio.wait_for(reader.task, 5)


def test_both_versions_events_are_understood() -> None:
    newer = [
        0.0,
        [
            {"type": "BlockStored", "block_hashes": [-5], "parent_block_hash": 3, "token_ids": [1], "block_size": 1}
            | {"lora_id": 2, "session_id": "x", "medium": "GPU"},
            {"type": "BlockRemoved", "block_hashes": [-5]},
            {"type": "AllBlocksCleared"},
        ],
        0,
    ]
    older = [0.0, [["BlockStored", [-5], 3, [1], 1, 2], ["BlockRemoved", [-5]], ["AllBlocksCleared"]]]
    for batch in (newer, older):
        assert decode_batch(msgspec.msgpack.encode(batch)) == [
            BlockStored([-5], 3, [1], 1, CacheKind(lora_id=2)),
            BlockRemoved([-5]),
            AllBlocksCleared(),
        ]


def test_adapter_and_salt_of_a_page_are_kept_apart() -> None:
    event = stored(1) | {"lora_id": None, "lora_name": "law", "cache_salt": "tenant"}
    assert decode_batch(msgspec.msgpack.encode([0.0, [event]])) == [
        BlockStored([1], None, [1, 1], 2, CacheKind(None, "law", "tenant"))
    ]


def test_pages_of_pairs_are_pages_of_their_first_tokens() -> None:
    event = stored(1) | {"token_ids": [(5, 6), (6, 7)]}
    assert decode_batch(msgspec.msgpack.encode([0.0, [event]])) == [BlockStored([1], None, [5, 6], 2)]


def test_pages_outside_the_device_are_not_ours() -> None:
    events = [stored(1) | {"medium": "CPU_PINNED"}, {"type": "BlockRemoved", "block_hashes": [1], "medium": "DISK"}]
    assert decode_batch(msgspec.msgpack.encode([0.0, events])) == []
    older = [["BlockStored", [1], None, [1], 1, None, "CPU_PINNED"], ["BlockRemoved", [1], "CPU_PINNED"]]
    assert decode_batch(msgspec.msgpack.encode([0.0, older])) == []
    assert decode_batch(msgspec.msgpack.encode([0.0, [["BlockRemoved", [1], "GPU"]]])) == [BlockRemoved([1])]


@pytest.mark.parametrize("payload", [b"", b"\xc1", msgspec.msgpack.encode({}), msgspec.msgpack.encode([0.0, [[9]]])])
def test_what_is_no_batch_is_an_error(payload: bytes) -> None:
    with pytest.raises(ValueError, match="KV events"):
        decode_batch(payload)


def test_the_sockets_are_files_in_the_private_folder() -> None:
    sockets = KvSockets(Path("/tmp/kvb-12345678"))
    config = json.loads(sockets.config())
    assert all(config[name].startswith("ipc:///tmp/kvb-12345678/") for name in ("endpoint", "replay_endpoint"))
