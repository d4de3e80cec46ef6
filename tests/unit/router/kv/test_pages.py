"""The table stays within its bytes per page after whatever coming and going, and no step of it takes long."""

from __future__ import annotations

import random
import tracemalloc
from array import array
from collections.abc import Sequence

import pytest

from services.frontend.router.kv.pages import PageTable

LIMIT = 100


BITS = [1 << number for number in range(64)]


def some_runs(rng: random.Random, count: int) -> list[tuple[Sequence[int], list[int]]]:
    """Each has 20 pages that follow each other, and the bits of who holds them."""
    return [
        (array("Q", (rng.getrandbits(60) for _ in range(20))), rng.sample(BITS, rng.choice([1, 1, 8])))
        for _ in range(count)
    ]


def test_pages_with_the_same_holders_share_one_set() -> None:
    table = PageTable(10_000)
    for bit in (1 << 40, 1 << 50, 1 << 60):
        table.add(range(1, 2001), bit)
    assert len({id(held) for shard in table._shards for held in shard.values()}) == 1
    assert table.match(range(1, 2001), -1) == [(1 << 40 | 1 << 50 | 1 << 60, 2000)]


@pytest.mark.parametrize("pages", [20_000, 26_000, 34_000])
def test_memory_per_page_filled_and_after_coming_and_going(pages: int) -> None:
    """What the allocator says, not only what the table reckons."""
    rng = random.Random(1)
    held, coming = some_runs(rng, pages // 20), some_runs(rng, pages // 10)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        table = PageTable(40_000)
        for run, bits in held:
            for bit in bits:
                table.add(run, bit)
        filled = (tracemalloc.get_traced_memory()[0] - before) / len(table)
        for new in coming:
            index = rng.randrange(len(held))
            run, bits = held[index]
            for bit in bits:
                assert table.remove(run, bit) == 0
            held[index] = new
            for bit in new[1]:
                table.add(new[0], bit)
        churned = (tracemalloc.get_traced_memory()[0] - before) / len(table)
        reckoned = table.bytes() / len(table)
    finally:
        tracemalloc.stop()
    assert len(table) == pages
    assert filled <= LIMIT
    assert churned <= LIMIT
    print(f"{pages}: {filled:.0f} bytes a page filled, {churned:.0f} after coming and going, reckoned {reckoned:.0f}")
    assert reckoned == pytest.approx(churned, rel=0.1)


def test_a_table_that_has_emptied_gives_its_memory_back() -> None:
    table = PageTable(100_000)
    table.add(range(1, 50_001), 1)
    table.add(range(1, 101), 2)
    full = table.bytes()
    table.remove(range(1, 50_001), 1)
    for _ in range(200):
        table.add(range(1, 101), 2)
    assert len(table) == 100
    assert table.bytes() < full / 10


def test_swept_bits_are_gone_from_every_page() -> None:
    table = PageTable(100_000)
    table.add(range(1, 5001), 1)
    table.add(range(2501, 7501), 2)
    table.sweep(1)
    while table.sweeping:
        table.add(range(7001, 7501), 2)
    assert table.held_by(1) == set()
    assert table.held_by(2) == set(range(2501, 7501))
    assert len(table) == 5000


def test_the_oldest_leave_a_full_table_a_few_at_a_time() -> None:
    table = PageTable(20_000)
    for start in range(0, 60_000, 100):
        had = table.evicted
        table.add(range(start + 1, start + 101), 1)
        assert table.evicted - had < 2000
        assert len(table) <= 20_000
    left = table.held_by(1)
    assert len(left) >= 19_000
    assert len(left & set(range(45_001, 60_001))) > 14_000, "recent pages are kept, but for chance between shards"
