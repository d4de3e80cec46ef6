"""`kvbaton generate`: what is sent, and what is said about the answer."""

import argparse

import grpc
import pytest

from kvbaton.client import Answer
from kvbaton.errors import Reason, RequestError
from kvbaton.generating import generate_request
from kvbaton.v1 import generate_pb2
from services.tools import generate


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser.add_subparsers())
    return parser.parse_args(["generate", *arguments])


def test_only_what_was_given_is_sent():
    params = generate.sampling(parsed("hello"))
    assert params == generate_pb2.SamplingParams()


def test_a_zero_that_was_given_is_sent():
    params = generate.sampling(parsed("hello", "--temperature", "0", "--seed", "0", "--stop", "a", "--stop", "b"))
    assert params.HasField("temperature")
    assert params.HasField("seed")
    assert list(params.stop) == ["a", "b"]


def test_where_it_runs_and_when_can_be_said():
    options = generate.request_options(
        parsed("hi", "--prefill-worker", "p", "--decode-worker", "d", "--priority", "-1", "--cache-salt", "s"), "hi"
    )
    request = generate_request(options)
    assert (request.prefill_worker, request.decode_worker) == ("p", "d")
    assert (request.priority, request.cache_salt, request.text) == (-1, "s", "hi")
    assert not generate_request(generate.request_options(parsed("hi"), "hi")).HasField("priority")


def test_a_chat_is_the_prompt_as_a_users_message():
    assert generate.messages("hi", None) == [{"role": "user", "content": "hi"}]
    assert generate.messages("hi", "be brief")[0] == {"role": "system", "content": "be brief"}


def test_the_summary_names_both_workers_and_the_ending():
    answer = Answer()
    answer.finished = generate_pb2.Finished(
        reason=generate_pb2.FINISH_REASON_STOP,
        matched_stop="END",
        usage=generate_pb2.Usage(prompt_tokens=5, completion_tokens=7),
        prefill_worker="prefill-a",
        decode_worker="decode-b",
    )
    text = generate.describe_answer(answer, 0.25, 12.0)
    for part in ("7 tokens", "prompt of 5", "250 ms", "12.0 tokens/s", "stop ('END')", "prefill-a -> decode-b"):
        assert part in text


def test_an_error_is_told_with_reason_field_and_advice():
    error = RequestError(
        grpc.StatusCode.INVALID_ARGUMENT,
        Reason.INVALID_FIELD,
        "sampling.top_p: 2 is not in (0, 1]",
        field="sampling.top_p",
        retry_after=1.5,
    )
    text = generate.describe_error(error)
    assert "INVALID_ARGUMENT INVALID_FIELD" in text
    assert "field: sampling.top_p" in text
    assert "1.5 s" in text


def test_nobody_there_comes_with_a_hint():
    error = RequestError(grpc.StatusCode.UNAVAILABLE, Reason.UNTYPED, "failed to connect")
    assert "kvbaton up" in generate.describe_error(error)


@pytest.mark.parametrize("arguments", [["hello", "--system", "be brief"]])
def test_a_system_message_needs_a_chat(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert generate.run(parsed(*arguments), []) == 2
    assert "--chat" in capsys.readouterr().err
