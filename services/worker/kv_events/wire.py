"""KV events and snapshots as messages of KvEventService."""

from __future__ import annotations

from collections.abc import Iterator

from kvbaton.v1 import kv_events_pb2
from services.worker.engines.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from services.worker.kv_events.hub import NumberedChange
from services.worker.kv_events.mirror import Block, as_stored

# 64 KiB of tokens at 16 a page, 256 KiB at 64.
PAGES_PER_CHUNK = 1024


def change_message(change: NumberedChange) -> kv_events_pb2.SubscribeResponse:
    """One change."""
    message = kv_events_pb2.SubscribeResponse(sequence=change.sequence, dp_rank=change.dp_rank)
    match change.event:
        case BlockStored() as stored:
            message.stored.CopyFrom(stored_message(stored))
        case BlockRemoved(block_hashes=hashes):
            message.removed.block_hashes.extend(hashes)
        case AllBlocksCleared():
            message.cleared.SetInParent()
    return message


def snapshot_messages(
    sequence: int, ranks: list[list[Block]], *, pages_per_chunk: int = PAGES_PER_CHUNK
) -> Iterator[kv_events_pb2.SubscribeResponse]:
    """Every rank's pages, at most so many in a message; at least one message a rank, the last of which says so."""
    for rank, blocks in enumerate(ranks):
        for start in range(0, max(len(blocks), 1), pages_per_chunk):
            part = blocks[start : start + pages_per_chunk]
            message = kv_events_pb2.SubscribeResponse(sequence=sequence, dp_rank=rank)
            message.snapshot.stored.extend(stored_message(each) for each in as_stored(part, longest=pages_per_chunk))
            message.snapshot.last = start + pages_per_chunk >= len(blocks)
            yield message


def stored_message(event: BlockStored) -> kv_events_pb2.KvStored:
    """Pages that can be reused."""
    return kv_events_pb2.KvStored(
        block_hashes=event.block_hashes,
        parent_hash=event.parent_block_hash,
        token_ids=event.token_ids,
        page_size=event.block_size,
        lora_id=event.lora_id,
    )
