"""POST /v1/responses: items in, items out, and events that tell of every one of them."""

from __future__ import annotations

from typing import Any

import grpc
import httpx
import openai
import orjson
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import ResponseInputParam
from pydantic import BaseModel

from kvbaton.errors import Reason, RequestError, invalid
from kvbaton.v1 import generate_pb2
from services.frontend.request.api import FinishReason, Output, ToolCallDelta
from services.requests import TokenLogprob, TopLogprob
from tests.unit.edge.fakes import MODEL, Hang, ScriptedGeneration, Scripts, Step, ended, failure, said
from tests.unit.edge.harness import error_of, in_memory
from tests.unit.edge.sdk import sdk, with_sync_sdk

ROUTE = "/v1/responses"
Code = grpc.StatusCode
WEATHER_TOOL: Any = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": None}


async def post(generation: ScriptedGeneration, **fields: Any) -> httpx.Response:
    async with in_memory(generation) as client:
        return await client.post(ROUTE, json={"model": MODEL, "input": "Hi"} | fields)


async def forwarded(**fields: Any) -> generate_pb2.GenerateRequest:
    generation = ScriptedGeneration()
    response = await post(generation, **fields)
    assert response.status_code == 200, response.text
    return generation.requests[0]


async def events_of(*script: Step, **fields: Any) -> list[dict[str, Any]]:
    response = await post(ScriptedGeneration(*script), stream=True, **fields)
    assert response.status_code == 200, response.text
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    events: list[dict[str, Any]] = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(orjson.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


class TestWhatIsForwarded:
    async def test_text(self) -> None:
        request = await forwarded(max_output_tokens=5, seed=3, instructions="Be brief.")
        assert [(m.role, m.content) for m in request.chat.messages] == [("system", "Be brief."), ("user", "Hi")]
        assert (request.sampling.max_new_tokens, request.sampling.seed) == (5, 3)
        assert request.request_id.startswith("resp_")

    async def test_what_the_model_did_in_one_turn_is_one_message(self) -> None:
        items = [
            {
                "role": "developer",
                "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
            },
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "Look.", "annotations": []}]},
            {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}", "id": "fc_1"},
            {"type": "function_call", "call_id": "call_2", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "1"},
            {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "2"}]},
            {"role": "assistant", "content": "Done.", "type": "message"},
            {"role": "assistant", "content": "Really."},
        ]
        developer, turn, first, second, done, really = (await forwarded(input=items)).chat.messages
        assert (developer.role, developer.content) == ("developer", "a b")
        assert (turn.role, turn.reasoning, turn.content) == ("assistant", "Hm.", "Look.")
        assert [(call.id, call.name) for call in turn.tool_calls] == [("call_1", "f"), ("call_2", "g")]
        assert [(m.role, m.tool_call_id, m.content) for m in (first, second)] == [
            ("tool", "call_1", "1"),
            ("tool", "call_2", "2"),
        ]
        assert [(m.role, m.content) for m in (done, really)] == [("assistant", "Done."), ("assistant", "Really.")]

    async def test_tools(self) -> None:
        chat = (await forwarded(tools=[WEATHER_TOOL], tool_choice={"type": "function", "name": "f"})).chat
        assert (chat.tools[0].name, chat.tool_choice.function) == ("f", "f")

    @pytest.mark.parametrize(
        ("given", "schema"),
        [
            ({"type": "json_object"}, {"type": "object"}),
            ({"type": "json_schema", "name": "n", "schema": {"type": "string"}, "strict": True}, {"type": "string"}),
        ],
    )
    async def test_the_format_of_the_text(self, given: Any, schema: Any) -> None:
        assert orjson.loads((await forwarded(text={"format": given})).sampling.json_schema) == schema

    async def test_how_much_it_thinks(self) -> None:
        arguments = orjson.loads((await forwarded(reasoning={"effort": "low"})).chat.template_arguments)
        assert arguments == {"reasoning_effort": "low", "thinking": True, "enable_thinking": True}

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({}, None),
            ({"top_logprobs": 2}, 2),
            ({"include": ["message.output_text.logprobs"]}, 0),
            ({"include": ["reasoning.encrypted_content"]}, None),
        ],
    )
    async def test_log_probabilities(self, fields: dict[str, Any], expected: int | None) -> None:
        request = await forwarded(**fields)
        assert (request.logprobs if request.HasField("logprobs") else None) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "wizard", "content": "a"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f"}]}, "input[0].arguments"),
        ({"input": ["Hi"]}, "input[0]"),
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "mcp", "server_label": "a"}}, "tool_choice.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_object"}}, "regex": "a"}, "regex"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"n": 2}, "n"),
        ({"max_tokens": 5}, "max_tokens"),
    ],
)
async def test_a_bad_field_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    generation = ScriptedGeneration()
    response = await post(generation, **fields)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert generation.requests == []


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("sampling.max_new_tokens", "max_output_tokens"),
        ("sampling.top_p", "top_p"),
        ("sampling.json_schema", "text.format.schema"),
        ("chat", "input"),
        ("chat.messages", "input"),
        ("chat.messages[0].role", "instructions"),
        ("chat.messages[1].content", "input[0]"),
        ("chat.messages[2].tool_calls[1].arguments", "input[2].arguments"),
        ("chat.tools[0].parameters", "tools[0].parameters"),
        ("chat.tool_choice", "tool_choice"),
        ("chat.template_arguments", "reasoning.effort"),
        ("logprobs", "top_logprobs"),
        ("model", "model"),
    ],
)
async def test_a_field_that_the_frontend_refuses_has_its_name(field: str, param: str) -> None:
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    response = await post(
        ScriptedGeneration(refusal=invalid(field, "is bad")),
        instructions="a",
        input=[{"role": "user", "content": "a"}, call, call],
        text={"format": {"type": "json_schema", "name": "n", "schema": {}}},
        top_logprobs=1,
    )
    assert response.status_code == 400
    assert (error_of(response)["param"], error_of(response)["message"]) == (param, f"{param}: is bad")


async def test_a_whole_answer() -> None:
    body = (await post(ScriptedGeneration(), instructions="a", metadata={"k": "v"})).json()
    (item,) = body["output"]
    assert item.pop("id").startswith("msg_")
    assert item == {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
    }
    assert (body["object"], body["status"], body["error"], body["store"]) == ("response", "completed", None, False)
    assert (body["instructions"], body["metadata"]) == ("a", {"k": "v"})
    assert body["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 10,
    }


async def test_the_events_of_a_text() -> None:
    events = await events_of(*Scripts.ALL[0])
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    assert (events[2]["item"]["status"], events[2]["item"]["content"]) == ("in_progress", [])
    assert [event["delta"] for event in events[4:6]] == ["Hel", "lo"]
    assert events[6]["text"] == "Hello"


async def test_the_events_of_reasoning_and_calls() -> None:
    events = await events_of(*Scripts.REASONED_CALLS, tools=[WEATHER_TOOL])
    call = [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    assert [event["type"].removeprefix("response.") for event in events[2:-1]] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        *call[:2],
        *call[1:],
        *call,
    ]
    items = events[-1]["response"]["output"]
    assert [item["type"] for item in items] == ["reasoning", "function_call", "function_call"]
    assert [item.get("arguments") for item in items] == [None, '{"x": 1}', "{}"]
    assert [event["output_index"] for event in events if event["type"].endswith("item.done")] == [0, 1, 2]
    assert events[-1]["response"]["usage"]["output_tokens_details"]["reasoning_tokens"] == 2


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in item.items() if key != "id"} for item in items]


@pytest.mark.parametrize("script", Scripts.ALL)
async def test_a_stream_adds_up_to_the_whole_answer(script: tuple[Step, ...]) -> None:
    whole = (await post(ScriptedGeneration(*script))).json()
    events = await events_of(*script)
    last = events[-1]["response"]
    assert without_ids(last["output"]) == without_ids(whole["output"])
    assert (last["status"], last["usage"]) == (whole["status"], whole["usage"])
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == last["output"]
    for kind, part in (("output_text", "text"), ("reasoning_text", "text"), ("function_call_arguments", "arguments")):
        for event in events:
            if event["type"] == f"response.{kind}.done":
                deltas = [
                    e["delta"] for e in events if e["type"].endswith("delta") and e["item_id"] == event["item_id"]
                ]
                assert "".join(deltas) == event[part]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_was_cut_off(stream: bool) -> None:
    script = (said("Hel"), ended(reason=FinishReason.LENGTH))
    if stream:
        event = (await events_of(*script))[-1]
        assert event["type"] == "response.incomplete"
        body = event["response"]
    else:
        body = (await post(ScriptedGeneration(*script))).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"


async def test_log_probabilities_go_with_the_text() -> None:
    logprob = TokenLogprob(5, -0.25, (TopLogprob(6, -2.0, b"Ho"),), b"Hel")
    thought = Output([4], reasoning="Hm", logprobs=[TokenLogprob(4, -1.0, (), b"Hm")])
    script = (thought, Output([5], "Hel", logprobs=[logprob]), said("lo"), ended())
    written = {
        "token": "Hel",
        "logprob": -0.25,
        "bytes": [72, 101, 108],
        "top_logprobs": [{"token": "Ho", "logprob": -2.0, "bytes": [72, 111]}],
    }
    events = await events_of(*script, top_logprobs=1)
    assert [e["logprobs"] for e in events if e["type"] == "response.output_text.delta"] == [[written], []]
    assert events[-1]["response"]["output"][1]["content"][0]["logprobs"] == [written]


async def test_a_failure_in_a_stream() -> None:
    events = await events_of(said("Hel"), failure(Code.ABORTED, Reason.LEG_ENDED_EARLY, message="decode died"))
    error = next(event for event in events if event["type"] == "error")
    assert (error["code"], error["message"], error["param"]) == ("leg_ended_early", "decode died", None)
    assert events[-1]["type"] == "response.failed"
    response = events[-1]["response"]
    assert (response["status"], response["error"]["message"]) == ("failed", "decode died")
    assert response["output"][0]["content"][0]["text"] == "Hel"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_output_is_a_status(stream: bool) -> None:
    response = await post(ScriptedGeneration(failure(Code.UNAVAILABLE, Reason.NO_WORKER)), stream=stream)
    assert response.status_code == 503
    assert error_of(response)["code"] == "no_worker"


class Weather(BaseModel):
    """The weather somewhere."""

    city: str
    degrees: int


SUNNY = '{"city": "Rome", "degrees": 30}'
CALLING = (
    Output([1], reasoning="Where?"),
    Output([1], tool_calls=[ToolCallDelta(0, "call_1", "Weather", SUNNY[:9])]),
    Output([1], tool_calls=[ToolCallDelta(0, arguments=SUNNY[9:])]),
    ended(reason=FinishReason.TOOL_CALLS),
)


class TestTheOfficialClient:
    async def test_create(self) -> None:
        async with sdk(ScriptedGeneration()) as client:
            response = await client.responses.create(model=MODEL, input="Hi")
        assert response.output_text == "Hello"
        assert response.status == "completed"

    async def test_the_blocking_client(self) -> None:
        def use(client: OpenAI) -> tuple[str, str]:
            plain = client.responses.create(model=MODEL, input="Hi")
            deltas = [
                event.delta
                for event in client.responses.create(model=MODEL, input="Hi", stream=True)
                if event.type == "response.output_text.delta"
            ]
            return plain.output_text, "".join(deltas)

        assert await with_sync_sdk(ScriptedGeneration(), use) == ("Hello", "Hello")

    @pytest.mark.parametrize("script", Scripts.ALL)
    async def test_every_event_is_valid(self, script: tuple[Step, ...]) -> None:
        async with sdk(ScriptedGeneration(*script)) as client:
            stream = await client.responses.create(
                model=MODEL, input="Hi", stream=True, tools=[WEATHER_TOOL], reasoning={"effort": "low"}
            )
            assert [event.sequence_number async for event in stream][-1] > 0

    async def test_its_stream_helper(self) -> None:
        async with sdk(ScriptedGeneration()) as client, client.responses.stream(model=MODEL, input="Hi") as stream:
            final = await stream.get_final_response()
        assert final.output_text == "Hello"

    async def test_a_parsed_answer(self) -> None:
        generation = ScriptedGeneration(said(SUNNY[:9]), ended(SUNNY[9:]))
        async with sdk(generation) as client:
            parsed = await client.responses.parse(model=MODEL, input="Hi", text_format=Weather)
            async with client.responses.stream(model=MODEL, input="Hi", text_format=Weather) as stream:
                streamed = await stream.get_final_response()
        for response in (parsed, streamed):
            assert response.output_parsed == Weather(city="Rome", degrees=30)

    async def test_tools_and_the_way_back(self) -> None:
        generation = ScriptedGeneration(*CALLING)
        tools: Any = [openai.pydantic_function_tool(Weather)]
        flat: Any = [{"type": "function", **tools[0]["function"]}]
        async with sdk(generation) as client:
            response = await client.responses.parse(model=MODEL, input="Hi", tools=flat)
            reasoning, call = response.output
            assert reasoning.type == "reasoning"
            assert call.type == "function_call"
            assert (call.call_id, call.arguments) == ("call_1", SUNNY)
            history: Any = [
                {"role": "user", "content": "Hi"},
                *response.output,
                {"type": "function_call_output", "call_id": call.call_id, "output": "30"},
            ]
            await client.responses.create(model=MODEL, input=history, tools=flat)
        user, turn, result = generation.requests[-1].chat.messages
        assert (user.content, turn.reasoning, result.tool_call_id) == ("Hi", "Where?", "call_1")
        assert turn.tool_calls[0].arguments == SUNNY

    async def test_an_answer_goes_back_as_it_came(self) -> None:
        generation = ScriptedGeneration()
        async with sdk(generation) as client:
            response = await client.responses.create(model=MODEL, input="Hi")
            items: ResponseInputParam = [
                {"role": "user", "content": "Hi"},
                *(item.to_dict() for item in response.output),  # type: ignore[list-item]
                {"role": "user", "content": "And?"},
            ]
            await client.responses.create(model=MODEL, input=items)
        assert [m.content for m in generation.requests[-1].chat.messages] == ["Hi", "Hello", "And?"]

    @pytest.mark.parametrize(
        ("refusal", "kind"),
        [
            (invalid("sampling.top_p", "bad"), openai.BadRequestError),
            (failure(Code.NOT_FOUND, Reason.MODEL_NOT_FOUND), openai.NotFoundError),
            (failure(Code.RESOURCE_EXHAUSTED, Reason.TOO_MANY_REQUESTS), openai.RateLimitError),
            (failure(Code.UNAVAILABLE, Reason.NO_WORKER), openai.InternalServerError),
        ],
    )
    async def test_errors(self, refusal: RequestError, kind: type[openai.APIStatusError]) -> None:
        async with sdk(ScriptedGeneration(refusal=refusal)) as client:
            with pytest.raises(kind):
                await client.responses.create(model=MODEL, input="Hi")

    async def test_store_is_refused_by_name(self) -> None:
        async with sdk(ScriptedGeneration()) as client:
            with pytest.raises(openai.BadRequestError) as caught:
                await client.responses.create(model=MODEL, input="Hi", store=True)
        assert caught.value.param == "store"

    async def test_leaving_a_stream_cancels_the_request(self) -> None:
        generation = ScriptedGeneration(said("Hel"), Hang())
        async with sdk(generation) as client:
            await _leave_after_the_first_event(client)
            await generation.live[0].cancelled.wait()


async def _leave_after_the_first_event(client: AsyncOpenAI) -> None:
    stream = await client.responses.create(model=MODEL, input="Hi", stream=True)
    await anext(stream)
    await stream.close()
