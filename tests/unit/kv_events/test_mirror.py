"""The mirror holds exactly what the engine's events say, and a snapshot of it rebuilds the same."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.prefixes import hashed_page_size, prefix_hashes
from services.worker.engines.kv_events import PLAIN, AllBlocksCleared, BlockRemoved, BlockStored, CacheKind, KvEvent
from services.worker.engines.simulated.pages import PageAllocator
from services.worker.engines.simulated.prefix_cache import PrefixCache
from services.worker.kv_events.mirror import MirrorChange, RankMirror, as_stored

FIRST = BlockStored([1, 2], None, [10, 11, 12, 13], 2)
BRANCH = BlockStored([3], 1, [14, 15], 2)


def contents(mirror: RankMirror) -> dict[int, tuple[int | None, list[int]]]:
    return {block.block_hash: (block.parent, block.tokens.tolist()) for block in mirror.blocks()}


def hashes(mirror: RankMirror) -> set[int]:
    return {block.prefix_hash for block in mirror.blocks() if block.prefix_hash}


def told(change: MirrorChange | None) -> KvEvent | None:
    return None if change is None else change.event


def rebuilt(mirror: RankMirror, longest: int, page_size: int = 2) -> RankMirror:
    copy = RankMirror(page_size)
    for change in as_stored(mirror.blocks(), longest=longest):
        assert isinstance(change.event, BlockStored)
        assert 1 <= len(change.event.block_hashes) <= longest
        assert copy.apply(change.event) is not None
    return copy


def chain(first: int, tokens: list[int], page_size: int, kind: CacheKind = PLAIN) -> BlockStored:
    """A prompt's pages, named from `first` on."""
    pages = len(tokens) // page_size
    return BlockStored(list(range(first, first + pages)), None, tokens[: pages * page_size], page_size, kind)


def test_stored_removed_cleared() -> None:
    mirror = RankMirror(2)
    assert told(mirror.apply(FIRST)) == FIRST
    assert told(mirror.apply(BRANCH)) == BRANCH
    assert contents(mirror) == {1: (None, [10, 11]), 2: (1, [12, 13]), 3: (1, [14, 15])}
    assert told(mirror.apply(BlockRemoved([2, 99]))) == BlockRemoved([2]), "only what was there"
    assert told(mirror.apply(AllBlocksCleared())) == AllBlocksCleared()
    assert len(mirror) == 0


def test_what_changes_nothing_is_told_to_nobody() -> None:
    mirror = RankMirror(2)
    assert mirror.apply(AllBlocksCleared()) is None
    assert mirror.apply(BlockRemoved([5])) is None
    mirror.apply(FIRST)
    assert mirror.apply(FIRST) is None


def test_a_page_without_its_prefix_is_not_claimed() -> None:
    mirror = RankMirror(2)
    assert mirror.apply(BRANCH) is None
    assert len(mirror) == 0


@pytest.mark.parametrize("event", [BlockStored([1], None, [1, 2, 3], 2), BlockStored([1], None, [], 0)])
def test_pages_that_are_not_full_are_an_error(event: BlockStored) -> None:
    with pytest.raises(ValueError, match="tokens for"):
        RankMirror(2).apply(event)


def test_a_run_of_pages_is_one_event_of_the_snapshot() -> None:
    def runs() -> list[list[int]]:
        events = [change.event for change in as_stored(mirror.blocks(), longest=8)]
        return [list(event.block_hashes) for event in events if isinstance(event, BlockStored)]

    mirror = RankMirror(2)
    for event in (BlockStored([1], None, [1, 1], 2), BlockStored([2], 1, [2, 2], 2), BRANCH):
        mirror.apply(event)
    assert runs() == [[1, 2], [3]]
    mirror.apply(BlockStored([4], 3, [4, 4], 2, CacheKind(lora_id=7)))
    assert runs() == [[1, 2], [3], [4]]


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_its_hashes_are_those_of_the_prompts_own_pages(page_size: int) -> None:
    tokens = list(range(1000, 1200))
    mirror = RankMirror(page_size)
    change = mirror.apply(chain(1, tokens, page_size))
    assert change is not None
    expected = prefix_hashes(tokens[: len(tokens) // page_size * page_size], hashed_page_size(page_size))
    assert list(change.prefix_hashes) == expected
    assert len(expected) == 200 // page_size * page_size // hashed_page_size(page_size)


@pytest.mark.parametrize("kind", [CacheKind(lora_id=3), CacheKind(lora_name="law"), CacheKind(cache_salt="tenant")])
def test_pages_of_an_adapter_or_a_salt_have_hashes_of_their_own(kind: CacheKind) -> None:
    tokens = list(range(64))
    mirror = RankMirror(16)
    plain, other = mirror.apply(chain(1, tokens, 16)), mirror.apply(chain(50, tokens, 16, kind))
    assert plain is not None
    assert other is not None
    assert set(plain.prefix_hashes).isdisjoint(other.prefix_hashes)
    assert list(other.prefix_hashes) == prefix_hashes(tokens, 16, **kind._asdict())


def test_a_hashed_page_comes_with_its_last_page_and_goes_with_it() -> None:
    tokens = list(range(40))
    mirror = RankMirror(4)
    whole = prefix_hashes(tokens, 16)
    first = mirror.apply(BlockStored([0, 1, 2], None, tokens[:12], 4))
    second = mirror.apply(BlockStored([3, 4, 5, 6, 7, 8], 2, tokens[12:36], 4))
    gone = [mirror.apply(BlockRemoved([8])), mirror.apply(BlockRemoved([7, 6]))]
    assert [list(change.prefix_hashes) for change in (first, second, *gone) if change] == [[], whole, [], whole[1:]]


def test_a_prefix_that_the_engine_knows_by_two_names_is_there_until_both_are_gone() -> None:
    tokens = list(range(16))
    mirror = RankMirror(16)
    changes = [mirror.apply(chain(1, tokens, 16)), mirror.apply(chain(2, tokens, 16))]
    changes += [mirror.apply(BlockRemoved([1])), mirror.apply(BlockRemoved([2]))]
    [expected] = prefix_hashes(tokens, 16)
    assert [list(change.prefix_hashes) for change in changes if change] == [[expected], [], [], [expected]]


def test_a_page_of_another_size_and_what_follows_it_have_no_hash() -> None:
    mirror = RankMirror(16)
    mirror.apply(BlockStored([1], None, list(range(16)), 16))
    mirror.apply(BlockStored([2], 1, [1, 2, 3], 3))
    mirror.apply(BlockStored([3], 2, list(range(16)), 16))
    assert [bool(block.prefix_hash) for block in mirror.blocks()] == [True, False, False]


@pytest.mark.parametrize("seed", range(5))
def test_it_equals_a_cache_that_inserts_evicts_and_clears(seed: int) -> None:
    rng, mirror = random.Random(seed), RankMirror(4)
    expected: dict[int, tuple[int | None, list[int]]] = {}
    hashed: set[int] = set()

    def tell(event: KvEvent) -> None:
        change = mirror.apply(event)
        match event:
            case BlockStored():
                assert change is not None
                assert hashed.isdisjoint(change.prefix_hashes)
                hashed.update(change.prefix_hashes)
                parent = event.parent_block_hash
                for index, block in enumerate(event.block_hashes):
                    expected[block] = (parent, list(event.token_ids[index * 4 : index * 4 + 4]))
                    parent = block
            case BlockRemoved():
                assert change is not None
                assert hashed.issuperset(change.prefix_hashes)
                hashed.difference_update(change.prefix_hashes)
                for block in event.block_hashes:
                    del expected[block]
            case AllBlocksCleared():
                expected.clear()
                hashed.clear()

    allocator = PageAllocator(200)
    cache = PrefixCache(allocator, 4, tell)
    for _ in range(300):
        prompt = [rng.randrange(2) for _ in range(rng.randint(1, 80))]
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
        assert hashes(mirror) == hashed
    copy = rebuilt(mirror, rng.randint(1, 9), page_size=4)
    assert contents(copy) == expected
    assert hashes(copy) == hashed


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_pages_taken_away_in_any_order_never_leave_a_wrong_hash(data: st.DataObject) -> None:
    """Engines remove leaves first; if one didn't, hashes would be missing, never wrong."""
    page_size = data.draw(st.sampled_from([1, 8, 16]))
    mirror = RankMirror(page_size)
    names: dict[tuple[int, ...], int] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        known = sorted(contents(mirror))
        if known and data.draw(st.booleans()):
            mirror.apply(BlockRemoved([data.draw(st.sampled_from(known))]))
            continue
        tokens = data.draw(st.lists(st.integers(0, 1), min_size=16, max_size=48))
        for end in range(page_size, len(tokens) + 1, page_size):
            parent = names.get(tuple(tokens[: end - page_size])) if end > page_size else None
            name = names.setdefault(tuple(tokens[:end]), len(names) + 1)
            mirror.apply(BlockStored([name], parent, array("I", tokens[end - page_size : end]), page_size))
    prompts = {name: list(prompt) for prompt, name in names.items()}
    for block in mirror.blocks():
        if block.prefix_hash:
            whole = prefix_hashes(prompts[block.block_hash], hashed_page_size(page_size))
            assert block.prefix_hash == whole[-1]
