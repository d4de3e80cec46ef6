"""Every field of a request reaches the frontend under its kvbaton name, and only when it was given."""

from __future__ import annotations

import re
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from kvbaton.v1 import generate_pb2
from services.frontend.edge.schemas import ChatCompletionRequest, CompletionRequest
from tests.unit.edge.fakes import MODEL, ScriptedGeneration
from tests.unit.edge.harness import BODIES, CHAT, COMPLETIONS, ROUTES, in_memory, post

SAMPLING = {
    "temperature": (0.5, 0.5),
    "top_p": (0.9, 0.9),
    "top_k": (40, 40),
    "min_p": (0.1, 0.1),
    "min_tokens": (2, ("min_new_tokens", 2)),
    "max_tokens": (9, ("max_new_tokens", 9)),
    "frequency_penalty": (1, 1.0),
    "presence_penalty": (-1.5, -1.5),
    "repetition_penalty": (1.1, 1.1),
    "seed": (123, 123),
    "ignore_eos": (True, True),
    "stop": (["a", "b"], ["a", "b"]),
    "stop_token_ids": ([5, 6], [5, 6]),
    "skip_special_tokens": (False, False),
}


async def forwarded(route: str, **fields: Any) -> generate_pb2.GenerateRequest:
    generation = ScriptedGeneration()
    response = await post(generation, route, **fields)
    assert response.status_code == 200, response.text
    return generation.requests[0]


def set_fields(params: generate_pb2.SamplingParams) -> dict[str, Any]:
    return {
        field.name: list(value) if isinstance(getattr(params, field.name), list) or field.is_repeated else value
        for field, value in params.ListFields()
    }


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", SAMPLING)
async def test_a_sampling_field_is_forwarded(route: str, name: str) -> None:
    value, expected = SAMPLING[name]
    proto_name, proto_value = expected if isinstance(expected, tuple) else (name, expected)
    request = await forwarded(route, **{name: value})
    defaults = {"max_new_tokens": 16} if route == COMPLETIONS else {}
    assert set_fields(request.sampling) == defaults | {proto_name: proto_value}


@pytest.mark.parametrize("route", ROUTES)
async def test_the_trace_context_is_forwarded_and_no_other_header(route: str) -> None:
    generation = ScriptedGeneration()
    context = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "vendor=1"}
    async with in_memory(generation) as client:
        await client.post(route, json=BODIES[route], headers=context | {"x-b3-traceid": "1"})
    assert generation.trace_headers == [context]


@pytest.mark.parametrize("route", ROUTES)
async def test_the_priority_is_forwarded(route: str) -> None:
    assert (await forwarded(route, priority=-3)).priority == -3
    assert not (await forwarded(route)).HasField("priority")


def test_every_sampling_field_of_the_contract_can_be_set() -> None:
    reachable = {expected[0] if isinstance(expected, tuple) else name for name, (_, expected) in SAMPLING.items()}
    assert reachable == set(generate_pb2.SamplingParams.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("route", ROUTES)
async def test_zero_and_false_are_values_not_defaults(route: str) -> None:
    sampling = (await forwarded(route, temperature=0, frequency_penalty=0, seed=0, ignore_eos=False)).sampling
    for name in ("temperature", "frequency_penalty", "seed", "ignore_eos"):
        assert sampling.HasField(name), name


@pytest.mark.parametrize("route", ROUTES)
async def test_null_means_unset(route: str) -> None:
    schema = CompletionRequest if route == COMPLETIONS else ChatCompletionRequest
    nulls = dict.fromkeys(set(schema.model_fields) - set(BODIES[route]))
    request = await forwarded(route, **nulls)
    plain = await forwarded(route)
    assert request.sampling == plain.sampling


@pytest.mark.parametrize(
    ("route", "params"),
    [
        (COMPLETIONS, completion_create_params.CompletionCreateParamsBase),
        (CHAT, chat_create_params.CompletionCreateParamsBase),
    ],
)
async def test_every_field_that_openai_documents_is_known(route: str, params: type) -> None:
    """Known means that its null is accepted; what any other value does is said by the other tests."""
    optional = set(params.__annotations__) - set(BODIES[route])
    await forwarded(route, **dict.fromkeys(optional))


@pytest.mark.parametrize(
    ("route", "name", "value"),
    [
        (COMPLETIONS, "n", 1),
        (COMPLETIONS, "best_of", 1),
        (COMPLETIONS, "echo", False),
        (COMPLETIONS, "logprobs", False),
        (COMPLETIONS, "logit_bias", {}),
        (COMPLETIONS, "suffix", ""),
        (COMPLETIONS, "user", "someone"),
        (CHAT, "n", 1),
        (CHAT, "logprobs", False),
        (CHAT, "logit_bias", {}),
        (CHAT, "tools", []),
        (CHAT, "tool_choice", "none"),
        (CHAT, "response_format", {"type": "text"}),
        (CHAT, "modalities", ["text"]),
        (CHAT, "service_tier", "auto"),
        (CHAT, "store", False),
        (CHAT, "user", "someone"),
    ],
)
async def test_a_neutral_value_changes_nothing(route: str, name: str, value: object) -> None:
    assert (await forwarded(route, **{name: value})).sampling == (await forwarded(route)).sampling


@pytest.mark.parametrize("prompt", ["Once", ["Once"]])
async def test_a_text_prompt(prompt: object) -> None:
    request = await forwarded(COMPLETIONS, prompt=prompt)
    assert request.WhichOneof("input") == "text"
    assert request.text == "Once"


@pytest.mark.parametrize("prompt", [[1, 2, 4294967295], [[1, 2, 4294967295]]])
async def test_a_prompt_of_token_ids(prompt: object) -> None:
    request = await forwarded(COMPLETIONS, prompt=prompt)
    assert request.WhichOneof("input") == "token_ids"
    assert list(request.token_ids.ids) == [1, 2, 4294967295]


async def test_a_conversation() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": "Hi", "name": "tiny"},
    ]
    request = await forwarded(CHAT, messages=messages)
    assert request.WhichOneof("input") == "chat"
    assert [(m.role, m.content, m.name) for m in request.chat.messages] == [
        ("system", "Be brief.", ""),
        ("user", "Hello there", ""),
        ("assistant", "Hi", "tiny"),
    ]


async def test_a_chat_is_bounded_by_the_context_alone_unless_it_says_so() -> None:
    assert not (await forwarded(CHAT)).sampling.HasField("max_new_tokens")
    assert (await forwarded(CHAT, max_completion_tokens=5)).sampling.max_new_tokens == 5
    assert (await forwarded(CHAT, max_completion_tokens=5, max_tokens=5)).sampling.max_new_tokens == 5


async def test_one_stop_string() -> None:
    assert list((await forwarded(COMPLETIONS, stop="END")).sampling.stop) == ["END"]


@pytest.mark.parametrize(("route", "prefix"), [(COMPLETIONS, "cmpl"), (CHAT, "chatcmpl")])
async def test_the_model_and_a_fresh_id_are_forwarded(route: str, prefix: str) -> None:
    first, second = await forwarded(route), await forwarded(route)
    assert first.model == MODEL
    assert re.fullmatch(prefix + "-[0-9a-f]{32}", first.request_id)
    assert first.request_id != second.request_id


@pytest.mark.parametrize("route", ROUTES)
async def test_the_clients_request_id_is_kept(route: str) -> None:
    generation = ScriptedGeneration()
    async with in_memory(generation) as client:
        response = await client.post(route, json=BODIES[route], headers={"x-request-id": "trace/42"})
    assert generation.requests[0].request_id == "trace/42"
    assert response.headers["x-request-id"] == "trace/42"
    assert response.json()["id"] == "trace/42"


@pytest.mark.parametrize("header", [b"", b"with space", b"x" * 129, "ünï".encode()])
async def test_a_request_id_of_another_form_is_replaced(header: bytes) -> None:
    generation = ScriptedGeneration()
    async with in_memory(generation) as client:
        response = await client.post(COMPLETIONS, json=BODIES[COMPLETIONS], headers={b"x-request-id": header})
    assert response.status_code == 200
    assert generation.requests[0].request_id.startswith("cmpl-")
