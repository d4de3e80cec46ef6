"""What is kept of prompts: full pages by a chain of hashes, least recently used first out, with KV events.

Page i's hash is over page i - 1's hash and page i's tokens, the first one's over the request's salt as well, so equal
hashes mean equal prefixes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.worker.engines.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, CacheKind, KvEvent
from services.worker.engines.simulated.oracle import to_bytes
from services.worker.engines.simulated.pages import PageAllocator


def block_hashes(tokens: Sequence[int], page_size: int, cache_salt: str = "") -> list[int]:
    """The hash of every full page."""
    hashes: list[int] = []
    parent = hashlib.blake2b(cache_salt.encode(), digest_size=8).digest() if cache_salt else b""
    content = to_bytes(tokens[: len(tokens) // page_size * page_size])
    step = len(content) // max(1, len(tokens) // page_size)
    for at in range(0, len(content), step or 1):
        parent = hashlib.blake2b(parent + content[at : at + step], digest_size=8).digest()
        hashes.append(int.from_bytes(parent, "little", signed=True))
    return hashes


@dataclass(slots=True)
class _Node:
    page: int
    parent: int | None
    children: int = 0


class PrefixCache:
    """Holds each of its pages once; `tell` hears of every change."""

    def __init__(self, allocator: PageAllocator, page_size: int, tell: Callable[[KvEvent], None]) -> None:
        self._allocator = allocator
        self._page_size = page_size
        self._tell = tell
        # A parent always stands behind its children, so eviction meets leaves first.
        self._nodes: dict[int, _Node] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def unused(self) -> int:
        """Pages that nobody but the cache holds; counted, so not for every tick."""
        return sum(self._allocator.holders(node.page) == 1 for node in self._nodes.values())

    def match(self, tokens: Sequence[int], cache_salt: str = "") -> list[int]:
        """The pages of the longest cached prefix, retained for the caller. At least one token is left to compute."""
        reusable = (len(tokens) - 1) // self._page_size
        if not self._nodes or not reusable:
            return []
        found: list[int] = []
        for block in block_hashes(tokens[: reusable * self._page_size], self._page_size, cache_salt):
            if block not in self._nodes:
                break
            found.append(block)
        pages = [self._nodes[block].page for block in found]
        self._touch(found)
        self._allocator.retain(pages)
        return pages

    def insert(self, tokens: Sequence[int], pages: Sequence[int], cache_salt: str = "") -> None:
        """Keeps the full pages of a computed prompt. A prefix that is there already keeps its own pages."""
        hashes = block_hashes(tokens, self._page_size, cache_salt)
        fresh = next((i for i, block in enumerate(hashes) if block not in self._nodes), len(hashes))
        parent = hashes[fresh - 1] if fresh else None
        event = BlockStored(
            hashes[fresh:],
            parent,
            list(tokens[fresh * self._page_size : len(hashes) * self._page_size]),
            self._page_size,
            CacheKind(cache_salt=cache_salt),
        )
        for block, page in zip(hashes[fresh:], pages[fresh : len(hashes)], strict=True):
            self._nodes[block] = _Node(page, parent)
            if parent is not None:
                self._nodes[parent].children += 1
            parent = block
        self._allocator.retain(pages[fresh : len(hashes)])
        self._touch(hashes)
        if event.block_hashes:
            self._tell(event)

    def evict(self, count: int) -> int:
        """Drops up to `count` pages that no request uses; returns how many."""
        dropped: list[int] = []
        for block, node in self._nodes.items():
            if len(dropped) >= count:
                break
            if not node.children and self._allocator.holders(node.page) == 1:
                dropped.append(block)
                if node.parent is not None:
                    self._nodes[node.parent].children -= 1
        self._allocator.release([self._nodes.pop(block).page for block in dropped])
        if dropped:
            self._tell(BlockRemoved(dropped))
        return len(dropped)

    def clear(self) -> None:
        """Forgets everything; pages that requests still use live on with them."""
        self._allocator.release([node.page for node in self._nodes.values()])
        self._nodes.clear()
        self._tell(AllBlocksCleared())

    def _touch(self, path: Sequence[int]) -> None:
        for block in reversed(path):
            self._nodes[block] = self._nodes.pop(block)
