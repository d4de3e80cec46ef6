"""TextService: the tokens that Generate would send, and the text that it would answer, without an engine."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from kvbaton.client import ChatMessage, SamplingParams
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import text_pb2, text_pb2_grpc
from kvbaton.v1.generate_pb2 import ChatInput
from services.requests import Role
from tests.support.cluster import FakeCluster
from tests.support.fake_engine import Behaviour
from tests.support.waiting import eventually

GREEDY = SamplingParams(max_new_tokens=4, temperature=0)
CHAT = [ChatMessage(role="user", content="abc"), ChatMessage(role="assistant", content="é")]


@pytest.fixture
def link() -> str:
    """The one with a window of slots."""
    return "session"


async def tokenize(cluster: FakeCluster, request: text_pb2.TokenizeRequest) -> text_pb2.TokenizeResponse:
    """Raises RequestError."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.frontend.grpc_port}") as channel:
        try:
            return await text_pb2_grpc.TextServiceStub(channel).Tokenize(request, timeout=20)
        except grpc.aio.AioRpcError as error:
            raise RequestError.from_rpc_error(error) from error


async def detokenize(cluster: FakeCluster, request: text_pb2.DetokenizeRequest) -> str:
    """Raises RequestError."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.frontend.grpc_port}") as channel:
        try:
            return (await text_pb2_grpc.TextServiceStub(channel).Detokenize(request, timeout=20)).text
        except grpc.aio.AioRpcError as error:
            raise RequestError.from_rpc_error(error) from error


async def test_the_tokens_are_those_that_generate_sends(cluster: FakeCluster) -> None:
    prefill, _ = await cluster.start_pair()
    await cluster.client.generate(text="abc é", sampling=GREEDY)
    await cluster.client.generate(chat=CHAT, sampling=GREEDY)
    by_text, by_chat = (list(request.token_ids) for request in prefill.engine.seen)
    response = await tokenize(cluster, text_pb2.TokenizeRequest(text="abc é"))
    assert list(response.token_ids) == by_text
    assert "".join(response.tokens[:3]) == "abc"
    assert len(response.tokens) == len(by_text)
    assert response.context_length == 256
    response = await tokenize(cluster, text_pb2.TokenizeRequest(chat=ChatInput(messages=CHAT)))
    assert list(response.token_ids) == by_chat


async def test_the_text_is_that_of_the_answer(cluster: FakeCluster) -> None:
    await cluster.start_pair()
    answer = await cluster.client.generate(token_ids=[5, 6], sampling=SamplingParams(max_new_tokens=40, temperature=0))
    assert await detokenize(cluster, text_pb2.DetokenizeRequest(token_ids=answer.token_ids)) == answer.text
    tokens = (await tokenize(cluster, text_pb2.TokenizeRequest(text="grüße 😀"))).token_ids
    assert await detokenize(cluster, text_pb2.DetokenizeRequest(token_ids=tokens)) == "grüße 😀"
    assert await detokenize(cluster, text_pb2.DetokenizeRequest()) == ""


async def test_the_python_client_has_both(cluster: FakeCluster) -> None:
    await cluster.start_pair()
    response = await cluster.client.tokenize(text="abc")
    assert list(response.tokens) == ["a", "b", "c"]
    assert await cluster.client.detokenize(response.token_ids) == "abc"
    chat = await cluster.client.tokenize(chat=CHAT)
    assert await cluster.client.detokenize(chat.token_ids) == "user:abc;assistant:é;"


async def test_special_tokens_are_added_to_texts_and_left_out_of_answers(
    cluster: FakeCluster, marking_folder: Path
) -> None:
    await cluster.start_worker(Role.AGGREGATED, model_folder=marking_folder)
    await cluster.routable(1)

    async def tokens(**request: object) -> list[int]:
        return list((await tokenize(cluster, text_pb2.TokenizeRequest(**request))).token_ids)  # type: ignore[arg-type]

    chat = ChatInput(messages=[ChatMessage(role="user", content="a")])
    marked, plain = await tokens(text="a"), await tokens(text="a", add_special_tokens=False)
    assert marked[1:] == plain
    assert (await tokens(chat=chat))[0] != marked[0]
    assert (await tokens(chat=chat, add_special_tokens=True))[0] == marked[0]
    assert await detokenize(cluster, text_pb2.DetokenizeRequest(token_ids=marked)) == "a"
    shown = text_pb2.DetokenizeRequest(token_ids=marked, skip_special_tokens=False)
    assert await detokenize(cluster, shown) == "<begin>a"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({}, "input"),
        ({"text": ""}, "text"),
        ({"text": "x" * 251}, "text"),
        ({"text": "x" * 100_000}, "text"),
        ({"chat": {}}, "chat.messages"),
        ({"chat": {"messages": [{"content": "x"}]}}, "chat.messages[0].role"),
        ({"chat": {"messages": [{"role": "user", "content": "x" * 300}]}}, "chat"),
    ],
)
async def test_bad_input_is_refused_as_generate_refuses_it(
    cluster: FakeCluster, request_: dict[str, object], field: str
) -> None:
    await cluster.start_pair()
    with pytest.raises(RequestError) as caught:
        await tokenize(cluster, text_pb2.TokenizeRequest(**request_))  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


@pytest.mark.parametrize("token_ids", [[1, 49152], [2**32 - 1], [1] * 257])
async def test_tokens_that_no_answer_can_have_are_refused(cluster: FakeCluster, token_ids: list[int]) -> None:
    await cluster.start_pair()
    with pytest.raises(RequestError) as caught:
        await detokenize(cluster, text_pb2.DetokenizeRequest(token_ids=token_ids))
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, "token_ids")


async def test_models_are_found_as_generate_finds_them(cluster: FakeCluster) -> None:
    with pytest.raises(RequestError) as caught:
        await tokenize(cluster, text_pb2.TokenizeRequest(text="x"))
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    await cluster.start_worker(Role.AGGREGATED, served_model_name="one")
    await cluster.start_worker(Role.EMBEDDING, served_model_name="two")
    await cluster.routable(2)
    for name, code in (("", grpc.StatusCode.INVALID_ARGUMENT), ("three", grpc.StatusCode.NOT_FOUND)):
        for call in (
            tokenize(cluster, text_pb2.TokenizeRequest(model=name, text="x")),
            detokenize(cluster, text_pb2.DetokenizeRequest(model=name, token_ids=[1])),
        ):
            with pytest.raises(RequestError) as caught:
                await call
            assert (caught.value.code, caught.value.field) == (code, "model")
    for name in ("one", "two"):
        assert len((await tokenize(cluster, text_pb2.TokenizeRequest(model=name, text="xyz"))).token_ids) == 3


async def test_a_model_without_tokenizer_says_so(cluster: FakeCluster, tmp_path: Path) -> None:
    await cluster.start_worker(Role.AGGREGATED, model_folder=tmp_path)
    await cluster.routable(1)
    for call in (
        tokenize(cluster, text_pb2.TokenizeRequest(text="x")),
        detokenize(cluster, text_pb2.DetokenizeRequest(token_ids=[1])),
    ):
        with pytest.raises(RequestError) as caught:
            await call
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.NO_TOKENIZER)


async def test_both_work_while_every_slot_is_taken(cluster: FakeCluster) -> None:
    await cluster.start_worker(Role.PREFILL)
    decode = await cluster.start_worker(Role.DECODE, Behaviour(hang=True), window=1)
    await cluster.routable(2)
    running = [asyncio.create_task(cluster.client.generate(token_ids=[5], sampling=GREEDY)) for _ in range(3)]
    await eventually(lambda: len(decode.engine.live) == 1)
    began = time.monotonic()
    assert (await tokenize(cluster, text_pb2.TokenizeRequest(text="abc"))).token_ids
    assert await detokenize(cluster, text_pb2.DetokenizeRequest(token_ids=[1]))
    assert time.monotonic() - began < 2
    assert len(decode.engine.seen) == 1
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def test_a_draining_frontend_refuses_them(cluster: FakeCluster) -> None:
    _, decode = await cluster.start_pair()
    decode.engine.behaviour.token_seconds = 0.05
    running = asyncio.create_task(
        cluster.client.generate(token_ids=[5], sampling=SamplingParams(max_new_tokens=20, temperature=0))
    )
    await eventually(lambda: decode.engine.live)
    draining = asyncio.create_task(cluster.frontend.drain())
    await eventually(lambda: cluster.frontend.generation.draining)
    for call in (
        tokenize(cluster, text_pb2.TokenizeRequest(text="x")),
        detokenize(cluster, text_pb2.DetokenizeRequest(token_ids=[1])),
    ):
        with pytest.raises(RequestError) as caught:
            await call
        assert caught.value.reason is Reason.SHUTTING_DOWN
    await running
    await draining


async def test_reflection_and_health_know_the_service(cluster: FakeCluster) -> None:
    await cluster.start_pair()

    def services() -> list[str]:
        with grpc.insecure_channel(f"127.0.0.1:{cluster.frontend.grpc_port}") as channel:
            return list(ProtoReflectionDescriptorDatabase(channel).get_services())

    assert "kvbaton.v1.TextService" in await asyncio.to_thread(services)


async def test_texts_in_work_are_bounded(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    await cluster.start_pair()
    monkeypatch.setattr(cluster.frontend.generation._text, "_limit", 0)
    with pytest.raises(RequestError) as caught:
        await tokenize(cluster, text_pb2.TokenizeRequest(text="x"))
    assert (caught.value.code, caught.value.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.TOO_MANY_REQUESTS,
    )
