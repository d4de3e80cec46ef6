"""Connections that no client library would make: slow, cut off, ambiguous, flooding; each ends, and alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Coroutine
from typing import Any

import pytest

from tests.support.fuzz_target import MODEL, Target
from tests.support.raw_http import RawResponse, connected, exchange, request

GROWTH_BYTES = 64 * 2**20
PATH = "/v1/completions"
CONNECTIONS = 150
# A connection that neither side uses; the server's own limits on slow clients are tried elsewhere.
HANG_UP_AFTER = 0.5


def good(**fields: object) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "Good morning", "max_tokens": 4, **fields}).encode()


LONG_ANSWER = good(stream=True, max_tokens=3000, ignore_eos=True)
SMUGGLED = b"GET /live HTTP/1.1\r\nHost: smuggled\r\nConnection: close\r\n\r\n"
HEAD = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n".encode()

# Two readings of one message are a request smuggled past whoever reads it the other way (RFC 9112, 6.3 and 11.2).
AMBIGUOUS = {
    "a length and chunks": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunks and a length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 500\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "two lengths": HEAD + b"Content-Length: 0\r\nContent-Length: 60\r\n\r\n" + SMUGGLED,
    "a list of lengths": HEAD + b"Content-Length: 0, 60\r\n\r\n" + SMUGGLED,
    "a length below zero": HEAD + b"Content-Length: -1\r\n\r\n" + SMUGGLED,
    "a length with a sign": HEAD + b"Content-Length: +0\r\n\r\n" + SMUGGLED,
    "a hexadecimal length": HEAD + b"Content-Length: 0x3b\r\n\r\n" + SMUGGLED,
    "a length of 30 digits": HEAD + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n" + SMUGGLED,
    "a length in other digits": HEAD + "Content-Length: \u0663\r\n\r\n".encode() + SMUGGLED,
    "another coding": HEAD + b"Transfer-Encoding: gzip\r\n\r\n" + SMUGGLED,
    "chunks, then another coding": HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunks twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "a coding almost spelled so": HEAD + b"Transfer-Encoding: xchunked\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
    "a space before the colon": HEAD + b"Transfer-Encoding : chunked\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
    "a folded header": HEAD + b"Transfer-Encoding:\r\n chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "a NUL in a header": HEAD + b"X-Name: a\x00b\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
    "a carriage return in a header": HEAD + b"X-Name: a\rContent-Length: 60\r\nContent-Length: 0\r\n\r\n" + SMUGGLED,
    "a chunk size that is none": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + SMUGGLED,
    "a chunk size below zero": HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n" + SMUGGLED,
    "a chunk size of 40 digits": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n" + SMUGGLED,
    "a chunk longer than it says": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n0\r\n\r\n" + SMUGGLED,
}

FLOODS = {
    "20 000 headers": HEAD + b"".join(b"X-%d: y\r\n" % index for index in range(20_000)) + b"\r\n",
    "a header of a megabyte": HEAD + b"X-Name: " + b"y" * 2**20 + b"\r\n\r\n",
    "a header name of a megabyte": HEAD + b"x" * 2**20 + b": y\r\n\r\n",
    "the same header 5 000 times": HEAD + b"Content-Type: application/json\r\n" * 5_000 + b"\r\n",
    "a path of a megabyte": b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
    "a query of a megabyte": b"GET /live?" + b"a=1&" * 2**18 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
    "a method of a megabyte": b"A" * 2**20 + b" /live HTTP/1.1\r\nHost: h\r\n\r\n",
    "empty lines": b"\r\n" * 2**19,
    "one line without an end": b"G" * 2**22,
    "a chunk extension of a megabyte": HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n1;"
    + b"e" * 2**20
    + b"\r\n{\r\n0\r\n\r\n",
    "trailers of a megabyte": HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"X-T: y\r\n" * 2**17 + b"\r\n",
    "200 000 chunks of a byte": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 200_000 + b"0\r\n\r\n",
}

NOT_HTTP = {
    "random bytes": random.Random(2).randbytes(5_000),
    "zeros": bytes(5_000),
    "TLS": bytes.fromhex("1603010200010001fc0303") + random.Random(3).randbytes(500),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    "HTTP/0.9": b"GET /live\r\n\r\n",
    "HTTP/9.9": b"GET /live HTTP/9.9\r\nHost: h\r\n\r\n",
    "a target that is none": b"GET live HTTP/1.1\r\nHost: h\r\n\r\n",
    "no host": b"GET /live HTTP/1.1\r\nConnection: close\r\n\r\n",
    "two hosts": b"GET /live HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n",
    "another server's target": b"GET http://example.org/live HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
    "CONNECT": b"CONNECT example.org:443 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
    "OPTIONS *": b"OPTIONS * HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
    "TRACE": b"TRACE /live HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
    "a web socket": b"GET /live HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
    "an upgrade to HTTP/2": b"GET /live HTTP/1.1\r\nHost: h\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
    "a path that is no UTF-8": b"GET /v1/models/%ff%fe HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
    "bytes in a path": b"GET /v1/models/\xff\xfe HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
    "dots in a path": b"GET /v1/models/../../etc/passwd HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
    "a NUL in a path": b"GET /v1/models/%00 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
    "bytes in a header": HEAD
    + b"X-Request-Id: \xff\xfe\xed\xa0\x80\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}",
    "a request id of a kilobyte": request(PATH, good(), "X-Request-Id: " + "i" * 1024),
    "trace headers that are none": request(PATH, good(), "traceparent: 00-zz-zz-zz", "tracestate: " + "=," * 500),
}


@pytest.fixture
def port(target: Target) -> int:
    return target.http_port


# The two that RFC 9110 and 9112 give to what a client asks for: another transfer coding, another version.
CLIENT_AT_FAULT = {501, 505}


def check(answers: list[RawResponse], label: str) -> None:
    """The server's own failure is none of the answers."""
    for answer in answers:
        fine = 100 <= answer.status < 500 or answer.status in CLIENT_AT_FAULT
        assert fine, f"{label}: {answer.status} {answer.body[:300]!r}"


async def hung_up(port: int, data: bytes, label: str) -> list[RawResponse]:
    """What comes back for `data` from a client that stays a little and leaves."""
    async with connected(port) as connection:
        with contextlib.suppress(ConnectionError):
            await connection.send(data)
        answers = await connection.responses(quiet=HANG_UP_AFTER, within=2.0)
    check(answers, label)
    return answers


@pytest.mark.parametrize("label", AMBIGUOUS)
async def test_an_ambiguous_length_is_at_most_one_request(port: int, label: str) -> None:
    answers = await hung_up(port, AMBIGUOUS[label], label)
    assert len(answers) <= 1, f"{label}: {[each.status for each in answers]}"
    assert not answers or answers[0].status >= 400


async def test_a_request_without_a_length_has_no_body(port: int) -> None:
    answers = await hung_up(port, HEAD + b"\r\n" + SMUGGLED, "no length at all")
    assert [each.status >= 400 for each in answers] == [True, False]


async def test_floods_are_cut_off(target: Target, port: int) -> None:
    async with target.unharmed(growth_bytes=GROWTH_BYTES):
        for label, data in FLOODS.items():
            await hung_up(port, data, label)


async def test_what_is_no_http_ends_with_its_connection(target: Target, port: int) -> None:
    async with target.unharmed(growth_bytes=GROWTH_BYTES):
        for label, data in NOT_HTTP.items():
            await hung_up(port, data, label)


async def test_pipelined_requests_are_answered_in_order(target: Target, port: int) -> None:
    asked = [b"GET /live", b"GET /v1/models", b"GET /nowhere"] * 20
    lines = b"".join(each + b" HTTP/1.1\r\nHost: h\r\n\r\n" for each in asked)
    async with target.unharmed(growth_bytes=GROWTH_BYTES):
        answers = await exchange(port, lines + request(PATH, good()))
    assert [each.status for each in answers] == [200, 200, 404] * 20 + [200]
    assert answers[-1].json()["object"] == "text_completion"


async def test_a_slow_client_is_served_and_costs_nobody_else(target: Target, port: int) -> None:
    data = request(PATH, good())

    async def slow() -> list[RawResponse]:
        async with connected(port) as connection:
            await connection.send_slowly((data[index : index + 1] for index in range(len(data))), every=0.004)
            return await connection.responses()

    async with target.unharmed(growth_bytes=GROWTH_BYTES):
        slow_ones = [asyncio.create_task(slow()) for _ in range(20)]
        for _ in range(10):
            check(await exchange(port, request(PATH, good())), "beside slow clients")
        for answers in await asyncio.gather(*slow_ones):
            assert [each.status for each in answers] == [200]


async def test_half_closed_and_cut_off_requests_leave_nothing(target: Target, port: int) -> None:
    whole, answer = request(PATH, good()), request(PATH, LONG_ANSWER)

    async def half_closed(data: bytes) -> None:
        async with connected(port) as connection:
            await connection.send(data)
            connection.half_close()
            # The end may also mean that the client has left: then there is no answer.
            check(await connection.responses(within=5.0), "half closed")

    async def cut_off(data: bytes, after: float) -> None:
        async with connected(port) as connection:
            await connection.send(data)
            await asyncio.sleep(after)
            connection.reset()

    async with target.unharmed(growth_bytes=GROWTH_BYTES):
        for length in (1, 20, len(whole) // 2, len(whole) - 1, len(whole)):
            await half_closed(whole[:length])
            await cut_off(whole[:length], after=0.01)
        await half_closed(answer)
        await half_closed(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{")
        for after in (0.0, 0.005, 0.05, 0.2):
            await cut_off(answer, after)


async def test_many_clients_leave_at_once(target: Target, port: int, seed: int) -> None:
    chance = random.Random(seed)

    async def leaves(after: float, cut: int | None, rudely: bool) -> None:
        async with connected(port) as connection:
            await connection.send(request(PATH, LONG_ANSWER)[:cut])
            await asyncio.sleep(after)
            if rudely:
                connection.reset()

    def one() -> Coroutine[Any, Any, None]:
        return leaves(chance.uniform(0, 0.4), chance.choice([None, None, None, 150, 30]), chance.random() < 0.5)

    async with target.unharmed(growth_bytes=GROWTH_BYTES):
        for _ in range(2):
            await asyncio.gather(*(one() for _ in range(CONNECTIONS)))
