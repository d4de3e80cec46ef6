"""The client's arguments: everything that the contract has, under its name."""

from __future__ import annotations

from typing import Any

import pytest

from kvbaton.errors import RequestError
from kvbaton.generating import GenerateOptions, generate_request
from kvbaton.v1.generate_pb2 import Bootstrap, ChatInput, GenerateRequest, SamplingParams

OF_A_REQUEST: dict[str, Any] = {
    "request_id": "mine",
    "model": "m",
    "sampling": SamplingParams(max_new_tokens=3),
    "bootstrap": Bootstrap(host="h", port=1, room=2),
    "dp_rank": 0,
    "priority": 0,
    "n": 2,
    "logprobs": 0,
    "prefill_worker": "p",
    "decode_worker": "d",
    "cache_salt": "s",
    "lora": "l",
    "allow_inexact_migration": True,
}
OF_A_CHAT: dict[str, Any] = {
    "add_generation_prompt": False,
    "tools": [{"name": "f", "parameters": {"type": "object"}}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "template_arguments": {"a": 1},
    "separate_reasoning": False,
    "continue_final_message": True,
}
INPUTS: dict[str, Any] = {"text": "Hi", "chat": [{"role": "user", "content": "Hi"}], "token_ids": [1, 2]}


def names(message: Any) -> set[str]:
    return {field.name for field, _ in message.ListFields()}


def test_every_field_of_a_request_can_be_set() -> None:
    request = generate_request(GenerateOptions(token_ids=[1, 2], **OF_A_REQUEST))
    assert names(request) == set(GenerateRequest.DESCRIPTOR.fields_by_name) - {"text", "chat"}
    assert {name: getattr(request, name) for name in OF_A_REQUEST} == OF_A_REQUEST


def test_every_field_of_a_chat_can_be_set() -> None:
    request = generate_request(GenerateOptions(chat=INPUTS["chat"], **OF_A_CHAT))
    assert names(request.chat) == set(ChatInput.DESCRIPTOR.fields_by_name)
    assert (request.chat.tools[0].parameters, request.chat.template_arguments) == ('{"type": "object"}', '{"a": 1}')


@pytest.mark.parametrize("given", INPUTS)
def test_the_input_is_one_of_three(given: str) -> None:
    options: Any = {given: INPUTS[given]}
    assert generate_request(options).WhichOneof("input") == given


def test_nothing_is_set_that_was_not_given() -> None:
    nothing: Any = dict.fromkeys({**OF_A_REQUEST, **OF_A_CHAT}.keys() - {"tools"})
    request = generate_request(GenerateOptions(chat=INPUTS["chat"], **nothing))
    assert (names(request), names(request.chat)) == ({"request_id", "chat"}, {"messages"})
    assert request.request_id


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "input"),
        ({"text": "Hi", "token_ids": [1]}, "input"),
        ({"text": "Hi", "continue_final_message": True}, "chat.continue_final_message"),
    ],
)
def test_contradictions_are_refused_by_name(options: Any, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        generate_request(options)
    assert caught.value.field == field


def test_an_unknown_argument_is_a_type_error() -> None:
    unknown: Any = {"text": "Hi", "temperature": 0}
    with pytest.raises(TypeError, match="temperature"):
        generate_request(unknown)
