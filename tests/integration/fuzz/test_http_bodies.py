"""Request bodies that no client should send: refused with OpenAI's error body, never a 5xx."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from tests.support.fuzz_target import EMBEDDING_MODEL, MODEL, Target

GROWTH_BYTES = 64 * 2**20
DEPTH = 100_000
# Deep enough for Python's recursion limit, and not refused by every JSON parser.
DEPTH_OF_SOME_PARSERS = 990
LONG = 2_000_000

# What each route takes; of a route that is not here only the method and the media type are tried.
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": MODEL, "prompt": "Good morning", "max_tokens": 2},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/embeddings": {"model": EMBEDDING_MODEL, "input": "Good morning"},
    "/v1/responses": {"model": MODEL, "input": "Hi", "max_output_tokens": 2},
    "/tokenize": {"model": MODEL, "prompt": "Good morning"},
    "/detokenize": {"model": MODEL, "tokens": [72, 105]},
}
INPUTS = ("prompt", "messages", "input", "tokens")

# No JSON at all, or not in UTF-8.
NO_JSON = {
    "nothing": b"",
    "space": b"  \n ",
    "random": random.Random(1).randbytes(3000),
    "zeros": bytes(2000),
    "a truncated body": b'{"model": "fuzz',
    "an unclosed list": b'{"messages": [',
    "two values": b"{} {}",
    "a trailing comma": b'{"model": "fuzzed",}',
    "a comment": b'{"model": "fuzzed" /* the model */}',
    "single quotes": b"{'model': 'fuzzed'}",
    "a key without quotes": b'{model: "fuzzed"}',
    "a byte order mark": b'\xef\xbb\xbf{"model": "fuzzed"}',
    "UTF-16": '{"model": "fuzzed"}'.encode("utf-16"),
    "UTF-32": '{"model": "fuzzed"}'.encode("utf-32"),
    "bytes that are no UTF-8": b'{"model": "\xff\xfe"}',
    "an overlong encoding": b'{"model": "\xc0\xaf"}',
    "an encoded surrogate": b'{"model": "\xed\xa0\x80"}',
    "a raw control character": b'{"model": "a\x00b"}',
    "a bad escape": b'{"model": "\\x41"}',
    "half an escape": b'{"model": "\\u12"}',
    "deep lists": b"[" * DEPTH + b"]" * DEPTH,
    "deep lists, unclosed": b"[" * DEPTH,
    "deep objects": b'{"a":' * DEPTH + b"1" + b"}" * DEPTH,
    "gzip": gzip.compress(b'{"model": "fuzzed"}'),
}
# JSON, and no request.
NO_REQUEST = {
    "null": b"null",
    "a number": b"17",
    "a string": b'"fuzzed"',
    "a list": b"[]",
    "a list of requests": b'[{"model": "fuzzed"}]',
    "an empty object": b"{}",
    "an unknown field": b'{"model": "fuzzed", "constructor": {"prototype": 1}}',
    "many unknown fields": json.dumps({f"field{index}": index for index in range(50_000)}).encode(),
    "a long key": json.dumps({"k" * LONG: 1}).encode(),
    "a long model": json.dumps({"model": "m" * LONG}).encode(),
    "an empty key": b'{"": ""}',
}
# Values as JSON text, for each field of a good request, and for a field beside them.
VALUES = {
    "null": "null",
    "true": "true",
    "an empty string": '""',
    "a NUL": '"\\u0000"',
    "a lone surrogate": '"\\ud800"',
    "a lone low surrogate": '"\\udc00 tail"',
    "surrogates in the wrong order": '"\\udc00\\ud800"',
    "a pair of surrogates": '"\\ud83d\\ude00"',
    "a non-character": '"\\uffff"',
    "NaN": "NaN",
    "an infinity": "-Infinity",
    "1e999": "1e999",
    "-1e999": "-1e999",
    "1e-999": "1e-999",
    "minus zero": "-0",
    "-1": "-1",
    "2^31": str(2**31),
    "2^63": str(2**63),
    "2^64": str(2**64),
    "400 digits": "9" * 400,
    "100000 digits": "9" * 100_000,
    "a long fraction": "0." + "1" * 5000,
    "a list": "[]",
    "a list of null": "[null]",
    "a list of lists": "[[], [[]]]",
    "mixed": '["a", 1, null, {}]',
    "an object": "{}",
    "numbers beyond any token id": f"[{2**32}]",
    "negative token ids": "[-1, -2]",
    "fractions for token ids": "[1.5]",
    "as deep as can be forwarded": "[" * 240 + "]" * 240,
    "deep": "[" * DEPTH_OF_SOME_PARSERS + "]" * DEPTH_OF_SOME_PARSERS,
    "deep objects": '{"a":' * DEPTH_OF_SOME_PARSERS + "1" + "}" * DEPTH_OF_SOME_PARSERS,
}
# Where fields that take an object take any value inside of it.
INSIDE = {
    "response_format": '{"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": %s}}}',
    "tools": '[{"type": "function", "function": {"name": "f", "parameters": {"const": %s}}}]',
    "chat_template_kwargs": '{"anything": %s}',
    "text": '{"format": {"type": "json_schema", "name": "n", "schema": {"const": %s}}}',
}
# Where a value of any shape is let through to what comes behind the body's schema.
OPEN_FIELDS = (
    "metadata",
    "logit_bias",
    "stop",
    "tools",
    "tool_choice",
    "response_format",
    "chat_template_kwargs",
    "stream_options",
    "text",
)

Body = dict[str, Any]


@pytest.fixture
def http(target: Target) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=target.http_url, timeout=30, headers={"content-type": "application/json"}) as client:
        yield client


def routes(http: httpx.Client) -> list[str]:
    """Every route with a POST."""
    paths = http.get("/openapi.json").raise_for_status().json()["paths"]
    return [path for path, methods in paths.items() if "post" in methods]


def post(http: httpx.Client, path: str, content: bytes, label: str, **headers: str) -> httpx.Response:
    """The answer, which is none of the server's own failures and has the right shape."""
    response = http.post(path, content=content, headers=headers)
    where = f"{label} to {path}: {response.status_code} {response.text[:300]}"
    assert 200 <= response.status_code < 500, where
    if response.status_code >= 400:
        assert response.headers["content-type"].startswith("application/json"), where
        error = response.json()["error"]
        assert isinstance(error["message"], str), where
        assert error["message"], where
        assert isinstance(error["type"], str), where
        assert {"param", "code"} <= error.keys(), where
    return response


def refused(http: httpx.Client, path: str, content: bytes, label: str, **headers: str) -> None:
    response = post(http, path, content, label, **headers)
    assert 400 <= response.status_code < 500, f"{label} to {path}: {response.status_code}"


async def test_what_is_no_request_is_refused(target: Target, http: httpx.Client) -> None:
    def attack() -> None:
        for path in routes(http):
            for label, content in {**NO_JSON, **NO_REQUEST}.items():
                refused(http, path, content, label)

    async with target.unharmed(growth_bytes=GROWTH_BYTES):
        await asyncio.to_thread(attack)


async def test_no_value_of_any_field_is_a_failure_of_the_server(target: Target, http: httpx.Client) -> None:
    def attack() -> None:
        for path in routes(http):
            good = GOOD.get(path, {})
            for field in {*good, *OPEN_FIELDS, "no such field"}:
                for label, value in VALUES.items():
                    post(http, path, with_value(good, field, value), f"{label} as {field}")
                    if field in INSIDE:
                        post(http, path, with_value(good, field, INSIDE[field] % value), f"{label} in {field}")

    async with target.unharmed(growth_bytes=GROWTH_BYTES):
        await asyncio.to_thread(attack)


async def test_a_key_twice_is_one_request_or_none(target: Target, http: httpx.Client) -> None:
    def attack() -> None:
        for path in routes(http):
            for field, value in GOOD.get(path, {}).items():
                body = json.dumps(GOOD[path]).removesuffix("}")
                post(http, path, f"{body}, {json.dumps(field)}: {json.dumps(value)}}}".encode(), f"{field} twice")
                post(http, path, f"{body}, {json.dumps(field)}: null}}".encode(), f"{field} twice, then null")

    async with target.unharmed(growth_bytes=GROWTH_BYTES):
        await asyncio.to_thread(attack)


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json-patch+json",
        "application/octet-stream",
        "*/*",
        ";",
        "application/",
        "application/json" + ", application/json" * 50,
    ],
)
async def test_another_media_type_is_refused(target: Target, http: httpx.Client, content_type: str) -> None:
    def attack() -> None:
        for path in routes(http):
            refused(http, path, json.dumps(GOOD.get(path, {})).encode(), "good", **{"content-type": content_type})

    await asyncio.to_thread(attack)


async def test_a_compressed_body_is_refused_or_bounded(target: Target, http: httpx.Client) -> None:
    """A megabyte of gzip may be a gigabyte."""
    bomb = gzip.compress(b'{"model": "' + bytes(64 * 2**20))
    async with target.unharmed(growth_bytes=GROWTH_BYTES):
        for encoding in ("gzip", "deflate", "br", "identity, gzip"):
            for path in await asyncio.to_thread(routes, http):
                await asyncio.to_thread(refused, http, path, bomb, encoding, **{"content-encoding": encoding})


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=12), inner, max_size=6),
    max_leaves=25,
)


@st.composite
def spoiled_requests(draw: st.DrawFn) -> tuple[str, Body]:
    """A route and a good request of it, some of whose fields have any value at all."""
    path = draw(st.sampled_from(sorted(GOOD)))
    body: Body = dict(GOOD[path])
    spoiled = st.sampled_from(sorted(body)) | st.sampled_from(OPEN_FIELDS) | st.text(max_size=12)
    for field in draw(st.lists(spoiled, min_size=1, max_size=3)):
        body[field] = draw(anything)
    return path, body


async def test_drawn_requests_are_no_failure_of_the_server(target: Target, http: httpx.Client, seed: int) -> None:
    bounded = settings(
        max_examples=120, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
    )

    @hypothesis_seed(seed)
    @bounded
    @given(spoiled_requests())
    def attack(drawn: tuple[str, Body]) -> None:
        path, body = drawn
        content = json.dumps(body).encode(errors="surrogatepass")
        response = http.post(path, content=content)
        assert response.status_code < 500, f"{path} {content!r}: {response.status_code} {response.text}"

    @hypothesis_seed(seed)
    @bounded
    @given(st.sampled_from(sorted(GOOD)), st.binary(max_size=400), st.randoms(use_true_random=False))
    def flip(path: str, noise: bytes, chance: random.Random) -> None:
        body = bytearray(json.dumps(GOOD[path]).encode())
        for byte in noise[:8]:
            body[chance.randrange(len(body))] = byte
        response = http.post(path, content=bytes(body) + noise[8:])
        assert response.status_code < 500, f"{path} {bytes(body)!r}: {response.status_code} {response.text}"

    async with target.unharmed(growth_bytes=GROWTH_BYTES):
        await asyncio.to_thread(attack)
        await asyncio.to_thread(flip)


def with_value(good: Body, field: str, value: str) -> bytes:
    """The good request, with the JSON text `value` for `field`."""
    others = [f"{json.dumps(name)}: {json.dumps(each)}" for name, each in good.items() if name != field]
    return ("{" + ", ".join([*others, f"{json.dumps(field)}: {value}"]) + "}").encode()
