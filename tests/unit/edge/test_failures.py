"""A typed error of the frontend becomes a status and an error body before the first output, an event after it."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from kvbaton.errors import Reason, invalid
from tests.unit.edge.fakes import ScriptedGeneration, failure, said
from tests.unit.edge.harness import CHAT, COMPLETIONS, ROUTES, error_of, events_of, post

Code = grpc.StatusCode
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}

STATUSES = [
    (Code.INVALID_ARGUMENT, 400, "invalid_request_error"),
    (Code.OUT_OF_RANGE, 400, "invalid_request_error"),
    (Code.FAILED_PRECONDITION, 400, "invalid_request_error"),
    (Code.UNAUTHENTICATED, 401, "authentication_error"),
    (Code.PERMISSION_DENIED, 403, "permission_error"),
    (Code.NOT_FOUND, 404, "invalid_request_error"),
    (Code.ALREADY_EXISTS, 409, "invalid_request_error"),
    (Code.RESOURCE_EXHAUSTED, 429, "rate_limit_error"),
    (Code.CANCELLED, 499, "request_cancelled"),
    (Code.INTERNAL, 500, "server_error"),
    (Code.UNKNOWN, 500, "server_error"),
    (Code.DATA_LOSS, 500, "server_error"),
    (Code.UNIMPLEMENTED, 501, "server_error"),
    (Code.ABORTED, 502, "server_error"),
    (Code.UNAVAILABLE, 503, "server_error"),
    (Code.DEADLINE_EXCEEDED, 504, "timeout_error"),
]


def test_the_table_has_every_code_of_grpc() -> None:
    assert {code for code, _, _ in STATUSES} == set(Code) - {Code.OK}


@pytest.mark.parametrize(("code", "status", "kind"), STATUSES)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_is_a_status(code: grpc.StatusCode, status: int, kind: str, stream: bool) -> None:
    refusal = failure(code, Reason.NO_DECODE_WORKER, message="nobody there")
    response = await post(ScriptedGeneration(refusal=refusal), CHAT, stream=stream)
    assert response.status_code == status
    assert error_of(response) == {"message": "nobody there", "type": kind, "param": None, "code": "no_decode_worker"}
    assert response.headers["x-request-id"].startswith("chatcmpl-")


@pytest.mark.peers(9)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_output_is_a_status(route: str, stream: bool) -> None:
    generation = ScriptedGeneration(failure(Code.UNAVAILABLE, Reason.WORKER_UNREACHABLE))
    response = await post(generation, route, stream=stream)
    assert response.status_code == 503
    assert error_of(response)["code"] == "worker_unreachable"


@pytest.mark.parametrize("route", ROUTES)
async def test_a_failure_after_it_is_the_last_event_of_a_stream(route: str) -> None:
    generation = ScriptedGeneration(said("Hel"), failure(Code.ABORTED, Reason.LEG_ENDED_EARLY, message="decode died"))
    events = events_of(await post(generation, route, stream=True))
    assert "Hel" in str(events[:-1])
    assert events[-1] == {
        "error": {"message": "decode died", "type": "server_error", "param": None, "code": "leg_ended_early"}
    }


@pytest.mark.peers(9)
@pytest.mark.parametrize("route", ROUTES)
async def test_a_failure_after_it_is_the_status_of_a_plain_answer(route: str) -> None:
    generation = ScriptedGeneration(said("Hel"), failure(Code.DEADLINE_EXCEEDED, Reason.DEADLINE_TOKEN_GAP))
    response = await post(generation, route)
    assert response.status_code == 504
    assert error_of(response)["code"] == "deadline_token_gap"


@pytest.mark.parametrize(
    ("route", "given", "field", "param"),
    [
        (COMPLETIONS, {}, "sampling.max_new_tokens", "max_tokens"),
        (CHAT, {}, "sampling.max_new_tokens", "max_tokens"),
        (CHAT, {"max_tokens": 5}, "sampling.max_new_tokens", "max_tokens"),
        (CHAT, {"max_completion_tokens": 5}, "sampling.max_new_tokens", "max_completion_tokens"),
        (COMPLETIONS, {}, "sampling.min_new_tokens", "min_tokens"),
        (COMPLETIONS, {}, "sampling.top_p", "top_p"),
        (COMPLETIONS, {}, "sampling.stop", "stop"),
        (COMPLETIONS, {}, "text", "prompt"),
        (COMPLETIONS, {}, "token_ids", "prompt"),
        (CHAT, {}, "token_ids", "messages"),
        (CHAT, {}, "chat", "messages"),
        (CHAT, {}, "chat.messages", "messages"),
        (CHAT, {}, "chat.messages[0].role", "messages[0].role"),
        (CHAT, {}, "model", "model"),
        (CHAT, {}, "n", "n"),
        (CHAT, {}, "logprobs", "logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 2}, "logprobs", "top_logprobs"),
        (COMPLETIONS, {"logprobs": 2}, "logprobs", "logprobs"),
        (CHAT, {}, "sampling.logit_bias", "logit_bias"),
        (CHAT, {"response_format": {"type": "json_object"}}, "sampling.json_schema", "response_format"),
        (CHAT, {"response_format": SCHEMA}, "sampling.json_schema", "response_format.json_schema.schema"),
        (COMPLETIONS, {"json_schema": "{}"}, "sampling.json_schema", "json_schema"),
        (COMPLETIONS, {"regex": "("}, "sampling.regex", "regex"),
        (CHAT, {}, "chat.tools", "tools"),
        (CHAT, {}, "chat.tools[1].strict", "tools[1].function.strict"),
        (CHAT, {}, "chat.tools[1].parameters", "tools[1].function.parameters"),
        (CHAT, {}, "chat.tool_choice", "tool_choice"),
        (CHAT, {}, "chat.tool_choice.function", "tool_choice.function.name"),
        (CHAT, {}, "chat.template_arguments", "chat_template_kwargs"),
        (CHAT, {}, "chat.separate_reasoning", "separate_reasoning"),
        (CHAT, {}, "chat.messages[2].tool_call_id", "messages[2].tool_call_id"),
        (CHAT, {}, "chat.messages[2].tool_calls[0].arguments", "messages[2].tool_calls[0].function.arguments"),
        (CHAT, {}, "chat.messages[2].reasoning", "messages[2].reasoning_content"),
    ],
)
async def test_a_refused_field_has_its_openai_name(route: str, given: dict[str, Any], field: str, param: str) -> None:
    response = await post(ScriptedGeneration(refusal=invalid(field, "is bad")), route, **given)
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert error["message"] == f"{param}: is bad"


@pytest.mark.parametrize(
    ("code", "retry_after", "seconds", "milliseconds"),
    [
        (Code.RESOURCE_EXHAUSTED, 2.5, "3", "2500"),
        (Code.RESOURCE_EXHAUSTED, None, "1", "1000"),
        (Code.UNAVAILABLE, 0.2, "1", "200"),
        (Code.UNAVAILABLE, None, None, None),
        (Code.INTERNAL, None, None, None),
    ],
)
async def test_when_to_come_back(
    code: grpc.StatusCode, retry_after: float | None, seconds: str | None, milliseconds: str | None
) -> None:
    response = await post(ScriptedGeneration(refusal=failure(code, retry_after=retry_after)), CHAT)
    assert response.headers.get("retry-after") == seconds
    assert response.headers.get("retry-after-ms") == milliseconds


class TestABugInTheFrontend:
    """Nothing of it is shown, and the client is not left waiting."""

    SECRET = "secret detail"

    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize("stream", [False, True])
    async def test_before_the_first_output(self, route: str, stream: bool) -> None:
        response = await post(ScriptedGeneration(ValueError(self.SECRET)), route, stream=stream)
        assert response.status_code == 500
        assert error_of(response)["code"] == "internal"
        assert self.SECRET not in response.text

    @pytest.mark.parametrize("route", ROUTES)
    async def test_in_a_stream(self, route: str) -> None:
        generation = ScriptedGeneration(said("Hel"), ValueError(self.SECRET))
        events = events_of(await post(generation, route, stream=True))
        assert events[-1]["error"]["code"] == "internal"
        assert self.SECRET not in str(events)
        assert generation.live[0].cancelled.is_set()

    @pytest.mark.parametrize("route", ROUTES)
    async def test_an_answer_that_stops_without_an_end(self, route: str) -> None:
        assert (await post(ScriptedGeneration(said("Hel")), route)).status_code == 500
        events = events_of(await post(ScriptedGeneration(said("Hel")), route, stream=True))
        assert events[-1]["error"]["code"] == "internal"
