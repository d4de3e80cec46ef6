"""The prefix cache: what is found again, what goes first, and the events that tell of it."""

from __future__ import annotations

import random

import pytest

from services.worker.engines.simulated.pages import PageAllocator
from services.worker.engines.simulated.prefix_cache import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEvent,
    PrefixCache,
    block_hashes,
)

SIZE = 4


class Kept:
    """A cache over an allocator, and everything it told."""

    def __init__(self, pages: int = 16) -> None:
        self.allocator = PageAllocator(pages)
        self.events: list[KvEvent] = []
        self.cache = PrefixCache(self.allocator, SIZE, self.events.append)

    def compute(self, tokens: list[int], salt: str = "") -> list[int]:
        """What a prefill does with a prompt, up to the release of its pages. Returns the pages it reused."""
        cached = self.cache.match(tokens, salt)
        needed = -(-len(tokens) // SIZE) - len(cached)
        self.cache.evict(needed - self.allocator.free)
        fresh = self.allocator.allocate(needed)
        assert fresh is not None
        self.cache.insert(tokens, cached + fresh, salt)
        self.allocator.release(cached + fresh)
        return cached


def test_full_pages_are_found_and_one_token_is_always_left() -> None:
    kept = Kept()
    assert kept.compute(list(range(10))) == []
    assert len(kept.cache) == 2
    assert len(kept.compute(list(range(10)))) == 2
    assert len(kept.compute(list(range(8)))) == 1
    assert kept.compute([*range(4), 99, *range(5, 10)]) == kept.compute(list(range(5)))


def test_other_salts_are_other_prefixes() -> None:
    kept = Kept()
    for salt in ("", "a", "b"):
        assert kept.compute(list(range(10)), salt) == []
    assert all(len(kept.compute(list(range(10)), salt)) == 2 for salt in ("", "a", "b"))
    kinds = [event.kind.cache_salt for event in kept.events if isinstance(event, BlockStored)]
    assert kinds == ["", "a", "b"]


def test_hashes_chain_over_pages_and_are_signed_64_bit() -> None:
    first, second = block_hashes(list(range(8)), SIZE)
    other = block_hashes([9, *range(1, 8)], SIZE)
    assert first != other[0]
    assert second != other[1]
    assert block_hashes(list(range(11)), SIZE) == [first, second]
    assert block_hashes([1, 2], SIZE) == []
    assert all(-(2**63) <= block < 2**63 for block in (first, second, *other))


def test_events_tell_what_is_kept() -> None:
    kept = Kept()
    kept.compute(list(range(8)))
    kept.compute(list(range(12)))
    hashes = block_hashes(list(range(12)), SIZE)
    assert kept.events == [
        BlockStored(hashes[:2], None, list(range(8)), SIZE),
        BlockStored(hashes[2:], hashes[1], list(range(8, 12)), SIZE),
    ]
    assert kept.cache.evict(1) == 1
    kept.cache.clear()
    assert kept.events[2:] == [BlockRemoved(hashes[2:]), AllBlocksCleared()]
    assert kept.allocator.free == 16


def test_the_least_recently_used_leaf_goes_first() -> None:
    kept = Kept()
    old, new = list(range(8)), list(range(100, 108))
    kept.compute(old)
    kept.compute(new)
    kept.compute([*old, 1])
    kept.cache.evict(1)
    assert kept.events[-1] == BlockRemoved(block_hashes(new, SIZE)[1:])


def test_pages_in_use_are_not_evicted() -> None:
    kept = Kept()
    kept.compute(list(range(9)))
    held = kept.cache.match(list(range(9)))
    assert kept.cache.evict(5) == 0
    kept.allocator.release(held)
    assert kept.cache.evict(5) == 2


@pytest.mark.parametrize("seed", range(5))
def test_the_events_add_up_to_the_cache_and_no_page_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    kept = Kept(pages=12)
    for _ in range(400):
        kept.compute([rng.randrange(2) for _ in range(rng.randrange(1, 30))])
        if rng.random() < 0.02:
            kept.cache.clear()
    known: set[int] = set()
    for event in kept.events:
        if isinstance(event, BlockStored):
            assert event.parent_block_hash is None or event.parent_block_hash in known
            known.update(event.block_hashes)
        elif isinstance(event, BlockRemoved):
            assert known.issuperset(event.block_hashes)
            known.difference_update(event.block_hashes)
        else:
            known.clear()
    assert len(known) == len(kept.cache) == kept.cache.unused
    assert kept.allocator.free == 12 - len(kept.cache)
