"""Tools and reasoning over gRPC, through a prefill and a decode worker that play what a model would write."""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from kvbaton.client import Answer, AnsweredCall, SamplingParams
from kvbaton.errors import RequestError
from kvbaton.v1 import generate_pb2
from services.frontend.text import ChatMessage
from tests.support.cluster import FakeCluster
from tests.support.etcd import etcd_endpoint
from tests.support.scripted import CALL, HI, WEATHER, Scripted, write_model

__all__ = ["etcd_endpoint"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture
async def scripted(cluster: FakeCluster, model_folder: Path) -> AsyncIterator[Scripted]:
    yield Scripted(cluster, model_folder)


async def test_calls_come_beside_the_text_with_a_finish_of_their_own(scripted: Scripted) -> None:
    await scripted.start(tool_call_parser="hermes")
    tokens = scripted.plays(f"Let me look.\n{CALL}\n{CALL}", tools=[WEATHER])
    answer = await scripted.ask(tools=[WEATHER])
    assert answer.text == "Let me look."
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [
        ("get_weather", '{"city": "Köln", "days": [1, 2]}')
    ] * 2
    assert all(re.fullmatch("call_[0-9a-f]{24}", call.id) for call in answer.tool_calls)
    assert answer.finished.reason == generate_pb2.FINISH_REASON_TOOL_CALLS
    assert answer.finished.usage.completion_tokens == len(tokens) + 1


async def test_deltas_stream_while_the_model_writes(scripted: Scripted) -> None:
    await scripted.start(tool_call_parser="qwen25", decode_step=0.005)
    scripted.plays(CALL, tools=[WEATHER])
    deltas = [
        delta
        async for chunk in scripted.cluster.client.stream(
            chat=[HI], tools=[WEATHER], sampling=SamplingParams(max_new_tokens=1000, temperature=0)
        )
        for delta in chunk.tool_calls
    ]
    assert deltas[0].name == "get_weather"
    assert not any(delta.name or delta.id for delta in deltas[1:])
    assert len(deltas) > 1
    assert "".join(delta.arguments for delta in deltas) == '{"city": "Köln", "days": [1, 2]}'


async def test_an_answer_without_calls_ends_as_ever(scripted: Scripted) -> None:
    await scripted.start(tool_call_parser="hermes")
    scripted.plays("No <tool_call> needed. ", tools=[WEATHER])
    answer = await scripted.ask(tools=[WEATHER])
    assert (answer.text, answer.tool_calls) == ("No <tool_call> needed. ", [])
    assert answer.finished.reason == generate_pb2.FINISH_REASON_STOP


async def test_a_call_cut_off_by_length_keeps_that_reason(scripted: Scripted) -> None:
    await scripted.start(tool_call_parser="hermes")
    scripted.plays(CALL, tools=[WEATHER])
    answer = await scripted.ask(tools=[WEATHER], sampling=SamplingParams(max_new_tokens=70, temperature=0))
    assert answer.finished.reason == generate_pb2.FINISH_REASON_LENGTH
    assert '{"city": "Köln", "days": [1, 2]}'.startswith(answer.tool_calls[0].arguments)


async def test_one_call_at_most_ends_the_answer_and_both_legs(scripted: Scripted) -> None:
    await scripted.start(tool_call_parser="hermes")
    scripted.plays(f"{CALL}\n{CALL}", tools=[WEATHER])
    answer = await scripted.ask(tools=[WEATHER], parallel_tool_calls=False)
    assert len(answer.tool_calls) == 1
    assert answer.finished.reason == generate_pb2.FINISH_REASON_TOOL_CALLS
    assert (
        len(answer.token_ids)
        == answer.finished.usage.completion_tokens
        == len(CALL.encode()) - len("}\n</tool_call>") + 1
    )
    await scripted.ask(tools=[WEATHER], request_id="again")


async def test_llamas_marker_is_seen_although_it_is_a_special_token(scripted: Scripted) -> None:
    await scripted.start(tool_call_parser="llama3")
    scripted.plays('<s><|python_tag|>{"name": "get_weather", "parameters": {"city": "Bonn"}}', tools=[WEATHER])
    answer = await scripted.ask(tools=[WEATHER])
    assert (answer.text, answer.tool_calls[0].arguments) == ("", '{"city": "Bonn"}')


async def test_reasoning_comes_apart_and_calls_behind_it(scripted: Scripted) -> None:
    await scripted.start(tool_call_parser="qwen", reasoning_parser="qwen3")
    scripted.plays(f"<think>\nHm.\n</think>\n\nSo: {CALL}", tools=[WEATHER])
    answer = await scripted.ask(tools=[WEATHER])
    assert (answer.reasoning, answer.text, len(answer.tool_calls)) == ("Hm.", "So:", 1)


async def test_reasoning_that_the_template_opens(scripted: Scripted) -> None:
    await scripted.start(reasoning_parser="deepseek-r1")
    thinking = {"enable_thinking": True}
    scripted.plays("Hm.\n</think>\n\nYes.", arguments=thinking)
    answer = await scripted.ask(template_arguments=thinking)
    assert (answer.reasoning, answer.text) == ("Hm.", "Yes.")
    whole = await scripted.ask(template_arguments=thinking, separate_reasoning=False)
    assert (whole.reasoning, whole.text) == ("", "Hm.\n</think>\n\nYes.")


async def test_stop_strings_match_what_the_model_wrote(scripted: Scripted) -> None:
    await scripted.start(reasoning_parser="qwen3")
    scripted.plays("<think>one two</think>three")
    sampling = SamplingParams(max_new_tokens=1000, temperature=0, stop=["two</th"])
    answer = await scripted.ask(sampling=sampling)
    assert (answer.reasoning, answer.text) == ("one ", "")
    assert answer.finished.matched_stop == "two</th"


async def test_a_text_prompt_is_never_parsed(scripted: Scripted) -> None:
    await scripted.start(tool_call_parser="hermes", reasoning_parser="deepseek-r1")
    tokens = scripted.plays(f"<think>a</think>{CALL}")
    text = scripted._template.render([ChatMessage(HI["role"], HI["content"])])
    sampling = SamplingParams(max_new_tokens=1000, temperature=0)
    answer = await scripted.cluster.client.generate(text=text, sampling=sampling)
    assert answer.text == f"<think>a</think>{CALL}"
    assert answer.token_ids[:-1] == tokens
    assert (answer.reasoning, answer.tool_calls) == ("", [])


async def test_a_conversation_goes_on_with_its_calls(scripted: Scripted) -> None:
    await scripted.start(tool_call_parser="hermes")
    scripted.plays(CALL, tools=[WEATHER])
    (call,) = (await scripted.ask(tools=[WEATHER])).tool_calls
    made: Mapping[str, Any] = {"id": call.id, "name": call.name, "arguments": call.arguments}
    messages = [
        HI,
        {"role": "assistant", "tool_calls": [generate_pb2.ToolCall(**made)]},
        {"role": "tool", "tool_call_id": call.id, "content": "12 °C"},
    ]
    sampling = SamplingParams(max_new_tokens=2, temperature=0)
    assert (await scripted.cluster.client.generate(chat=messages, tools=[WEATHER], sampling=sampling)).token_ids


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"tools": [{"name": "f"}]}, "chat.tools"),
        ({"tool_choice": "required"}, "chat.tool_choice"),
        ({"separate_reasoning": True}, "chat.separate_reasoning"),
        (
            {"tools": [{"name": "f", "parameters": {"a": 1}}, {"name": "f"}], "tool_choice": "none"},
            "chat.tools[1].name",
        ),
    ],
)
async def test_refusals_name_the_field(scripted: Scripted, request_: dict[str, Any], field: str) -> None:
    await scripted.start(tool_call_parser="mistral", reasoning_parser="mistral")
    with pytest.raises(RequestError) as caught:
        await scripted.ask(**request_)
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_a_required_call_without_a_grammar_backend_is_refused(scripted: Scripted) -> None:
    await scripted.start(tool_call_parser="hermes")
    for choice in ("required", "get_weather"):
        with pytest.raises(RequestError, match="no grammar backend") as caught:
            await scripted.ask(tools=[WEATHER], tool_choice=choice)
        assert caught.value.field == "chat.tool_choice"


def test_the_client_collects_each_choice_by_itself() -> None:
    answer = Answer()
    call = generate_pb2.ToolCallDelta(index=0, id=uuid.uuid4().hex, name="f", arguments="{")
    answer.add(generate_pb2.GenerateResponse(index=1, tool_calls=[call], reasoning="hm"))
    answer.add(generate_pb2.GenerateResponse(index=0, text="a", logprobs=[generate_pb2.TokenLogprob(token_id=3)]))
    answer.add(generate_pb2.GenerateResponse(index=1, tool_calls=[generate_pb2.ToolCallDelta(arguments="}")]))
    assert (answer.text, answer.tool_calls, len(answer.logprobs)) == ("a", [], 1)
    assert answer.choices[1].tool_calls == [AnsweredCall(call.id, "f", "{}")]
    assert answer.choices[1].reasoning == "hm"
