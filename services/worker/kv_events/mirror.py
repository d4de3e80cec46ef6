"""The pages that one dp rank's prefix cache holds: applied events in, a snapshot out.

It never claims a page whose prefix it doesn't know. After a gap in the engine's events that costs pages, not truth.
Beside the engine's own names it knows every page by its prefix hash (services/prefixes.py), which only the worker can
compute: to name a removed page that way takes its tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.prefixes import chained, hashed_page_size, page_bytes, root
from services.worker.engines.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, CacheKind, KvEvent

_UNHASHED = -1


@dataclass(slots=True, eq=False)
class Block:
    """One page. Its tokens take 4 bytes each: a mirror holds as many as the engine's KV pool.

    Never changed. It isn't frozen because making a frozen one takes three times as long, and there may be one a token.
    """

    block_hash: int
    parent: int | None
    tokens: array[int]
    kind: CacheKind
    place: int = _UNHASHED
    """Which of the pages of a hashed page it is, from 0; -1 when it has no place in one."""
    prefix_hash: int = 0
    """Of the hashed page that ends with it; 0 when none does."""


@dataclass(frozen=True, slots=True)
class MirrorChange:
    """What an event has changed: what of it subscribers must hear, and the hashed pages that came, or went."""

    event: KvEvent
    prefix_hashes: Sequence[int] = ()


class RankMirror:
    """Pages by the engine's hash, in an order in which no page stands before its parent."""

    def __init__(self, page_size: int) -> None:
        """`page_size` is the engine's, in tokens."""
        self._page_size = page_size
        self._hashed_size = hashed_page_size(page_size)
        self._places = self._hashed_size // page_size
        self._blocks: dict[int, Block] = {}
        # How many blocks end each hashed page: an engine can have two names for one prefix.
        self._enders: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def blocks(self) -> list[Block]:
        """All pages, parents first."""
        return list(self._blocks.values())

    def apply(self, event: KvEvent) -> MirrorChange | None:
        """Takes the event in; returns what subscribers must hear, None if nothing.

        Raises ValueError for pages whose tokens don't fill them.
        """
        match event:
            case BlockStored():
                return self._store(event)
            case BlockRemoved():
                return self._remove(event)
            case AllBlocksCleared():
                had_any = bool(self._blocks)
                self._blocks.clear()
                self._enders.clear()
                return MirrorChange(event) if had_any else None

    def _store(self, event: BlockStored) -> MirrorChange | None:
        size, hashes = event.block_size, event.block_hashes
        if size < 1 or len(event.token_ids) != size * len(hashes):
            raise ValueError(f"{len(event.token_ids)} tokens for {len(hashes)} pages of {size}")
        parent = None
        if event.parent_block_hash is not None:
            parent = self._blocks.get(event.parent_block_hash)
            if parent is None:
                return None
        if all(block in self._blocks for block in hashes):
            return None
        fresh: list[int] = []
        for index, name in enumerate(hashes):
            block = self._blocks.get(name)
            if block is None:
                tokens = array("I", event.token_ids[index * size : (index + 1) * size])
                block = self._blocks[name] = self._new_block(name, parent, tokens, event.kind)
                if block.prefix_hash and self._began(block.prefix_hash):
                    fresh.append(block.prefix_hash)
            parent = block
        return MirrorChange(event, fresh)

    def _remove(self, event: BlockRemoved) -> MirrorChange | None:
        removed = [block for name in event.block_hashes if (block := self._blocks.pop(name, None)) is not None]
        if not removed:
            return None
        gone = [block.prefix_hash for block in removed if block.prefix_hash and self._ended(block.prefix_hash)]
        return MirrorChange(BlockRemoved([block.block_hash for block in removed]), gone)

    def _new_block(self, name: int, parent: Block | None, tokens: array[int], kind: CacheKind) -> Block:
        if parent is None:
            before, place = None, 0
        else:
            before = parent.block_hash
            place = (parent.place + 1) % self._places if parent.place != _UNHASHED else _UNHASHED
        if place == _UNHASHED or len(tokens) != self._page_size:
            return Block(name, before, tokens, kind)
        if place < self._places - 1:
            return Block(name, before, tokens, kind, place)
        prefix_hash = self._hash(before, tokens, kind)
        return Block(name, before, tokens, kind, place if prefix_hash else _UNHASHED, prefix_hash)

    def _hash(self, before: int | None, tokens: array[int], kind: CacheKind) -> int:
        """Of the hashed page that ends with these tokens, after the page `before`.

        0 where the engine has taken away what it began with.
        """
        parts = [page_bytes(tokens)]
        for _ in range(self._places - 1):
            block = None if before is None else self._blocks.get(before)
            if block is None:
                return 0
            parts.append(page_bytes(block.tokens))
            before = block.parent
        if before is None:
            chain = root(self._hashed_size, lora_id=kind.lora_id, lora_name=kind.lora_name, cache_salt=kind.cache_salt)
        elif (block := self._blocks.get(before)) is not None and block.prefix_hash:
            chain = block.prefix_hash
        else:
            return 0
        return chained(chain, b"".join(reversed(parts)))

    def _began(self, prefix_hash: int) -> bool:
        count = self._enders[prefix_hash] = self._enders.get(prefix_hash, 0) + 1
        return count == 1

    def _ended(self, prefix_hash: int) -> bool:
        count = self._enders[prefix_hash] - 1
        if count:
            self._enders[prefix_hash] = count
        else:
            del self._enders[prefix_hash]
        return not count


def as_stored(blocks: list[Block], *, longest: int) -> Iterator[MirrorChange]:
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
        stored = BlockStored(hashes, run[0].parent, tokens, len(run[0].tokens), run[0].kind)
        yield MirrorChange(stored, [block.prefix_hash for block in run if block.prefix_hash])


def _follows(block: Block, following: Block) -> bool:
    same_kind = (block.kind, len(block.tokens)) == (following.kind, len(following.tokens))
    return same_kind and following.parent == block.block_hash
