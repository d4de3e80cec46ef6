"""The index answers as if it compared every page of every holder, forgets at once, and assumes no more than it may."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.frontend.router.kv import pages
from services.frontend.router.kv.index import Holder, KvIndex

A, B, C = Holder("a", 0), Holder("b", 0), Holder("b", 1)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def naive_overlap(held: dict[Holder, set[int]], hashes: Iterable[int]) -> dict[Holder, int]:
    """What the index must say, by comparing everything."""
    hashes = list(hashes)
    counts = {
        holder: next((i for i, each in enumerate(hashes) if each not in own), len(hashes))
        for holder, own in held.items()
    }
    return {holder: count for holder, count in counts.items() if count}


def test_everyone_who_has_the_first_page_is_told_with_the_length_of_its_prefix() -> None:
    index = KvIndex()
    index.stored(A, [1, 2, 3, 4])
    index.stored(B, [1, 2])
    index.stored(C, [2, 3])
    assert index.overlap([1, 2, 3, 5]) == {A: 3, B: 2}
    assert index.overlap([2, 3]) == {A: 2, B: 1, C: 2}
    assert index.overlap([9, 1, 2]) == {}
    assert index.overlap([]) == {}


def test_a_gap_ends_the_prefix() -> None:
    index = KvIndex()
    index.stored(A, [1, 2, 3])
    assert index.removed(A, [2]) == 0
    assert index.overlap([1, 2, 3]) == {A: 1}
    index.stored(A, [2])
    assert index.overlap([1, 2, 3]) == {A: 3}


def test_removing_what_was_not_there_is_counted() -> None:
    index = KvIndex()
    index.stored(A, [1])
    index.stored(B, [2])
    assert index.removed(A, [1, 2, 3]) == 2
    assert index.removed(C, [1]) == 1
    assert index.overlap([2]) == {B: 1}


def test_no_more_hashes_are_taken_than_needed() -> None:
    taken: list[int] = []

    def hashes() -> Iterator[int]:
        for each in range(1, 100):
            taken.append(each)
            yield each

    index = KvIndex()
    index.stored(A, [1, 2])
    assert index.overlap(hashes()) == {A: 2}
    assert taken == [1, 2, 3]


def test_forgetting_a_worker_takes_all_its_ranks_and_nobody_else() -> None:
    index = KvIndex()
    for holder in (A, B, C):
        index.stored(holder, [1, 2])
    index.routed(C, [7])
    index.forget("b")
    assert index.overlap([1, 2]) == {A: 2}
    assert index.overlap([7]) == {}
    index.stored(B, [1])
    assert index.overlap([1, 2]) == {A: 2, B: 1}, "its next incarnation begins with nothing"


@pytest.mark.peers(11)
def test_clearing_a_rank_again_and_again_costs_no_memory_for_long() -> None:
    index = KvIndex(2000)
    for _ in range(500):
        index.stored(B, range(1, 101))
        index.stored(C, range(1, 101))
        index.cleared(B)
    assert index.overlap([1]) == {C: 1}
    assert len(index) == 100
    assert index._bits.live.bit_length() < 10


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whatever_happened_the_answer_is_the_naive_one(data: st.DataObject) -> None:
    names: dict[tuple[int, ...], int] = {}
    rng = random.Random(data.draw(st.integers(0, 1000)))

    def hashes(prompt: list[int]) -> list[int]:
        return [names.setdefault(tuple(prompt[: end + 1]), rng.getrandbits(60)) for end in range(len(prompt))]

    prompts = st.lists(st.integers(0, 1), min_size=1, max_size=8).map(hashes)
    tidying = data.draw(st.sampled_from([1, 64]))
    with mock.patch.object(pages, "_PAGES_PER_TIDYING", tidying), mock.patch.object(pages, "_SHARD_PAGES", 64):
        index = KvIndex(data.draw(st.sampled_from([1000, 100_000])))
        held: dict[Holder, set[int]] = {A: set(), B: set(), C: set()}
        for _ in range(data.draw(st.integers(1, 30))):
            holder = data.draw(st.sampled_from([A, B, C]))
            own = held[holder]
            match data.draw(st.sampled_from(["stored", "stored", "removed", "cleared", "forgotten"])):
                case "stored":
                    fresh = data.draw(prompts)
                    index.stored(holder, fresh)
                    own.update(fresh)
                case "removed" if own:
                    gone = data.draw(st.lists(st.sampled_from(sorted(own)), unique=True))
                    assert index.removed(holder, gone) == 0
                    own.difference_update(gone)
                case "cleared":
                    index.cleared(holder)
                    own.clear()
                case "forgotten":
                    index.forget("b")
                    held[B], held[C] = set(), set()
                case _:
                    pass
            prompt = data.draw(prompts)
            assert index.overlap(prompt) == naive_overlap(held, prompt)
        assert index.pages() == {holder: own for holder, own in held.items() if own}


@pytest.mark.peers(11)
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_the_bound_makes_it_know_less_and_never_more(seed: int) -> None:
    rng = random.Random(seed)
    index = KvIndex(50)
    held: dict[Holder, set[int]] = {A: set(), B: set(), C: set()}
    for _ in range(60):
        holder, start = rng.choice([A, B, C]), rng.randrange(300)
        index.stored(holder, range(start, start + 5))
        held[holder].update(range(start, start + 5))
        assert len(index) <= 50
        for found, own in index.pages().items():
            assert own <= held[found]
    assert index.evicted


def test_the_longest_unused_pages_go_first() -> None:
    index = KvIndex(100)
    index.stored(A, range(1, 101))
    for _ in range(7):
        assert index.overlap(range(1, 51)) == {A: 50}
    index.stored(B, range(201, 241))
    assert index.overlap(range(1, 51)) == {A: 50}, "what was asked for lately is kept"
    assert index.overlap(range(201, 241)) == {B: 40}
    assert index.overlap([51]) == {}
    assert (len(index), index.evicted) == (100 - index.evicted + 40, index.evicted)


def test_what_was_sent_somewhere_is_assumed_there_for_a_while() -> None:
    clock = Clock()
    index = KvIndex(assumed_seconds=100, clock=clock)
    index.routed(A, [1, 2, 3])
    assert index.overlap([1, 2, 3, 4]) == {A: 3}
    clock.now = 49
    assert index.overlap([1]) == {A: 1}
    index.routed(A, [1, 2])
    clock.now = 60
    index.routed(A, [1, 9])
    assert index.overlap([1, 2, 3]) == {A: 3}
    clock.now = 111
    assert index.overlap([1, 2]) == {A: 1}, "page 2 was last sent there at 49"
    assert index.overlap([1, 9]) == {A: 2}
    clock.now = 300
    assert index.overlap([1]) == {}
    clock.now = 301
    assert index.overlap([1]) == {}
    assert index._assumed == {}


def test_no_more_is_assumed_than_the_pool_holds() -> None:
    index = KvIndex()
    for start in range(0, 10_000, 10):
        index.routed(A, range(start + 1, start + 11), capacity=100)
    [own] = index.pages().values()
    assert 50 <= len(own) <= 100
    assert own == set(range(10_001 - len(own), 10_001)), "the latest"


def test_events_take_the_place_of_what_was_assumed() -> None:
    index = KvIndex()
    index.routed(A, [1, 2, 3])
    index.stored(A, [1])
    assert index.overlap([1, 2, 3]) == {A: 3}
    index.not_assumed(A)
    assert index.overlap([1, 2, 3]) == {A: 1}
