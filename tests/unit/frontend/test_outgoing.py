"""What waits to be sent in a session goes in one message; what is aborted before it was sent never goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvbaton import token_ids
from kvbaton.v1 import generate_pb2, session_pb2
from services.frontend.link import outgoing
from services.frontend.link.credits import SessionCredits
from services.frontend.link.outgoing import Outgoing

A_WHILE = 0.05


def leg(number: int, tokens: int = 1) -> session_pb2.SubmitLeg:
    request = generate_pb2.GenerateRequest(token_ids=token_ids.pack([7] * tokens))
    return session_pb2.SubmitLeg(leg=number, request=request)


def numbers(message: session_pb2.ConnectRequest) -> list[int]:
    return [submit.leg for submit in message.submits]


@pytest.fixture
def credits() -> SessionCredits:
    credits = SessionCredits(1)
    credits.heard(session_pb2.ConnectResponse(window=2, free_slots=2))
    return credits


@pytest.fixture
def waiting(credits: SessionCredits) -> Outgoing:
    return Outgoing(session_pb2.OpenSession(), credits)


async def opened(waiting: Outgoing) -> AsyncIterator[session_pb2.ConnectRequest]:
    messages = waiting.messages()
    assert (await anext(messages)).HasField("open")
    return messages


async def test_the_first_message_opens_and_says_nothing_else(waiting: Outgoing) -> None:
    waiting.submit(leg(1))
    messages = waiting.messages()
    first = await anext(messages)
    assert (first.HasField("open"), numbers(first)) == (True, [])
    second = await anext(messages)
    assert (second.HasField("open"), numbers(second)) == (False, [1])


async def test_all_that_waits_goes_in_one_message(waiting: Outgoing, credits: SessionCredits) -> None:
    messages = await opened(waiting)
    waiting.submit(leg(1))
    waiting.submit(leg(2))
    waiting.abort(9)
    credits.ask(1)
    waiting.credits_changed()
    message = await anext(messages)
    assert (list(message.aborts), numbers(message), message.credits.up_to) == ([9], [1, 2], 1)
    waiting.close()
    assert [each async for each in messages] == []


async def test_a_leg_that_is_aborted_before_it_was_sent_is_never_sent(waiting: Outgoing) -> None:
    messages = await opened(waiting)
    waiting.submit(leg(1))
    waiting.submit(leg(2))
    assert waiting.abort(1)
    assert numbers(await anext(messages)) == [2]
    assert not waiting.abort(2), "the worker has to be told"
    assert list((await anext(messages)).aborts) == [2]


async def test_a_large_message_takes_no_more_legs(waiting: Outgoing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "_FULL_BYTES", 1000)
    messages = await opened(waiting)
    for number, tokens in enumerate((100, 200, 5000, 1), start=1):
        waiting.submit(leg(number, tokens))
    assert [numbers(await anext(messages)) for _ in range(3)] == [[1, 2], [3], [4]]


async def test_nothing_is_sent_without_anything_to_say(waiting: Outgoing) -> None:
    messages = await opened(waiting)
    waiting.credits_changed()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(A_WHILE):
            await anext(messages)
