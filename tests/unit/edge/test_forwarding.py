"""Every field of a request reaches the frontend under its kvbaton name, and only when it was given."""

from __future__ import annotations

import re
from typing import Any

import orjson
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from kvbaton.token_ids import unpack
from kvbaton.v1 import generate_pb2
from services.frontend.edge.chat.schema import ChatCompletionRequest
from services.frontend.edge.completions.schema import CompletionRequest
from tests.unit.edge.fakes import MODEL, ScriptedGeneration, ended
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
    "logit_bias": ({"7": -100, "0": 2.5}, {7: -100.0, 0: 2.5}),
    "regex": ("[ab]+", "[ab]+"),
    "ebnf": ('root ::= "a"', 'root ::= "a"'),
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMATS = [
    ({"type": "json_object"}, "json_schema", {"type": "object"}),
    ({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}, "json_schema", SCHEMA),
    ({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": False}}, "json_schema", SCHEMA),
    (
        {"type": "structural_tag", "format": {"type": "any_text"}},
        "structural_tag",
        {"type": "structural_tag", "format": {"type": "any_text"}},
    ),
]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}}


async def forwarded(route: str, **fields: Any) -> generate_pb2.GenerateRequest:
    generation = ScriptedGeneration()
    response = await post(generation, route, **fields)
    assert response.status_code == 200, response.text
    return generation.requests[0]


def set_fields(params: generate_pb2.SamplingParams) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for field, value in params.ListFields():
        is_map = field.message_type is not None
        given[field.name] = dict(value) if is_map else list(value) if field.is_repeated else value
    return given


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
    reachable |= {kind for _, kind, _ in FORMATS}
    assert reachable == set(generate_pb2.SamplingParams.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("given", "kind", "source"), FORMATS)
async def test_a_response_format_is_a_grammar(route: str, given: Any, kind: str, source: Any) -> None:
    sampling = (await forwarded(route, response_format=given)).sampling
    assert sampling.WhichOneof("grammar") == kind
    assert orjson.loads(getattr(sampling, kind)) == source


async def test_the_schema_in_a_string_of_a_completion() -> None:
    assert (await forwarded(COMPLETIONS, json_schema='{"type": "object"}')).sampling.json_schema == '{"type": "object"}'


@pytest.mark.parametrize(
    ("route", "fields", "expected"),
    [
        (CHAT, {}, None),
        (CHAT, {"logprobs": False}, None),
        (CHAT, {"logprobs": False, "top_logprobs": 0}, None),
        (CHAT, {"logprobs": True}, 0),
        (CHAT, {"logprobs": True, "top_logprobs": 20}, 20),
        (COMPLETIONS, {}, None),
        (COMPLETIONS, {"logprobs": 0}, 0),
        (COMPLETIONS, {"logprobs": 5}, 5),
    ],
)
async def test_log_probabilities(route: str, fields: dict[str, Any], expected: int | None) -> None:
    request = await forwarded(route, **fields)
    assert (request.logprobs if request.HasField("logprobs") else None) == expected


@pytest.mark.parametrize("route", ROUTES)
async def test_the_number_of_choices(route: str) -> None:
    generation = ScriptedGeneration(*(ended(index=index) for index in range(3)))
    assert (await post(generation, route, n=3)).status_code == 200
    assert generation.requests[0].n == 3
    assert not (await forwarded(route)).HasField("n")


async def test_tools() -> None:
    chat = (await forwarded(CHAT, tools=[TOOL, {"type": "function", "function": {"name": "g"}}])).chat
    assert [(tool.name, tool.description, tool.HasField("strict")) for tool in chat.tools] == [
        ("f", "d", True),
        ("g", "", False),
    ]
    assert orjson.loads(chat.tools[0].parameters) == SCHEMA
    assert chat.tools[1].parameters == ""
    assert not chat.HasField("tool_choice")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("auto", generate_pb2.ToolChoice(mode=generate_pb2.TOOL_CHOICE_MODE_AUTO)),
        ("none", generate_pb2.ToolChoice(mode=generate_pb2.TOOL_CHOICE_MODE_NONE)),
        ("required", generate_pb2.ToolChoice(mode=generate_pb2.TOOL_CHOICE_MODE_REQUIRED)),
        ({"type": "function", "function": {"name": "f"}}, generate_pb2.ToolChoice(function="f")),
    ],
)
async def test_the_choice_of_a_tool(given: object, expected: generate_pb2.ToolChoice) -> None:
    chat = (await forwarded(CHAT, tools=[TOOL], tool_choice=given, parallel_tool_calls=False)).chat
    assert chat.tool_choice == expected
    assert chat.HasField("parallel_tool_calls")
    assert not chat.parallel_tool_calls


async def test_a_conversation_with_calls() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}, "index": 0}
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "42"}]},
    ]
    developer, assistant, tool = (await forwarded(CHAT, messages=messages)).chat.messages
    assert developer.role == "developer"
    assert (assistant.content, assistant.reasoning) == ("", "Hm.")
    assert list(assistant.tool_calls) == [generate_pb2.ToolCall(id="call_1", name="f", arguments="{}")]
    assert (tool.role, tool.tool_call_id, tool.content) == ("tool", "call_1", "42")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"chat_template_kwargs": {"a": [1]}}, {"a": [1]}),
        ({"reasoning_effort": "high"}, {"reasoning_effort": "high", "thinking": True, "enable_thinking": True}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "thinking": False, "enable_thinking": False}),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
            {"reasoning_effort": "low", "thinking": True, "enable_thinking": False},
        ),
    ],
)
async def test_arguments_of_the_chat_template(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert orjson.loads((await forwarded(CHAT, **fields)).chat.template_arguments) == expected
    assert (await forwarded(CHAT)).chat.template_arguments == ""


async def test_continuing_the_last_message() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "He"}]
    assert (await forwarded(CHAT, messages=messages, continue_final_message=True)).chat.continue_final_message
    assert not (await forwarded(CHAT, continue_final_message=False)).chat.continue_final_message


async def test_opening_no_turn_behind_the_messages() -> None:
    chat = (await forwarded(CHAT, add_generation_prompt=False)).chat
    assert chat.HasField("add_generation_prompt")
    assert not chat.add_generation_prompt
    assert not (await forwarded(CHAT)).chat.HasField("add_generation_prompt")


async def test_whether_reasoning_is_told_apart() -> None:
    chat = (await forwarded(CHAT, separate_reasoning=False)).chat
    assert chat.HasField("separate_reasoning")
    assert not (await forwarded(CHAT)).chat.HasField("separate_reasoning")


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
    assert list(unpack(request.token_ids)) == [1, 2, 4294967295]


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
