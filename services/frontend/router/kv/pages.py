"""A bounded table from prefix hashes to the sets of who holds them, least recently used pages out first.

A set is an integer with a bit for each holder, and pages that the same holders have share one object. The table is
many dictionaries of some thousand pages each: one of a million would stop the process for tens of milliseconds when it
grows, and keeps, by CPython's rule, room for up to six times what is left after a time of coming and going.

Memory per page: 32 bytes for the hash and 27 to 64 for its place, so at most 100 as long as there are fewer different
sets than one for every 64 pages. A set of its own for every page would add 48.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable

_SHARD_PAGES = 1024
_PAGES_PER_TIDYING = 64
# A dictionary that takes more than this for an entry is made anew, with at most 54.
_BYTES_PER_PLACE = 64
_EMPTY_SHARD_BYTES = 1024
_PAGES_PER_SET = 64
_EVICTED_AT_ONCE = 32
# Moving all pages of every match to the end would take longer than finding them.
_TOUCHED_ONE_IN = 7


class PageTable:
    """`max_pages` pages. They are used when they are added and, each seventh in turn, when they are matched."""

    def __init__(self, max_pages: int) -> None:
        self._max_pages = max_pages
        shards = 1 << (max(1, max_pages // _SHARD_PAGES) - 1).bit_length()
        self._shards: list[dict[int, int]] = [{} for _ in range(shards)]
        self._select = shards - 1
        self._pages = 0
        self._sets: dict[int, int] = {}
        self._max_sets = max(1024, max_pages // _PAGES_PER_SET)
        self._untidied = 0
        self._next_tidied = 0
        self._turn = 0
        # Bits that are being taken out of every page, and the shards in which that is still to do.
        self._sweeping = 0
        self._unswept = 0
        self.evicted = 0

    def __len__(self) -> int:
        return self._pages

    @property
    def sweeping(self) -> int:
        """The bits of the sweep that goes on; 0 when there is none."""
        return self._sweeping

    def add(self, hashes: Iterable[int], bit: int) -> int:
        """These pages are held by `bit` too; how many of them were not."""
        shards, select = self._shards, self._select
        fresh = written = 0
        before, after = 0, bit
        for each in hashes:
            shard = shards[each & select]
            held = shard.pop(each, 0)
            if held is not before:
                before, after = held, self._shared(held | bit)
            shard[each] = after
            written += 1
            if not held & bit:
                fresh += 1
                if not held:
                    self._pages += 1
                    if self._pages > self._max_pages:
                        self._evict(shard)
        self._tidy(written)
        return fresh

    def remove(self, hashes: Iterable[int], bit: int) -> int:
        """These pages are no longer held by `bit`; how many of them weren't anyway."""
        shards, select = self._shards, self._select
        unknown = written = 0
        before = after = 0
        for each in hashes:
            shard = shards[each & select]
            held = shard.get(each, 0)
            written += 1
            if not held & bit:
                unknown += 1
                continue
            if held is not before:
                before, after = held, self._shared(held ^ bit)
            if after:
                shard[each] = after
            else:
                del shard[each]
                self._pages -= 1
        self._tidy(written)
        return unknown

    def match(self, hashes: Iterable[int], live: int) -> list[tuple[int, int]]:
        """How many of these pages, from the first on without a gap, each of the bits in `live` holds.

        Pairs of bits and their number of pages, ascending; without those that don't hold the first. Takes no more
        hashes than it needs.
        """
        shards, select, turn = self._shards, self._select, self._turn
        self._turn = (turn + 1) % _TOUCHED_ONE_IN
        if not live:
            return []
        matches: list[tuple[int, int]] = []
        # Pages with the same holders share one object: only where it changes there is something to count.
        alive, pages, last, touched = live, 0, -1, turn
        for each in hashes:
            shard = shards[each & select]
            held = shard.get(each, 0)
            if held is not last:
                last, still = held, alive & held
                if still != alive:
                    if pages:
                        matches.append((alive ^ still, pages))
                    alive = still
                    if not alive:
                        break
            if pages == touched:
                shard[each] = shard.pop(each)
                touched += _TOUCHED_ONE_IN
            pages += 1
        if alive and pages:
            matches.append((alive, pages))
        self._tidy(min(pages, _PAGES_PER_TIDYING))  # a request waits for this
        return matches

    def sweep(self, bits: int) -> None:
        """Begins to take these bits out of every page, a shard at a time with what else is done. After the last."""
        assert not self._sweeping
        self._sweeping, self._unswept = bits, len(self._shards)

    def held_by(self, bits: int) -> set[int]:
        """All pages with one of these bits. Looks at every page: for tests and people."""
        return {each for shard in self._shards for each, held in shard.items() if held & bits}

    def bytes(self) -> int:
        """Memory that the table takes, in bytes; sets that are no longer shared are not counted."""
        tables = sum(map(sys.getsizeof, self._shards)) + sys.getsizeof(self._shards)
        sets = sys.getsizeof(self._sets) + sum(map(sys.getsizeof, self._sets))
        return tables + sets + 32 * self._pages

    def _shared(self, held: int) -> int:
        """The object for this set."""
        if len(self._sets) >= self._max_sets:
            self._sets.clear()
        return self._sets.setdefault(held, held)

    def _evict(self, shard: dict[int, int]) -> None:
        """The longest unused pages of one shard, which holds a random part of all."""
        count = max(1, min(len(shard) - 1, len(shard) // _EVICTED_AT_ONCE))
        for each in list(itertools.islice(shard, count)):
            del shard[each]
        self._pages -= count
        self.evicted += count

    def _tidy(self, pages: int) -> None:
        """One shard for every so many pages used."""
        self._untidied += pages
        while self._untidied >= _PAGES_PER_TIDYING:
            self._untidied -= _PAGES_PER_TIDYING
            self._tidy_shard(self._next_tidied)
            self._next_tidied = (self._next_tidied + 1) & self._select

    def _tidy_shard(self, index: int) -> None:
        shard = self._shards[index]
        if self._unswept:
            keep = ~self._sweeping
            swept = {each: self._shared(rest) for each, held in shard.items() if (rest := held & keep)}
            self._pages -= len(shard) - len(swept)
            self._shards[index] = swept
            self._unswept -= 1
            if not self._unswept:
                self._sweeping = 0
        elif sys.getsizeof(shard) > max(_EMPTY_SHARD_BYTES, _BYTES_PER_PLACE * len(shard)):
            self._shards[index] = dict(shard)
