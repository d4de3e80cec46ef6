"""The page array, its allocator, and what a sequence reads from it."""

from __future__ import annotations

import pytest

from services.worker.engines.simulated.oracle import new_context, to_bytes
from services.worker.engines.simulated.pages import BlockTable, Mask, PageAllocator, PageArray

TOKENS = list(range(100, 110))
SIZE = 4


def handed_over(mask: Mask, array: PageArray, pages: list[int]) -> None:
    """What prefill does with TOKENS."""
    content = to_bytes(TOKENS + [0] * (-len(TOKENS) % SIZE))
    masked = mask.apply(content)
    for index, page in enumerate(pages):
        array.write(page, masked[index * array.page_bytes : (index + 1) * array.page_bytes])


def test_what_was_masked_for_this_room_and_pair_is_read_back() -> None:
    array, pages = PageArray(8, SIZE), [5, 1, 6]
    handed_over(Mask(7, b"p" * 16, b"d" * 16), array, pages)
    table = BlockTable(array, pages, len(TOKENS), Mask(7, b"p" * 16, b"d" * 16))
    assert table.context().digest() == new_context(to_bytes(TOKENS)).digest()


@pytest.mark.parametrize("mask", [(8, b"p", b"d"), (7, b"x", b"d"), (7, b"p", b"x")])
def test_another_room_or_incarnation_reads_something_else(mask: tuple[int, bytes, bytes]) -> None:
    array, pages = PageArray(8, SIZE), [5, 1, 6]
    handed_over(Mask(7, b"p" * 16, b"d" * 16), array, pages)
    room, prefill, decode = mask
    table = BlockTable(array, pages, len(TOKENS), Mask(room, prefill * 16, decode * 16))
    assert table.context().digest() != new_context(to_bytes(TOKENS)).digest()


def test_a_foreign_write_is_read_even_after_the_context_was() -> None:
    array, pages = PageArray(8, SIZE), [5, 1, 6]
    mask = Mask(7, b"p" * 16, b"d" * 16)
    handed_over(mask, array, pages)
    table = BlockTable(array, pages, len(TOKENS), mask)
    before = table.context().digest()
    array.write(1, bytes(array.page_bytes))
    assert table.context().digest() != before
    handed_over(mask, array, pages)
    assert table.context().digest() == before


@pytest.mark.parametrize("mask", [None, Mask(7, b"p" * 16, b"d" * 16)])
def test_appended_tokens_are_in_the_pages(mask: Mask | None) -> None:
    array, pages = PageArray(8, SIZE), [5, 1, 6, 2]
    table = BlockTable(array, pages, 0, mask)
    for token in TOKENS:
        table.append(token)
        table.context()
    expected = new_context(to_bytes(TOKENS)).digest()
    assert table.context().digest() == expected
    assert BlockTable(array, pages, len(TOKENS), mask).context().digest() == expected


def test_a_closed_sequence_hears_of_nothing() -> None:
    array = PageArray(4, SIZE)
    old, new = BlockTable(array, [1], 4), BlockTable(array, [1], 4)
    old.close()
    before = new.context().digest()
    array.write(1, b"\1" * array.page_bytes)
    assert new.context().digest() != before


def test_only_whole_pages_of_the_array_can_be_written() -> None:
    array = PageArray(4, SIZE)
    for page, content in ((4, bytes(16)), (-1, bytes(16)), (0, bytes(15)), (0, bytes(17))):
        with pytest.raises(ValueError, match="this array has 4 of 16"):
            array.write(page, content)


def test_pages_are_given_once_and_reused_last_in_first_out() -> None:
    allocator = PageAllocator(4)
    first = allocator.allocate(3)
    assert first is not None
    assert len(set(first)) == 3
    assert allocator.allocate(2) is None
    assert allocator.free == 1
    allocator.release(first)
    assert allocator.allocate(3) == first


def test_a_page_is_free_when_its_last_holder_is_gone() -> None:
    allocator = PageAllocator(2)
    pages = allocator.allocate(1)
    assert pages is not None
    allocator.retain(pages)
    allocator.release(pages)
    assert allocator.free == 1
    allocator.release(pages)
    assert allocator.free == 2
    with pytest.raises(ValueError, match="free already"):
        allocator.release(pages)
    with pytest.raises(ValueError, match="is free"):
        allocator.retain(pages)
