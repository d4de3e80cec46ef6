"""What a client has not read is counted in bytes, and costs no more than the limit."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest

from kvbaton.errors import Reason, RequestError
from services.frontend.request.api import Finished, FinishReason, Output, ToolCallDelta
from services.frontend.request.outbox import LOGPROB_BYTES, OUTPUT_BYTES, Outbox, size_of
from services.requests import TokenLogprob, TopLogprob

TOKENS = Output([1, 2, 3])
LAST = Output([4], finished=Finished(FinishReason.LENGTH, prompt_tokens=1, completion_tokens=4))
CANCELLED = RequestError(grpc.StatusCode.CANCELLED, Reason.CANCELLED, "cancelled")


def overflowing(box: Outbox) -> RequestError:
    with pytest.raises(RequestError) as caught:
        box.put(TOKENS)
    return caught.value


def test_an_output_counts_its_tokens_its_text_in_utf8_and_a_constant() -> None:
    assert size_of(Output([1, 2, 3], "é!")) == 3 * 4 + 3 + OUTPUT_BYTES


async def test_bytes_are_counted_until_they_are_taken() -> None:
    box = Outbox(1000)
    box.put(TOKENS)
    box.put(LAST)
    assert box.buffered_bytes == size_of(TOKENS) + size_of(LAST)
    assert await box.get() is TOKENS
    assert box.buffered_bytes == size_of(LAST)
    assert await box.get() is LAST
    assert box.buffered_bytes == 0


async def test_a_reader_that_keeps_up_is_never_cut_off() -> None:
    box = Outbox(size_of(TOKENS))
    for _ in range(100):
        box.put(TOKENS)
        assert await box.get() is TOKENS


def test_one_output_fits_however_large_it_is() -> None:
    box = Outbox(1)
    box.put(TOKENS)
    assert box.buffered_bytes == size_of(TOKENS)


def test_the_last_output_fits_because_nothing_comes_behind_it() -> None:
    box = Outbox(size_of(TOKENS))
    box.put(TOKENS)
    box.put(LAST)


async def test_too_much_unread_drops_everything_and_leaves_the_error() -> None:
    box = Outbox(2 * size_of(TOKENS))
    box.put(TOKENS)
    box.put(TOKENS)
    error = overflowing(box)
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.CLIENT_TOO_SLOW)
    assert str(2 * size_of(TOKENS)) in error.message
    assert box.buffered_bytes == 0
    box.fail(error)
    with pytest.raises(RequestError) as caught:
        await box.get()
    assert caught.value is error


async def test_another_error_comes_behind_what_is_buffered() -> None:
    box = Outbox(1000)
    box.put(TOKENS)
    box.fail(CANCELLED)
    assert await box.get() is TOKENS
    with pytest.raises(RequestError, match="cancelled"):
        await box.get()


def test_only_an_overflow_interrupts_the_reader_and_only_once_its_error_is_there() -> None:
    told: list[str] = []
    cancelled, box = Outbox(1), Outbox(1)
    for each in (cancelled, box):
        each.when_cut_off(lambda: told.append("cut off"))
    cancelled.fail(CANCELLED)
    assert not told
    box.put(TOKENS)
    error = overflowing(box)
    assert not told
    box.fail(error)
    assert told == ["cut off"]


def test_one_bound_holds_for_all_choices_and_only_the_last_output_of_all_is_above_it() -> None:
    box = Outbox(2 * size_of(TOKENS), choices=3)
    for choice in range(2):
        box.put(replace(LAST, index=choice))
    with pytest.raises(RequestError):
        box.put(TOKENS)
    box = Outbox(size_of(LAST), choices=2)
    box.put(LAST)
    box.put(replace(LAST, index=1))
    box = Outbox(size_of(LAST), choices=3)
    box.put(LAST)
    with pytest.raises(RequestError):
        box.put(replace(LAST, index=1))


async def test_other_choices_say_nothing_more_once_one_has_failed() -> None:
    box = Outbox(1000, choices=2)
    box.put(TOKENS)
    box.fail(CANCELLED)
    box.put(TOKENS)
    assert await box.get() is TOKENS
    with pytest.raises(RequestError, match="cancelled"):
        await box.get()


def test_log_probabilities_reasoning_and_calls_count_too() -> None:
    top = (TopLogprob(1, -0.1), TopLogprob(2, -2.0))
    plain = size_of(TOKENS)
    assert size_of(replace(TOKENS, logprobs=[TokenLogprob(1, -0.1, top)])) == plain + 3 * LOGPROB_BYTES
    assert size_of(replace(TOKENS, reasoning="é")) == plain + 2
    assert size_of(replace(TOKENS, tool_calls=[ToolCallDelta(0, arguments="{}")])) == plain + 2 + OUTPUT_BYTES


async def test_nothing_is_kept_for_a_reader_that_is_gone() -> None:
    told: list[str] = []
    box = Outbox(1)
    box.when_cut_off(lambda: told.append("cut off"))
    box.put(TOKENS)
    box.close()
    box.put(TOKENS)
    box.put(TOKENS)
    assert box.buffered_bytes == 0
    box.fail(CANCELLED)
    await asyncio.sleep(0)
    assert not told
