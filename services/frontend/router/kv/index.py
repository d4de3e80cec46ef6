"""Who holds which pages: exactly where events tell it, assumed where only what was sent there is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from services.frontend.router.kv.pages import PageTable
from services.requests import Role
from services.telemetry import metrics


class Holder(NamedTuple):
    """One KV cache: a worker, as `cache_owner` names it, and one of its data-parallel ranks."""

    worker: str
    dp_rank: int


def cache_owner(role: Role, instance_id: str) -> str:
    """A worker among all that keep prefixes. As in the registry's keys: two roles may have the same instance id."""
    return f"{role}/{instance_id}"


@dataclass(slots=True)
class _Assumed:
    """What was sent somewhere lately: pages of this generation and of the one before, until another begins."""

    bit: int
    since: float
    pages: int = 0
    older: int = 0


class KvIndex:
    """Pages by prefix hash (services/prefixes.py). Hashes of other page sizes, adapters or salts are other pages.

    At most `max_pages` different pages; beyond them the least recently used go, and with them the knowledge of who
    has them. What is assumed lasts for `assumed_seconds`, at least half of them.
    """

    def __init__(
        self,
        max_pages: int = 1_000_000,
        *,
        assumed_seconds: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._table = PageTable(max_pages)
        self._bits = _Bits()
        self._exact: dict[Holder, int] = {}
        self._assumed: dict[Holder, _Assumed] = {}
        self._generation = assumed_seconds / 2
        self._clock = clock
        self._next_expiry = float("inf")
        self._told_evicted = 0

    def __len__(self) -> int:
        """Different pages. Those of holders that were forgotten just now are still among them."""
        return len(self._table)

    @property
    def evicted(self) -> int:
        """Pages that had to go for others, ever."""
        return self._table.evicted

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return self._table.bytes()

    def overlap(self, hashes: Iterable[int]) -> dict[Holder, int]:
        """How many of these pages, from the first on without a gap, each holder has; only those that have the first.

        Takes no more hashes than it needs.
        """
        if self._clock() >= self._next_expiry:
            self._expire()
        owners = self._bits.owners
        found: dict[Holder, int] = {}
        for bits, pages in self._table.match(hashes, self._bits.live):
            rest = bits
            while rest:
                lowest = rest & -rest
                found[owners[lowest.bit_length() - 1]] = pages
                rest ^= lowest
        return found

    def stored(self, holder: Holder, hashes: Iterable[int]) -> None:
        """It has these pages."""
        bit = self._exact.get(holder)
        if bit is None:
            bit = self._exact[holder] = self._bits.take(holder)
        self._table.add(hashes, bit)
        self._settle()

    def removed(self, holder: Holder, hashes: Iterable[int]) -> int:
        """It no longer has these; how many of them weren't known here, for whatever reason."""
        unknown = self._table.remove(hashes, self._exact.get(holder, 0))
        self._settle()
        return unknown

    def cleared(self, holder: Holder) -> None:
        """It has none of those that events told of."""
        if (bit := self._exact.pop(holder, None)) is not None:
            self._bits.retire(bit)
            self._settle()

    def routed(self, holder: Holder, hashes: Iterable[int], *, capacity: int | None = None) -> None:
        """A prompt was sent there, and nothing else will tell what it holds: these pages are assumed.

        All pages of the prompt, from the first. Where its `capacity` is known, no more than about so many are assumed.
        """
        now = self._clock()
        assumed = self._assumed.get(holder)
        if assumed is None:
            assumed = self._assumed[holder] = _Assumed(self._bits.take(holder), now)
        elif (capacity is not None and assumed.pages >= capacity // 2) or now >= assumed.since + self._generation:
            self._begin_generation(holder, assumed, now)
        self._next_expiry = min(self._next_expiry, assumed.since + self._generation)
        assumed.pages += self._table.add(hashes, assumed.bit)
        self._settle()

    def not_assumed(self, holder: Holder) -> None:
        """What was assumed of it no longer is."""
        if (assumed := self._assumed.pop(holder, None)) is not None:
            for bit in filter(None, (assumed.bit, assumed.older)):
                self._bits.retire(bit)
            self._settle()

    def forget(self, worker: str) -> None:
        """Nothing is known of any of its ranks."""
        for holder in [each for each in (*self._exact, *self._assumed) if each.worker == worker]:
            self.cleared(holder)
            self.not_assumed(holder)

    def pages(self) -> dict[Holder, set[int]]:
        """Everybody's pages, exact and assumed. Takes long: for tests and people."""
        bits: dict[Holder, int] = dict(self._exact)
        for holder, assumed in self._assumed.items():
            bits[holder] = bits.get(holder, 0) | assumed.bit | assumed.older
        return {holder: held for holder, mask in bits.items() if (held := self._table.held_by(mask))}

    def _begin_generation(self, holder: Holder, assumed: _Assumed, now: float) -> None:
        if assumed.older:
            self._bits.retire(assumed.older)
        assumed.older = assumed.bit
        assumed.bit, assumed.since, assumed.pages = self._bits.take(holder), now, 0

    def _expire(self) -> None:
        now = self._clock()
        for holder, assumed in list(self._assumed.items()):
            if now < assumed.since + self._generation:
                continue
            if assumed.pages:
                self._begin_generation(holder, assumed, now)
            else:
                self.not_assumed(holder)
        ends = [assumed.since + self._generation for assumed in self._assumed.values()]
        self._next_expiry = min(ends, default=float("inf"))
        self._settle()

    def _settle(self) -> None:
        """Retired bits are taken out of all pages before they are taken for another."""
        metrics.KV_INDEX_PAGES.set(len(self._table))
        if self._table.evicted > self._told_evicted:
            metrics.KV_INDEX_EVICTED.inc(self._table.evicted - self._told_evicted)
            self._told_evicted = self._table.evicted
        if not self._table.sweeping and (bits := self._bits.next_sweep()):
            self._table.sweep(bits)


class _Bits:
    """Which bit stands for whom. A holder that is forgotten leaves its bit in the pages until they are swept."""

    def __init__(self) -> None:
        self.live = 0
        self.owners: list[Holder] = []
        self._free: list[int] = []
        self._retired = 0
        self._swept = 0

    def take(self, holder: Holder) -> int:
        """A bit that no page has."""
        if self._free:
            number = self._free.pop()
            self.owners[number] = holder
        else:
            number = len(self.owners)
            self.owners.append(holder)
        bit = 1 << number
        self.live |= bit
        return bit

    def retire(self, bit: int) -> None:
        """No page counts with it from now on."""
        self.live ^= bit
        self._retired |= bit

    def next_sweep(self) -> int:
        """The bits that are to be swept now, 0 when there are none. The sweep before is over."""
        while self._swept:
            lowest = self._swept & -self._swept
            self._free.append(lowest.bit_length() - 1)
            self._swept ^= lowest
        self._swept, self._retired = self._retired, 0
        return self._swept
