"""The mirror holds exactly what the engine's events say, and a snapshot of it rebuilds the same."""

from __future__ import annotations

import random

import pytest

from services.worker.engines.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from services.worker.engines.simulated.pages import PageAllocator
from services.worker.engines.simulated.prefix_cache import PrefixCache
from services.worker.kv_events.mirror import RankMirror, as_stored

FIRST = BlockStored([1, 2], None, [10, 11, 12, 13], 2)
BRANCH = BlockStored([3], 1, [14, 15], 2)


def contents(mirror: RankMirror) -> dict[int, tuple[int | None, list[int]]]:
    return {block.block_hash: (block.parent, block.tokens.tolist()) for block in mirror.blocks()}


def rebuilt(mirror: RankMirror, longest: int) -> RankMirror:
    copy = RankMirror()
    for event in as_stored(mirror.blocks(), longest=longest):
        assert 1 <= len(event.block_hashes) <= longest
        assert copy.apply(event) is not None
    return copy


def test_stored_removed_cleared() -> None:
    mirror = RankMirror()
    assert mirror.apply(FIRST) == FIRST
    assert mirror.apply(BRANCH) == BRANCH
    assert contents(mirror) == {1: (None, [10, 11]), 2: (1, [12, 13]), 3: (1, [14, 15])}
    assert mirror.apply(BlockRemoved([2, 99])) == BlockRemoved([2]), "only what was there"
    assert mirror.apply(AllBlocksCleared()) == AllBlocksCleared()
    assert len(mirror) == 0


def test_what_changes_nothing_is_told_to_nobody() -> None:
    mirror = RankMirror()
    assert mirror.apply(AllBlocksCleared()) is None
    assert mirror.apply(BlockRemoved([5])) is None
    mirror.apply(FIRST)
    assert mirror.apply(FIRST) is None


def test_a_page_without_its_prefix_is_not_claimed() -> None:
    mirror = RankMirror()
    assert mirror.apply(BRANCH) is None
    assert len(mirror) == 0


@pytest.mark.parametrize("event", [BlockStored([1], None, [1, 2, 3], 2), BlockStored([1], None, [], 0)])
def test_pages_that_are_not_full_are_an_error(event: BlockStored) -> None:
    with pytest.raises(ValueError, match="tokens for"):
        RankMirror().apply(event)


def test_a_run_of_pages_is_one_event_of_the_snapshot() -> None:
    mirror = RankMirror()
    for event in (BlockStored([1], None, [1, 1], 2), BlockStored([2], 1, [2, 2], 2), BRANCH):
        mirror.apply(event)
    assert [list(event.block_hashes) for event in as_stored(mirror.blocks(), longest=8)] == [[1, 2], [3]]
    mirror.apply(BlockStored([4], 3, [4, 4], 2, lora_id=7))
    assert [list(event.block_hashes) for event in as_stored(mirror.blocks(), longest=8)] == [[1, 2], [3], [4]]


@pytest.mark.parametrize("seed", range(5))
def test_it_equals_a_cache_that_inserts_evicts_and_clears(seed: int) -> None:
    rng, mirror = random.Random(seed), RankMirror()
    expected: dict[int, tuple[int | None, list[int]]] = {}

    def tell(event: KvEvent) -> None:
        mirror.apply(event)
        match event:
            case BlockStored():
                parent = event.parent_block_hash
                for index, block in enumerate(event.block_hashes):
                    expected[block] = (parent, list(event.token_ids[index * 4 : index * 4 + 4]))
                    parent = block
            case BlockRemoved():
                for block in event.block_hashes:
                    del expected[block]
            case AllBlocksCleared():
                expected.clear()

    allocator = PageAllocator(200)
    cache = PrefixCache(allocator, 4, tell)
    for _ in range(300):
        prompt = [rng.randrange(2) for _ in range(rng.randint(1, 40))]
        pages = allocator.allocate(-(-len(prompt) // 4))
        if pages is None:
            cache.evict(30)
            continue
        cache.insert(prompt, pages)
        allocator.release(pages)
        if rng.random() < 0.01:
            cache.clear()
        assert contents(mirror) == expected
        assert len(mirror) == len(cache)
    assert contents(rebuilt(mirror, rng.randint(1, 9))) == expected
