"""Several answers to one prompt, and several prompts in one request."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from kvbaton.errors import Reason, invalid
from kvbaton.token_ids import unpack
from services.frontend.request.api import Finished, FinishReason, Output
from tests.unit.edge.fakes import Hang, ScriptedGeneration, Scripts, Step, ended, failure, said
from tests.unit.edge.harness import CHAT, COMPLETIONS, ROUTES, error_of, events_of, post

Code = grpc.StatusCode


def text_of(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return choice["text"]
    return (choice.get("delta") or choice.get("message") or {}).get("content") or ""


@pytest.mark.parametrize("route", ROUTES)
class TestSeveralAnswers:
    async def test_as_a_whole(self, route: str) -> None:
        choices = (await post(ScriptedGeneration(*Scripts.TWO_CHOICES), route, n=2)).json()["choices"]
        assert [(c["index"], text_of(c), c["finish_reason"]) for c in choices] == [
            (0, "ab", "stop"),
            (1, "xy", "length"),
        ]

    async def test_as_a_stream_every_choice_ends_once(self, route: str) -> None:
        events = events_of(await post(ScriptedGeneration(*Scripts.TWO_CHOICES), route, n=2, stream=True))
        assert events.pop() == "[DONE]"
        choices = [choice for event in events for choice in event["choices"]]
        for index, text, reason in ((0, "ab", "stop"), (1, "xy", "length")):
            own = [choice for choice in choices if choice["index"] == index]
            assert "".join(text_of(choice) for choice in own) == text
            assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == [reason]
            assert own[-1]["finish_reason"] == reason
        # Interleaved as they came.
        assert [c["index"] for c in choices if text_of(c)] == [0, 1, 0, 1]

    async def test_a_chat_says_who_speaks_once_for_each(self, route: str) -> None:
        events = events_of(await post(ScriptedGeneration(*Scripts.TWO_CHOICES), route, n=2, stream=True))[:-1]
        speakers = [c["index"] for event in events for c in event["choices"] if "role" in c.get("delta", ())]
        assert speakers == ([0, 1] if route == CHAT else [])

    @pytest.mark.parametrize("stream", [False, True])
    async def test_the_prompt_counts_once(self, route: str, stream: bool) -> None:
        def end(index: int, completion: int, cached: int) -> Output:
            finished = Finished(FinishReason.STOP, 7, completion, cached_prompt_tokens=cached)
            return Output([2], index=index, finished=finished)

        generation = ScriptedGeneration(end(0, 3, 4), end(1, 5, 0))
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        response = await post(generation, route, n=2, **options)
        usages = [event["usage"] for event in events_of(response)[:-1]] if stream else [response.json()["usage"]]
        assert usages[:-1] == [None] * len(usages[:-1])
        assert usages[-1] == {
            "prompt_tokens": 7,
            "completion_tokens": 8,
            "total_tokens": 15,
            # The first one's, wherever the second one was computed.
            "prompt_tokens_details": {"cached_tokens": 4},
        }

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_choice_without_an_end_is_no_answer(self, route: str, stream: bool) -> None:
        response = await post(ScriptedGeneration(said("a"), ended()), route, n=2, stream=stream)
        error = events_of(response)[-1]["error"] if stream else error_of(response)
        assert error["code"] == "internal"


async def completed(generation: ScriptedGeneration, prompt: list[Any], **fields: Any) -> Any:
    response = await post(generation, COMPLETIONS, prompt=prompt, **fields)
    assert response.status_code == 200, response.text
    return events_of(response) if fields.get("stream") else response.json()


BY_PROMPT: dict[str, tuple[Step, ...]] = {
    "a": (said("A"), ended()),
    "b": (said("B"), said("BB"), ended(reason=FinishReason.LENGTH)),
}


class TestSeveralPrompts:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_choices_are_in_the_order_of_the_prompts(self, stream: bool) -> None:
        generation = ScriptedGeneration(by_prompt=BY_PROMPT)
        answer = await completed(generation, ["a", "b"], stream=stream)
        choices = [c for event in answer[:-1] for c in event["choices"]] if stream else answer["choices"]
        texts, reasons = ["", ""], [[], []]
        for choice in choices:
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]] += [choice["finish_reason"]] if choice["finish_reason"] else []
        assert texts == ["A", "BBB"]
        assert reasons == [["stop"], ["length"]]
        if stream:
            assert answer[-1] == "[DONE]"
        else:
            assert [choice["index"] for choice in choices] == [0, 1]

    async def test_choices_of_each_prompt_follow_one_another(self) -> None:
        script = (said("x"), said("y", index=1), ended(), ended(index=1))
        choices = (await completed(ScriptedGeneration(*script), ["a", "b"], n=2))["choices"]
        assert [(c["index"], c["text"]) for c in choices] == [(0, "x"), (1, "y"), (2, "x"), (3, "y")]

    @pytest.mark.parametrize(
        ("prompt", "inputs"),
        [(["a", "b"], ["a", "b"]), ([[1, 2], [3]], [[1, 2], [3]])],
    )
    async def test_each_is_a_request_of_its_own(self, prompt: list[Any], inputs: list[Any]) -> None:
        generation = ScriptedGeneration()
        answer = await completed(generation, prompt, seed=3, max_tokens=5)
        given = [r.text or list(unpack(r.token_ids)) for r in generation.requests]
        assert sorted(given, key=str) == sorted(inputs, key=str)
        assert {r.sampling.seed for r in generation.requests} == {3}
        assert sorted(r.request_id for r in generation.requests) == [f"{answer['id']}-0", f"{answer['id']}-1"]

    @pytest.mark.parametrize("stream", [False, True])
    async def test_all_prompts_count(self, stream: bool) -> None:
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        answer = await completed(ScriptedGeneration(), ["a", "b"], **options)
        usage = answer[-2]["usage"] if stream else answer["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (14, 6, 20)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_refused_one_ends_all(self, stream: bool) -> None:
        bad = invalid("text", "the prompt is empty")
        generation = ScriptedGeneration(by_prompt={"a": (Hang(),), "b": (bad,)})
        response = await post(generation, COMPLETIONS, prompt=["a", "b"], stream=stream)
        assert response.status_code == 400
        error = error_of(response)
        assert (error["param"], error["message"]) == ("prompt[1]", "prompt[1]: the prompt is empty")
        assert response.headers["x-request-id"].startswith("cmpl-")
        assert all(live.cancelled.is_set() for live in generation.live)

    async def test_a_failure_in_the_stream_ends_all(self) -> None:
        late = (said("x"), failure(Code.ABORTED, Reason.LEG_ENDED_EARLY))
        generation = ScriptedGeneration(by_prompt={"a": (said("y"), Hang()), "b": late})
        events = await completed(generation, ["a", "b"], stream=True)
        assert events[-1]["error"]["code"] == "leg_ended_early"
        assert all(live.cancelled.is_set() for live in generation.live)

    async def test_a_bug_ends_all(self) -> None:
        generation = ScriptedGeneration(by_prompt={"a": (Hang(),), "b": (ValueError("secret"),)})
        response = await post(generation, COMPLETIONS, prompt=["a", "b"])
        assert response.status_code == 500
        assert "secret" not in response.text
        assert generation.live[0].cancelled.is_set()

    async def test_nothing_is_left_running(self) -> None:
        before = asyncio.all_tasks()
        await completed(ScriptedGeneration(), ["a", "b", "c"])
        assert asyncio.all_tasks() == before


class TestEcho:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("prompt", "texts"),
        [
            ("Once", ["OnceHello"]),
            ([79, 110, 99, 101], ["OnceHello"]),
            (["a", "b"], ["aHello", "bHello"]),
            ([[97], [98]], ["aHello", "bHello"]),
        ],
    )
    async def test_the_prompt_comes_first(self, prompt: Any, texts: list[str], stream: bool) -> None:
        answer = await completed(ScriptedGeneration(), prompt, echo=True, stream=stream)
        choices = [c for event in answer[:-1] for c in event["choices"]] if stream else answer["choices"]
        joined = [""] * len(texts)
        for choice in choices:
            joined[choice["index"]] += choice["text"]
        assert joined == texts

    async def test_token_ids_that_are_no_text_are_refused_by_name(self) -> None:
        generation = ScriptedGeneration(refusal=invalid("token_ids", "token 9 is outside the vocabulary"))
        response = await post(generation, COMPLETIONS, prompt=[9], echo=True)
        assert response.status_code == 400
        assert error_of(response)["param"] == "prompt"


@pytest.mark.parametrize("route", ROUTES)
async def test_counts_in_every_event(route: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    generation = ScriptedGeneration(said("a", 1, 2), said("b"), ended())
    events = events_of(await post(generation, route, stream=True, stream_options=options))[:-1]
    counts = [(e["usage"]["prompt_tokens"], e["usage"]["completion_tokens"]) for e in events]
    assert counts == [(7, 2)] * (2 if route == CHAT else 1) + [(7, 3)] * 3
