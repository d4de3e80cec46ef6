"""The pages that one dp rank's prefix cache holds: applied events in, a snapshot out.

It never claims a page whose prefix it doesn't know. After a gap in the engine's events that costs pages, not truth.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from services.worker.engines.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent


@dataclass(frozen=True, slots=True)
class Block:
    """One page. Its tokens take 4 bytes each: a mirror holds as many as the engine's KV pool."""

    block_hash: int
    parent: int | None
    tokens: array[int]
    lora_id: int | None


class RankMirror:
    """Pages by hash, in an order in which no page stands before its parent."""

    def __init__(self) -> None:
        self._blocks: dict[int, Block] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def blocks(self) -> list[Block]:
        """All pages, parents first."""
        return list(self._blocks.values())

    def apply(self, event: KvEvent) -> KvEvent | None:
        """Takes the event in; returns what of it subscribers must hear, None if nothing.

        Raises ValueError for pages whose tokens don't fill them.
        """
        match event:
            case BlockStored():
                return self._store(event)
            case BlockRemoved():
                known = [block for block in event.block_hashes if self._blocks.pop(block, None) is not None]
                return BlockRemoved(known) if known else None
            case AllBlocksCleared():
                had_any = bool(self._blocks)
                self._blocks.clear()
                return event if had_any else None

    def _store(self, event: BlockStored) -> BlockStored | None:
        size, hashes = event.block_size, event.block_hashes
        if size < 1 or len(event.token_ids) != size * len(hashes):
            raise ValueError(f"{len(event.token_ids)} tokens for {len(hashes)} pages of {size}")
        if event.parent_block_hash is not None and event.parent_block_hash not in self._blocks:
            return None
        if all(block in self._blocks for block in hashes):
            return None
        parent = event.parent_block_hash
        for index, block in enumerate(hashes):
            if block not in self._blocks:
                tokens = array("I", event.token_ids[index * size : (index + 1) * size])
                self._blocks[block] = Block(block, parent, tokens, event.lora_id)
            parent = block
        return event


def as_stored(blocks: list[Block], *, longest: int) -> Iterator[BlockStored]:
    """The pages as events of at most `longest` pages each: a run of pages that follow each other is one event."""
    start = 0
    for end in range(1, len(blocks) + 1):
        if end < len(blocks) and end - start < longest and _follows(blocks[end - 1], blocks[end]):
            continue
        run, start = blocks[start:end], end
        tokens = array("I")
        for block in run:
            tokens.extend(block.tokens)
        hashes = [block.block_hash for block in run]
        yield BlockStored(hashes, run[0].parent, tokens, len(run[0].tokens), run[0].lora_id)


def _follows(block: Block, following: Block) -> bool:
    same_kind = (block.lora_id, len(block.tokens)) == (following.lora_id, len(following.tokens))
    return same_kind and following.parent == block.block_hash
