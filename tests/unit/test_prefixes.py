"""Equal prefixes have equal names on every machine; whatever tells KV caches apart tells their names apart."""

from __future__ import annotations

import subprocess
import sys
from array import array

import pytest

from services.prefixes import hashed_page_size, iter_prefix_hashes, prefix_hashes, root

PROMPT = list(range(5000, 5070))


def test_one_hash_for_every_full_page_chained_from_the_beginning() -> None:
    hashes = prefix_hashes(PROMPT, 16)
    assert len(hashes) == 4
    assert prefix_hashes(PROMPT[:48], 16) == hashes[:3]
    changed = prefix_hashes([*PROMPT[:16], 1, *PROMPT[17:]], 16)
    assert changed[0] == hashes[0]
    assert set(changed[1:]).isdisjoint(hashes), "a page's name depends on everything before it"
    assert prefix_hashes(PROMPT[16:32], 16) != hashes[1:2], "the same tokens elsewhere are another page"
    assert prefix_hashes(PROMPT[:15], 16) == []


def test_they_are_60_bits() -> None:
    hashes = prefix_hashes(range(16 * 2000), 16)
    assert len(set(hashes)) == 2000
    assert max(hashes) < 2**60
    assert max(hashes) >= 2**59
    assert sys.getsizeof(max(hashes)) == 32


@pytest.mark.parametrize(
    "other",
    [
        prefix_hashes(PROMPT, 16, lora_id=0),
        prefix_hashes(PROMPT, 16, lora_id=1),
        prefix_hashes(PROMPT, 16, lora_name="1"),
        prefix_hashes(PROMPT, 16, cache_salt="1"),
        prefix_hashes(PROMPT, 16, lora_name="1", cache_salt="1"),
        prefix_hashes(PROMPT, 32),
    ],
)
def test_adapter_salt_and_page_size_make_other_names(other: list[int]) -> None:
    assert set(other).isdisjoint(prefix_hashes(PROMPT, 16))
    assert len(set(other)) == len(other)


def test_parts_of_the_root_cannot_be_shifted_into_each_other() -> None:
    assert root(16, lora_name="ab", cache_salt="c") != root(16, lora_name="a", cache_salt="bc")
    assert root(1, lora_id=6) != root(16)


def test_another_process_gives_the_same_names() -> None:
    program = "from services.prefixes import prefix_hashes; print(prefix_hashes(range(32), 16, cache_salt='s'))"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == str(prefix_hashes(range(32), 16, cache_salt="s"))


def test_names_never_change() -> None:
    """Workers and frontends of different releases compare them."""
    assert prefix_hashes(range(32), 16) == [561450435825288536, 38356502692320278]


def test_whoever_stops_early_hashes_no_further() -> None:
    hashes = iter_prefix_hashes(PROMPT, 16, root(16))
    assert [next(hashes), next(hashes)] == prefix_hashes(PROMPT, 16)[:2]


def test_tokens_may_be_a_list_or_an_array() -> None:
    assert prefix_hashes(array("I", PROMPT), 16) == prefix_hashes(array("q", PROMPT), 16) == prefix_hashes(PROMPT, 16)


@pytest.mark.parametrize(("engine", "hashed"), [(1, 16), (2, 16), (3, 18), (16, 16), (17, 17), (64, 64)])
def test_small_pages_are_hashed_together(engine: int, hashed: int) -> None:
    assert hashed_page_size(engine) == hashed
