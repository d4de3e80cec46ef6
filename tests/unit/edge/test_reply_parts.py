"""Reasoning, tool calls and log probabilities have OpenAI's shape, and a stream adds up to the whole answer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.frontend.request.api import FinishReason, Output, ToolCallDelta
from services.requests import TokenLogprob, TopLogprob
from tests.unit.edge.fakes import ScriptedGeneration, Scripts, Step, ended, said
from tests.unit.edge.harness import CHAT, COMPLETIONS, events_of, post


async def message(*script: Step, **fields: Any) -> dict[str, Any]:
    return (await post(ScriptedGeneration(*script), CHAT, **fields)).json()["choices"][0]["message"]


async def deltas(*script: Step, **fields: Any) -> list[dict[str, Any]]:
    events = events_of(await post(ScriptedGeneration(*script), CHAT, stream=True, **fields))
    return [event["choices"][0]["delta"] for event in events[:-1]]


CALLS = [
    {"id": "call_a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
    {"id": "call_b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
]


async def test_calls_in_a_whole_answer() -> None:
    assert await message(*Scripts.CALLS) == {
        "role": "assistant",
        "content": "Look: ",
        "refusal": None,
        "tool_calls": CALLS,
    }
    assert (await message(*Scripts.ONLY_CALLS))["content"] is None


async def test_calls_in_a_stream() -> None:
    """The id and the name come first and alone; then only the index says whose arguments follow."""
    assert [delta["tool_calls"] for delta in await deltas(*Scripts.CALLS) if "tool_calls" in delta] == [
        [{"index": 0, "id": "call_a", "type": "function", "function": {"name": "f", "arguments": ""}}],
        [{"index": 0, "function": {"arguments": '{"x"'}}],
        [{"index": 0, "function": {"arguments": ": 1}"}}],
        [{"index": 1, "id": "call_b", "type": "function", "function": {"name": "g", "arguments": ""}}],
        [{"index": 1, "function": {"arguments": "{}"}}],
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_have_a_finish_reason_of_their_own(stream: bool) -> None:
    response = await post(ScriptedGeneration(*Scripts.CALLS), CHAT, stream=stream)
    choice = events_of(response)[-2]["choices"][0] if stream else response.json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"


async def test_who_speaks_has_no_text_when_the_answer_is_a_call() -> None:
    assert (await deltas(*Scripts.ONLY_CALLS))[0] == {"role": "assistant", "content": None, "refusal": None}
    assert (await deltas(*Scripts.CALLS))[0] == {"role": "assistant", "content": "", "refusal": None}


async def test_reasoning() -> None:
    assert await message(*Scripts.REASONING) == {
        "role": "assistant",
        "content": "42",
        "refusal": None,
        "reasoning_content": "Hmm.",
    }
    news = await deltas(*Scripts.REASONING)
    assert news[1:] == [{"reasoning_content": "Hm"}, {"reasoning_content": "m."}, {"content": "42"}, {}]


def added_up(parts: list[dict[str, Any]]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        for key, value in part.items():
            if key == "tool_calls":
                for delta in value:
                    call = calls.setdefault(delta["index"], {"function": {"name": "", "arguments": ""}})
                    call |= {k: v for k, v in delta.items() if k not in ("index", "function")}
                    for name, piece in delta["function"].items():
                        call["function"][name] += piece
            elif key in ("content", "reasoning_content") and value is not None:
                whole[key] = (whole.get(key) or "") + value
            else:
                whole.setdefault(key, value)
    return whole | ({"tool_calls": [call for _, call in sorted(calls.items())]} if calls else {})


@pytest.mark.parametrize("script", Scripts.ALL)
async def test_a_stream_adds_up_to_the_whole_answer(script: tuple[Step, ...]) -> None:
    assert added_up(await deltas(*script)) == await message(*script)


SOMETHING = st.one_of(
    st.builds(said, st.text(max_size=5)),
    st.builds(lambda text: Output([1], reasoning=text), st.text(max_size=5)),
    st.builds(lambda text: Output([1, 1], text=text, reasoning=text), st.text(max_size=3)),
    st.builds(lambda piece: Output([1], tool_calls=[ToolCallDelta(0, arguments=piece)]), st.text(max_size=4)),
)
OPENING_CALL = Output([1], text="", tool_calls=[ToolCallDelta(0, "call_a", "f")])


@given(before=st.lists(SOMETHING.filter(lambda o: not o.tool_calls)), after=st.none() | st.lists(SOMETHING))
async def test_whatever_is_said_adds_up(before: list[Output], after: list[Output] | None) -> None:
    script = [*before, *([] if after is None else [OPENING_CALL, *after]), ended(reason=FinishReason.STOP)]
    assert added_up(await deltas(*script)) == await message(*script)


def token(spelled: bytes, logprob: float = -0.5, **top: float) -> TokenLogprob:
    likeliest = tuple(TopLogprob(9, value, name.encode()) for name, value in top.items())
    return TokenLogprob(1, logprob, likeliest, spelled)


SMILE = "🙂".encode()
TOKENS: tuple[Step, ...] = (
    Output([1], "Hé", logprobs=[token("Hé".encode(), Hi=-1.5)]),
    # Text waits for the rest of the character.
    Output([1], "", logprobs=[token(SMILE[:2])]),
    Output([1], "🙂", logprobs=[token(SMILE[2:])]),
    Output([2], "", finished=ended().finished, logprobs=[token(b"</s>")]),
)
WRITTEN = [
    {
        "token": "Hé",
        "logprob": -0.5,
        "bytes": [72, 195, 169],
        "top_logprobs": [{"token": "Hi", "logprob": -1.5, "bytes": [72, 105]}],
    },
    {"token": "\\xf0\\x9f", "logprob": -0.5, "bytes": [240, 159], "top_logprobs": []},
    {"token": "\\x99\\x82", "logprob": -0.5, "bytes": [153, 130], "top_logprobs": []},
    {"token": "</s>", "logprob": -0.5, "bytes": [60, 47, 115, 62], "top_logprobs": []},
]


async def test_log_probabilities_of_a_chat() -> None:
    fields = {"logprobs": True, "top_logprobs": 1}
    whole = (await post(ScriptedGeneration(*TOKENS), CHAT, **fields)).json()["choices"][0]["logprobs"]
    assert whole == {"content": WRITTEN, "refusal": None}
    events = events_of(await post(ScriptedGeneration(*TOKENS), CHAT, stream=True, **fields))[:-1]
    pieces = [event["choices"][0]["logprobs"] for event in events]
    assert pieces[0] is None
    assert [len(piece["content"]) for piece in pieces[1:]] == [1, 2, 1]
    assert [each for piece in pieces[1:] for each in piece["content"]] == WRITTEN


async def test_log_probabilities_of_a_completion() -> None:
    expected = {
        "tokens": ["Hé", "bytes:\\xf0\\x9f", "bytes:\\x99\\x82", "</s>"],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [
            {"Hi": -1.5, "Hé": -0.5},
            {"bytes:\\xf0\\x9f": -0.5},
            {"bytes:\\x99\\x82": -0.5},
            {"</s>": -0.5},
        ],
        "text_offset": [0, 2, 2, 3],
    }
    whole = (await post(ScriptedGeneration(*TOKENS), COMPLETIONS, logprobs=1)).json()["choices"][0]["logprobs"]
    assert whole == expected
    events = events_of(await post(ScriptedGeneration(*TOKENS), COMPLETIONS, stream=True, logprobs=1))[:-1]
    pieces = [event["choices"][0]["logprobs"] for event in events]
    assert {key: [each for piece in pieces for each in piece[key]] for key in expected} == expected


async def test_no_log_probabilities_unless_asked_for() -> None:
    assert (await post(ScriptedGeneration(*TOKENS), CHAT)).json()["choices"][0]["logprobs"] is None
    assert (await post(ScriptedGeneration(*TOKENS), COMPLETIONS)).json()["choices"][0]["logprobs"] is None
