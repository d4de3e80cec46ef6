"""The page array: real bytes that prefill writes into and decode reads its tokens from.

A page holds its tokens, four bytes each. What prefill sends is masked with a digest over the room and both
incarnations; decode unmasks with what it believes these to be. A wrong room, a wrong peer or a foreign write leaves
bytes that decode to other tokens, and nothing checks for it: that is the point.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from services.worker.engines.simulated.oracle import TOKEN_BYTES, new_context

if TYPE_CHECKING:
    from hashlib import blake2b as Hash  # noqa: N812 - a class in the type stubs only


class PageArray:
    """The memory of one dp rank's KV pool. Anyone with a page's index may write it, at any time."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages = pages
        self.page_size = page_size
        self.page_bytes = page_size * TOKEN_BYTES
        self._memory = bytearray(pages * self.page_bytes)
        self._readers: dict[int, BlockTable] = {}

    def write(self, page: int, content: bytes | memoryview) -> None:
        """Overwrites one whole page. Raises ValueError for what is no page of this array."""
        if len(content) != self.page_bytes or not 0 <= page < self.pages:
            raise ValueError(f"{len(content)} bytes for page {page}: this array has {self.pages} of {self.page_bytes}")
        start = page * self.page_bytes
        self._memory[start : start + self.page_bytes] = content
        if (reader := self._readers.get(page)) is not None:
            reader.changed()

    def read(self, page: int) -> bytearray:
        """A copy of one page."""
        return self._memory[page * self.page_bytes : (page + 1) * self.page_bytes]

    def gather(self, pages: Sequence[int]) -> bytes:
        """The pages one behind the other."""
        size, memory = self.page_bytes, self._memory
        return b"".join([memory[page * size : (page + 1) * size] for page in pages])

    def put(self, pages: Sequence[int], first_token: int, content: bytes) -> None:
        """Writes the tokens from `first_token` on into the sequence that `pages` hold."""
        size, at, done = self.page_bytes, first_token * TOKEN_BYTES, 0
        while done < len(content):
            index, offset = divmod(at, size)
            part = content[done : done + size - offset]
            start = pages[index] * size + offset
            self._memory[start : start + len(part)] = part
            at, done = at + len(part), done + len(part)

    def watch(self, table: BlockTable, pages: Sequence[int]) -> None:
        """`table` is told of foreign writes into its pages."""
        self._readers.update(dict.fromkeys(pages, table))

    def unwatch(self, table: BlockTable, pages: Sequence[int]) -> None:
        """The opposite; pages that another table watches by now stay its own."""
        for page in pages:
            if self._readers.get(page) is table:
                del self._readers[page]


class PageAllocator:
    """Which pages are whose: a count of holders each."""

    def __init__(self, pages: int) -> None:
        self.total = pages
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Pages with one holder each, the last released first; None when there are too few."""
        if count > len(self._free):
            return None
        cut = len(self._free) - count
        pages = self._free[cut:][::-1]
        del self._free[cut:]
        for page in pages:
            self._holders[page] = 1
        return pages

    def holders(self, page: int) -> int:
        """How many hold the page."""
        return self._holders[page]

    def retain(self, pages: Sequence[int]) -> None:
        """One more holder each."""
        for page in pages:
            if not self._holders[page]:
                raise ValueError(f"page {page} is free")
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less each; without one, a page is free."""
        for page in reversed(pages):
            if not self._holders[page]:
                raise ValueError(f"page {page} is free already")
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)


class Mask:
    """The key stream of one room between one prefill and one decode incarnation, page after page."""

    def __init__(self, room: int, prefill_incarnation: bytes, decode_incarnation: bytes) -> None:
        self._seed = hashlib.shake_128(room.to_bytes(8, "little") + prefill_incarnation + decode_incarnation)
        self._stream = b""

    def apply(self, content: bytes | bytearray, offset: int = 0) -> bytes:
        """Masks or unmasks what stands `offset` bytes behind the start of the sequence."""
        end = offset + len(content)
        if end > len(self._stream):
            self._stream = self._seed.digest(max(2 * end, 256))
        mixed = int.from_bytes(content, "little") ^ int.from_bytes(self._stream[offset:end], "little")
        return mixed.to_bytes(len(content), "little")


class BlockTable:
    """One sequence in the page array: reads its context from the pages' bytes and appends to them.

    The digest of what was read is kept until anyone else writes into one of the pages.
    """

    def __init__(self, array: PageArray, pages: Sequence[int], length: int, mask: Mask | None = None) -> None:
        """`length` tokens are there already. Without a mask the pages hold plain tokens."""
        self.length = length
        self._array = array
        self._pages = pages
        self._mask = mask
        self._context: Hash | None = None
        array.watch(self, pages)

    def changed(self) -> None:
        """Somebody else wrote into one of the pages."""
        self._context = None

    def context(self) -> Hash:
        """The digest of the tokens that the pages hold now; copy before updating."""
        if self._context is None:
            needed = -(-self.length // self._array.page_size)
            content = self._array.gather(self._pages[:needed])[: self.length * TOKEN_BYTES]
            self._context = new_context(self._mask.apply(content) if self._mask else content)
        return self._context

    def append(self, token: int) -> None:
        """Writes one more token."""
        content = token.to_bytes(TOKEN_BYTES, "little")
        masked = self._mask.apply(content, self.length * TOKEN_BYTES) if self._mask else content
        self._array.put(self._pages, self.length, masked)
        self.length += 1
        if self._context is not None:
            self._context.update(content)

    def close(self) -> None:
        """The pages are about to be released."""
        self._array.unwatch(self, self._pages)
