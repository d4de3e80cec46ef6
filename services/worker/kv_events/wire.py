"""KV events and snapshots as messages of KvEventService."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from kvbaton.v1 import kv_events_pb2
from services.worker.engines.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from services.worker.kv_events.hub import NumberedChange
from services.worker.kv_events.mirror import Block, MirrorChange, as_stored

# 64 KiB of tokens at 16 a page, 256 KiB at 64; of hashes alone 8 KiB, which a router takes in within a millisecond.
PAGES_PER_CHUNK = 1024
# The longest `changes` message; each change is a page or a few.
GATHERED_CHANGES = 256


def change_message(change: NumberedChange, *, hashes_only: bool) -> kv_events_pb2.SubscribeResponse:
    """One change."""
    message = kv_events_pb2.SubscribeResponse(sequence=change.sequence, dp_rank=change.dp_rank)
    _fill(message, change.change, hashes_only=hashes_only)
    return message


def changes_message(changes: Sequence[NumberedChange], *, hashes_only: bool) -> kv_events_pb2.SubscribeResponse:
    """Changes whose numbers follow each other, at least one."""
    message = kv_events_pb2.SubscribeResponse(sequence=changes[-1].sequence)
    for change in changes:
        _fill(message.changes.changes.add(dp_rank=change.dp_rank), change.change, hashes_only=hashes_only)
    return message


def snapshot_messages(
    sequence: int, ranks: list[list[Block]], *, hashes_only: bool = False, pages_per_chunk: int = PAGES_PER_CHUNK
) -> Iterator[kv_events_pb2.SubscribeResponse]:
    """Every rank's pages, at most so many in a message; at least one message a rank, the last of which says so."""
    for rank, blocks in enumerate(ranks):
        told = (block for block in blocks if block.prefix_hash) if hashes_only else iter(blocks)
        last = False
        while not last:
            part = list(itertools.islice(told, pages_per_chunk))
            last = len(part) < pages_per_chunk
            message = kv_events_pb2.SubscribeResponse(sequence=sequence, dp_rank=rank)
            if hashes_only:
                message.snapshot.stored.add(prefix_hashes=[block.prefix_hash for block in part])
            else:
                runs = as_stored(part, longest=pages_per_chunk)
                message.snapshot.stored.extend(_stored(run, hashes_only=False) for run in runs)
            message.snapshot.last = last
            yield message


def _fill(
    message: kv_events_pb2.SubscribeResponse | kv_events_pb2.KvChange, change: MirrorChange, *, hashes_only: bool
) -> None:
    match change.event:
        case BlockStored():
            message.stored.CopyFrom(_stored(change, hashes_only=hashes_only))
        case BlockRemoved(block_hashes=hashes):
            removed = kv_events_pb2.KvRemoved(prefix_hashes=change.prefix_hashes)
            if not hashes_only:
                removed.block_hashes.extend(hashes)
            message.removed.CopyFrom(removed)
        case AllBlocksCleared():
            message.cleared.SetInParent()


def _stored(change: MirrorChange, *, hashes_only: bool) -> kv_events_pb2.KvStored:
    event = change.event
    if hashes_only or not isinstance(event, BlockStored):
        return kv_events_pb2.KvStored(prefix_hashes=change.prefix_hashes)
    return kv_events_pb2.KvStored(
        block_hashes=event.block_hashes,
        parent_hash=event.parent_block_hash,
        token_ids=event.token_ids,
        page_size=event.block_size,
        lora_id=event.kind.lora_id,
        lora_name=event.kind.lora_name,
        cache_salt=event.kind.cache_salt,
        prefix_hashes=change.prefix_hashes,
    )
