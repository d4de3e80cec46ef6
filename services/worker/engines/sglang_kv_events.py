"""SGLang's KV events: from its schedulers' ZMQ sockets, per dp rank in order, with gaps filled from its replay socket.

A publisher numbers its batches from 0 and keeps the last of them for replay. What replay no longer has is lost: then
nothing is known of that rank (AllBlocksCleared), and SGLang is asked to flush its cache as soon as it can, so that what
it holds can be known again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog
import zmq
import zmq.asyncio

from services.telemetry import metrics
from services.worker.engines.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, CacheKind, KvChange, KvEvent
from services.worker.engines.protocol import EngineDeadError
from services.worker.engines.sglang_launch import KvSockets

log = structlog.get_logger(__name__)

_REPLAY_TIMEOUT_S = 5.0
_FLUSH_RETRY_S = 1.0
_END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
# Pages in the device's memory; SGLang also tells of copies in host memory and on disk.
_DEVICE = (None, "GPU")


@dataclass(frozen=True, slots=True)
class Batch:
    """What one scheduler step changed."""

    sequence: int
    payload: bytes


class RankEvents:
    """One rank's events, in order and each once."""

    def __init__(self, sockets: KvSockets, dp_rank: int, lost: Callable[[], None]) -> None:
        """`lost` is called when events are gone for good."""
        self._sockets = sockets
        self._dp_rank = dp_rank
        self._lost = lost
        self._next = 0

    async def events(self) -> AsyncIterator[KvEvent]:
        """From the engine's start on, for ever."""
        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as published:
            published.setsockopt(zmq.LINGER, 0)
            published.setsockopt(zmq.RCVHWM, 0)
            published.subscribe(b"")
            published.connect(self._sockets.events(self._dp_rank))
            # What came before this subscription; nothing is lost in between, because the next gap asks again.
            for event in await self._fill(context, None):
                yield event
            while True:
                frames = await published.recv_multipart()
                batch = Batch(int.from_bytes(frames[-2], "big"), frames[-1])
                if batch.sequence > self._next:
                    for event in await self._fill(context, batch):
                        yield event
                for event in self._take(batch):
                    yield event

    async def _fill(self, context: zmq.asyncio.Context, until: Batch | None) -> list[KvEvent]:
        """The events before `until`, or all that there are; AllBlocksCleared where some are lost."""
        expected = self._next
        missing = await self._replayed(context)
        events: list[KvEvent] = []
        first = missing[0].sequence if missing else (self._next if until is None else until.sequence)
        if first > self._next:
            self._give_up(self._next, first)
            events.append(AllBlocksCleared())
            self._next = first
        for batch in missing:
            events += self._take(batch)
        if until is not None and first == expected:
            log.info("kv_event_gap_filled", dp_rank=self._dp_rank, first=expected, until=until.sequence)
            metrics.KV_GAPS.labels("filled").inc()
        return events

    async def _replayed(self, context: zmq.asyncio.Context) -> list[Batch]:
        """What SGLang still has from `_next` on; nothing when it doesn't answer."""
        batches: list[Batch] = []
        with context.socket(zmq.DEALER) as replay:
            replay.setsockopt(zmq.LINGER, 0)
            replay.connect(self._sockets.replay(self._dp_rank))
            try:
                async with asyncio.timeout(_REPLAY_TIMEOUT_S):
                    await replay.send_multipart([b"", self._next.to_bytes(8, "big")])
                    while (frames := await replay.recv_multipart())[-2] != _END_OF_REPLAY:
                        batches.append(Batch(int.from_bytes(frames[-2], "big"), frames[-1]))
            except TimeoutError:
                log.warning("kv_event_replay_silent", dp_rank=self._dp_rank)
        return batches

    def _take(self, batch: Batch) -> list[KvEvent]:
        if batch.sequence != self._next:
            return []  # seen already
        self._next += 1
        return decode_batch(batch.payload)

    def _give_up(self, first: int, until: int) -> None:
        log.warning("kv_events_lost", dp_rank=self._dp_rank, first=first, until=until)
        metrics.KV_GAPS.labels("lost").inc()
        self._lost()


class SglangKvEvents:
    """All ranks' events as one stream."""

    def __init__(self, sockets: KvSockets, dp_size: int, flush: Callable[[], Awaitable[bool]]) -> None:
        """`flush` empties the engine's caches and says whether it could."""
        self._flush = flush
        self._flush_wanted = asyncio.Event()
        self._ranks = [RankEvents(sockets, rank, self._flush_wanted.set) for rank in range(dp_size)]

    async def changes(self) -> AsyncIterator[KvChange]:
        """Until the reader leaves. Raises what a rank's stream raises."""
        arrived: asyncio.Queue[KvChange | Exception] = asyncio.Queue()

        async def read(dp_rank: int, events: AsyncIterator[KvEvent]) -> None:
            try:
                async for event in events:
                    arrived.put_nowait(KvChange(dp_rank, event))
            except Exception as error:  # noqa: BLE001 - the reader raises it
                arrived.put_nowait(error)

        tasks = [asyncio.create_task(read(rank, each.events())) for rank, each in enumerate(self._ranks)]
        tasks.append(asyncio.create_task(self._flush_when_wanted()))
        try:
            while not isinstance(change := await arrived.get(), Exception):
                yield change
            raise change
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _flush_when_wanted(self) -> None:
        while True:
            await self._flush_wanted.wait()
            try:
                flushed = await self._flush()
            except (TimeoutError, EngineDeadError) as error:
                log.warning("cache not flushed", error=str(error))
                flushed = False
            if flushed:
                self._flush_wanted.clear()
                log.info("cache flushed after lost kv events")
            else:  # requests run
                await asyncio.sleep(_FLUSH_RETRY_S)


def decode_batch(payload: bytes) -> list[KvEvent]:
    """The events of one batch, `[timestamp, events, …]` in msgpack. Raises ValueError for what is no batch."""
    try:
        events: list[Any] = msgspec.msgpack.decode(payload)[1]
        return [event for raw in events if (event := _decode(_as_map(raw))) is not None]
    except (msgspec.MsgspecError, LookupError, TypeError) as error:
        raise ValueError(f"not a batch of SGLang's KV events: {error!r}") from error


_FIELDS = {
    "BlockStored": ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium"),
    "BlockRemoved": ("block_hashes", "medium"),
    "AllBlocksCleared": (),
}


def _as_map(raw: Any) -> dict[str, Any]:
    """Maps are what newer versions send; older ones send arrays with the type first."""
    if isinstance(raw, dict):
        return raw
    kind, *values = raw
    return {"type": kind, **dict(zip(_FIELDS[kind], values, strict=False))}


def _decode(event: dict[str, Any]) -> KvEvent | None:
    if event.get("medium") not in _DEVICE:
        return None
    match event["type"]:
        case "BlockStored":
            return BlockStored(
                event["block_hashes"],
                event.get("parent_block_hash"),
                _tokens(event["token_ids"]),
                event["block_size"],
                CacheKind(event.get("lora_id"), event.get("lora_name") or "", event.get("cache_salt") or ""),
            )
        case "BlockRemoved":
            return BlockRemoved(event["block_hashes"])
        case "AllBlocksCleared":
            return AllBlocksCleared()
        case unknown:
            raise ValueError(f"unknown KV event {unknown!r}")


def _tokens(token_ids: list[Any]) -> list[int]:
    """EAGLE's caches tell pairs, a token and the next: each page's own tokens are the first ones."""
    return [first for first, _ in token_ids] if token_ids and isinstance(token_ids[0], list) else token_ids
