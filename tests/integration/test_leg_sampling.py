"""Log probabilities, grammars and biases through workers to their engines, and an engine's refusal back."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

import grpc
import pytest

from kvbaton.client import Client
from kvbaton.errors import RequestError
from kvbaton.v1 import generate_pb2, generate_pb2_grpc
from services.requests import Grammar, GrammarKind, Role
from services.worker.engines.protocol import EngineDelta, EngineInfo, EngineRefusedError, EngineRequest
from tests.support.cluster import FakeCluster
from tests.support.fake_engine import FakeEngine

REGEX = "[a-z]+"


@pytest.fixture
def with_grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that have a grammar backend."""
    describe = FakeEngine.info

    def info(self: FakeEngine) -> EngineInfo:
        return dataclasses.replace(describe(self), grammar_backend="fake")

    monkeypatch.setattr(FakeEngine, "info", info)


async def send(target: str, request: generate_pb2.GenerateRequest) -> RequestError | None:
    async with grpc.aio.insecure_channel(target) as channel:
        try:
            async for _ in generate_pb2_grpc.GenerateServiceStub(channel).Generate(request, timeout=20):
                pass
        except grpc.aio.AioRpcError as error:
            return RequestError.from_rpc_error(error)
    return None


def asks(**sampling: object) -> generate_pb2.GenerateRequest:
    params = generate_pb2.SamplingParams(max_new_tokens=4, **sampling)  # pyright: ignore[reportArgumentType]
    return generate_pb2.GenerateRequest(token_ids=generate_pb2.TokenIds(ids=[5, 6]), sampling=params)


@pytest.mark.usefixtures("with_grammars")
async def test_both_legs_reach_their_engines_complete(cluster: FakeCluster) -> None:
    pair = await cluster.start_pair()
    request = asks(regex=REGEX, logit_bias={7: -100.0})
    request.logprobs = 3
    assert await send(f"127.0.0.1:{cluster.frontend.grpc_port}", request) is None
    for worker in pair:
        seen = worker.engine.seen[-1]
        assert seen.logprobs == 3
        assert seen.sampling.grammar == Grammar(GrammarKind.REGEX, REGEX)
        assert seen.sampling.logit_bias == ((7, -100.0),)


async def test_a_worker_refuses_by_field_what_its_engine_never_sees(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED)
    await cluster.routable(1)
    too_many = asks()
    too_many.logprobs = 21
    for request, field in (
        (too_many, "logprobs"),
        (asks(logit_bias={7: 101.0}), "sampling.logit_bias"),
        (asks(regex=REGEX), "sampling.regex"),
    ):
        error = await send(worker.endpoint, request)
        assert error is not None
        assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert worker.engine.seen == []


@pytest.mark.usefixtures("with_grammars")
async def test_an_engine_that_refuses_a_field_is_heard_and_not_blamed(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuses(self: FakeEngine, request: EngineRequest) -> AsyncIterator[EngineDelta]:
        self.seen.append(request)
        raise EngineRefusedError("not closed", field="sampling.regex")
        yield

    pair = await cluster.start_pair()
    monkeypatch.setattr(FakeEngine, "generate", refuses)
    error = await send(f"127.0.0.1:{cluster.frontend.grpc_port}", asks(regex="(a"))
    assert error is not None
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "sampling.regex")
    assert "sampling.regex: not closed" in error.message
    assert all(len(worker.engine.seen) <= 1 for worker in pair), "another pair would say the same"
    async with Client(pair[0].endpoint) as client:
        assert not (await client.status()).load.live_requests
