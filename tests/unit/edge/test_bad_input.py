"""Bad input gets a status of 4xx and OpenAI's error body that names the field, and never reaches the frontend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.frontend.edge import EdgeOptions, values
from tests.unit.edge.fakes import ScriptedGeneration
from tests.unit.edge.harness import (
    BODIES,
    CHAT,
    COMPLETION,
    COMPLETIONS,
    CONVERSATION,
    ROUTES,
    error_of,
    in_memory,
    refused,
    served,
)

JSON = {"content-type": "application/json"}

ON_BOTH: list[tuple[str, object]] = [
    ("model", None),
    ("model", ""),
    ("model", 7),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", []),
    ("top_p", {}),
    ("top_k", 1.5),
    ("top_k", 2**63),
    ("min_p", "0.1"),
    ("priority", 2**31),
    ("priority", "high"),
    ("min_tokens", True),
    ("max_tokens", "16"),
    ("max_tokens", 16.5),
    ("max_tokens", 2**70),
    ("max_tokens", -(2**63) - 1),
    ("seed", "x"),
    ("seed", 2**64),
    ("frequency_penalty", "a"),
    ("presence_penalty", "a"),
    ("repetition_penalty", "a"),
    ("ignore_eos", 1),
    ("ignore_eos", "true"),
    ("skip_special_tokens", "no"),
    ("stop", 5),
    ("stop", {}),
    ("stop_token_ids", 5),
    ("stop_token_ids", [1] * 65),
    ("stop", ["a"] * 17),
    ("stream", "yes"),
    ("stream", 1),
    ("stream_options", {"include_usage": True}),
    ("stream_options", True),
    ("user", 5),
    ("n", 0),
    ("n", 129),
    ("n", True),
    ("n", "1"),
    ("logit_bias", []),
    ("logit_bias", {str(token): 0 for token in range(1025)}),
    ("logit_bias", {"4294967296": 1}),
    ("logprobs", "5"),
    ("temperature", -0.1),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("min_p", 1.1),
    ("min_tokens", -1),
    ("max_tokens", 0),
    ("seed", -1),
    ("frequency_penalty", 2.1),
    ("presence_penalty", -2.1),
    ("repetition_penalty", 0),
    ("stop_token_ids", {}),
    ("regex", ""),
    ("ebnf", 5),
    ("response_format", "json"),
    ("response_format", []),
    # Other names of what is supported.
    ("guided_regex", "a"),
    ("structured_outputs", {}),
    # Fields that other servers take, and one that nobody does.
    ("guided_json", {}),
    ("lora_path", "x"),
    ("priorities", 1),
    ("temprature", 0.5),
]
ON_COMPLETIONS: list[tuple[str, object]] = [
    ("prompt", None),
    ("prompt", 5),
    ("prompt", {}),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", ["a"] * 129),
    ("prompt", [[1], []]),
    ("prompt", [[1], 2]),
    ("prompt", ["a", 1]),
    ("prompt", [1, "a"]),
    ("prompt", [1.0]),
    ("prompt", [True]),
    ("prompt", [-1]),
    ("prompt", [2**32]),
    ("prompt", [[1, "a"]]),
    ("prompt", [None]),
    ("echo", "yes"),
    ("best_of", 2),
    ("suffix", "end"),
    ("logprobs", -1),
    ("logprobs", 21),
    ("logprobs", True),
    ("json_schema", {"type": "object"}),
    ("tools", []),
    ("max_completion_tokens", 5),
    ("messages", []),
]
ON_CHAT: list[tuple[str, object]] = [
    ("messages", None),
    ("messages", []),
    ("messages", "Hi"),
    ("messages", {}),
    ("max_completion_tokens", "5"),
    ("logprobs", 5),
    ("top_logprobs", 2),
    ("top_logprobs", 21),
    ("tools", {}),
    ("tools", [{"type": "function", "function": {"name": "f"}}] * 129),
    ("tool_choice", "auto"),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("parallel_tool_calls", "no"),
    ("function_call", "auto"),
    ("function_call", {"name": "f"}),
    ("audio", {"format": "wav", "voice": "x"}),
    ("prediction", {"type": "content", "content": "x"}),
    ("prompt_cache_retention", "24h"),
    ("service_tier", "flex"),
    ("verbosity", "high"),
    ("web_search_options", {}),
    ("reasoning_effort", "extreme"),
    ("reasoning_effort", 0.5),
    ("chat_template_kwargs", []),
    ("json_schema", "{}"),
    ("metadata", {str(key): "b" for key in range(17)}),
    ("continue_final_message", True),
    ("functions", [{}]),
    ("modalities", ["text", "audio"]),
    ("audio", {}),
    ("store", True),
    ("prompt", "x"),
]
CASES = (
    [(route, name, value) for route in ROUTES for name, value in ON_BOTH]
    + [(COMPLETIONS, name, value) for name, value in ON_COMPLETIONS]
    + [(CHAT, name, value) for name, value in ON_CHAT]
)


@pytest.mark.parametrize(("route", "name", "value"), CASES)
async def test_a_bad_field_is_refused_by_name(route: str, name: str, value: object) -> None:
    error = await refused(ScriptedGeneration(), route, **{name: value})
    assert error["param"] == name
    assert error["message"].startswith(f"{name}: ")
    assert error["type"] == "invalid_request_error"
    assert error["code"] in {"invalid_field", "unsupported_field"}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": "Hi"}, "messages[1].role"),
        ({"role": "wizard", "content": "Hi"}, "messages[1].role"),
        ({"role": "function", "content": "Hi", "name": "f"}, "messages[1].role"),
        ({"role": "tool", "content": "Hi"}, "messages[1].tool_call_id"),
        ({"role": "tool", "content": "Hi", "tool_call_id": "1", "name": "f"}, "messages[1].name"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ({"role": "user", "content": []}, "messages[1].content"),
        ({"role": "user", "content": ["Hi"]}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[1].content"),
        ({"role": "user", "content": "Hi", "name": 5}, "messages[1].name"),
        ({"role": "user", "content": "Hi", "tool_calls": []}, "messages[1].tool_calls"),
        ({"role": "assistant"}, "messages[1].content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages[1].content"),
        ({"role": "assistant", "content": "Hi", "refusal": "no"}, "messages[1].refusal"),
        ({"role": "assistant", "content": "Hi", "audio": {"id": "a"}}, "messages[1].audio"),
        ({"role": "assistant", "function_call": {"name": "f", "arguments": ""}}, "messages[1].function_call"),
        ({"role": "assistant", "tool_calls": [{"id": "1", "type": "custom"}]}, "messages[1].tool_calls[0].type"),
        ("Hi", "messages[1]"),
    ],
)
async def test_a_bad_message_is_refused_by_its_place(message: object, param: str) -> None:
    error = await refused(ScriptedGeneration(), CHAT, messages=[{"role": "user", "content": "Hi"}, message])
    assert error["param"] == param


@pytest.mark.parametrize(("name", "place"), [("stop", "stop[1]"), ("stop_token_ids", "stop_token_ids[1]")])
async def test_a_bad_entry_is_refused_by_its_place(name: str, place: str) -> None:
    good: object = "a" if name == "stop" else 1
    assert (await refused(ScriptedGeneration(), COMPLETIONS, **{name: [good, None]}))["param"] == place


@pytest.mark.parametrize("prompt", [[1, 2, 3, 4], [[1, 2, 3, 4]]])
async def test_more_token_ids_than_any_model_takes_are_refused(monkeypatch: pytest.MonkeyPatch, prompt: object) -> None:
    monkeypatch.setattr(values, "MAX_TOKEN_IDS", 3)
    assert (await refused(ScriptedGeneration(), COMPLETIONS, prompt=prompt))["param"] == "prompt"


@pytest.mark.parametrize("option", [{"include_obfuscation": True}, {"usage": True}])
async def test_an_unsupported_stream_option_is_refused_by_name(option: dict[str, bool]) -> None:
    error = await refused(ScriptedGeneration(), CHAT, stream=True, stream_options=option)
    assert error["param"] == f"stream_options.{next(iter(option))}"


SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"response_format": SCHEMA, "regex": "a"}, "regex"),
        ({"ebnf": "root ::= x", "regex": "a"}, "ebnf"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice.type"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice.type"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
    ],
)
async def test_a_bad_part_of_a_field_is_refused_by_its_place(fields: dict[str, Any], param: str) -> None:
    error = await refused(ScriptedGeneration(), CHAT, **fields)
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"echo": True, "logprobs": 0}, "echo"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"n": 65, "prompt": ["a", "b"]}, "n"),
        ({"json_schema": "{}", "response_format": SCHEMA}, "json_schema"),
    ],
)
async def test_fields_that_contradict_each_other_on_completions(fields: dict[str, Any], param: str) -> None:
    assert (await refused(ScriptedGeneration(), COMPLETIONS, **fields))["param"] == param


async def test_continuing_with_a_new_turn_is_a_contradiction() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "He"}]
    error = await refused(
        ScriptedGeneration(), CHAT, messages=messages, continue_final_message=True, add_generation_prompt=True
    )
    assert error["param"] == "continue_final_message"


async def test_two_different_limits_contradict_each_other() -> None:
    error = await refused(ScriptedGeneration(), CHAT, max_tokens=5, max_completion_tokens=6)
    assert error["param"] == "max_tokens"


async def test_the_message_names_every_bad_field() -> None:
    error = await refused(ScriptedGeneration(), CHAT, temperature="hot", store=True, guided_regex="a")
    for name in ("temperature", "store", "guided_regex"):
        assert f"{name}: " in error["message"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"not json",
        b'{"model": "a"} trailing',
        b'{"model": "\xff\xfe"}',
        b'{"model": "\\ud800"}',
        b'{"temperature": NaN}',
        b'{"temperature": 1e999}',
        b"[" * 5000 + b"]" * 5000,
        b"null",
        b"[]",
        b"[{}]",
        b'"text"',
        b"5",
        b"false",
    ],
)
async def test_a_body_that_is_no_json_object_is_refused(route: str, content: bytes) -> None:
    generation = ScriptedGeneration()
    async with in_memory(generation) as client:
        response = await client.post(route, content=content, headers=JSON)
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"] is None
    assert "JSON" in error["message"]
    assert generation.requests == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
async def test_another_content_type_is_415(headers: dict[str, str]) -> None:
    generation = ScriptedGeneration()
    async with in_memory(generation) as client:
        response = await client.post(COMPLETIONS, content=b'{"model": "a", "prompt": "b"}', headers=headers)
    assert response.status_code == 415
    assert error_of(response)["code"] == "unsupported_media_type"
    assert generation.requests == []


async def test_a_charset_parameter_is_no_other_content_type() -> None:
    async with in_memory(ScriptedGeneration()) as client:
        headers = {"content-type": "Application/JSON; charset=utf-8"}
        response = await client.post(COMPLETIONS, content=b'{"model": "a", "prompt": "b"}', headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "route_not_found"),
        ("POST", "/v1/rerank", 404, "route_not_found"),
        ("GET", "/v1/models/unknown", 404, "model_not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("POST", "/v1/completions/", 404, "route_not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("PUT", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/org/tiny", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
async def test_an_unknown_route_or_method(method: str, path: str, status: int, code: str) -> None:
    async with in_memory(ScriptedGeneration()) as client:
        response = await client.request(method, path)
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert ("allow" in response.headers) == (status == 405)


class TestBodySize:
    LIMIT = 1000

    def body(self, size: int) -> bytes:
        empty = b'{"model": "a", "prompt": ""}'
        return empty.replace(b'""', b'"' + b"x" * (size - len(empty)) + b'"')

    @pytest.mark.parametrize("chunked", [False, True])
    @pytest.mark.parametrize(("over", "status"), [(0, 200), (1, 413)])
    async def test_a_body_over_the_limit_is_413(self, chunked: bool, over: int, status: int) -> None:
        generation = ScriptedGeneration()
        body = self.body(self.LIMIT + over)

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(body), 100):
                yield body[start : start + 100]

        async with in_memory(generation, EdgeOptions(max_body_bytes=self.LIMIT)) as client:
            content = pieces() if chunked else body
            response = await client.post(COMPLETIONS, content=content, headers=JSON)
        assert response.status_code == status
        assert len(generation.requests) == (1 if status == 200 else 0)
        if status == 413:
            assert error_of(response)["code"] == "body_too_large"

    async def test_an_endless_body_is_refused_while_it_is_read(self) -> None:
        async with served(ScriptedGeneration(), EdgeOptions(max_body_bytes=self.LIMIT)) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: edge\r\ncontent-type: application/json\r\n")
            writer.write(b"transfer-encoding: chunked\r\n\r\n")
            writer.write((b"400\r\n" + b"x" * 1024 + b"\r\n") * 2)
            async with asyncio.timeout(5):
                answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 413 ")
            writer.close()


async def test_a_body_that_does_not_arrive_is_408() -> None:
    async with served(ScriptedGeneration(), EdgeOptions(body_timeout_seconds=0.2)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: edge\r\ncontent-type: application/json\r\n")
        writer.write(b'content-length: 100\r\n\r\n{"model":')
        async with asyncio.timeout(5):
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"body_timeout"' in answer
        writer.close()


@pytest.mark.parametrize("name", ["max_body_bytes", "body_timeout_seconds", "write_timeout_seconds"])
def test_a_limit_of_zero_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        EdgeOptions(**{name: 0})


def test_the_smallest_bodies_are_good() -> None:
    """The tables above change one field of these."""
    smallest: dict[str, dict[str, Any]] = {COMPLETIONS: COMPLETION, CHAT: CONVERSATION}
    assert smallest == BODIES
