"""The gate in front of the gRPC services, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2 as grpc_health_pb2
from grpc_health.v1 import health_pb2_grpc as grpc_health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from kvbaton.client import Client
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import embed_pb2_grpc, generate_pb2, generate_pb2_grpc, model_pb2_grpc
from services.frontend.access.gate import Gate
from services.frontend.access.guarded import GuardedEmbedding, GuardedGeneration
from services.frontend.servicers.embed import EmbedServicer
from services.frontend.servicers.gate import RpcGate
from services.frontend.servicers.generate import GenerateServicer
from services.frontend.servicers.model import ModelServicer
from services.grpc_health import GrpcHealth
from services.tools.bench.samples import Kind
from services.tools.bench.sender import CancelTimes, Sender
from services.tools.bench.workload import Planned
from services.tools.client_flags import ClientFlags
from services.transport import bind, make_channel, make_server
from tests.support.waiting import eventually
from tests.unit.access.support import ALICE, BOB, Clock, key
from tests.unit.edge.fakes import MODEL, Hang, ScriptedEmbedding, ScriptedGeneration, said

PROMPT = [1, 2, 3]


@asynccontextmanager
async def served(
    gate: Gate, generation: ScriptedGeneration | None = None, *, max_message_bytes: int = 1 << 20
) -> AsyncGenerator[str]:
    """The address of the services behind a gate."""
    inner = generation or ScriptedGeneration()
    guarded = GuardedGeneration(inner)
    health = GrpcHealth(())

    def register(server: grpc.aio.Server) -> tuple[str, ...]:
        health.register(server)
        generate_pb2_grpc.add_GenerateServiceServicer_to_server(GenerateServicer(guarded), server)
        embed_pb2_grpc.add_EmbedServiceServicer_to_server(
            EmbedServicer(GuardedEmbedding(ScriptedEmbedding(), inner)), server
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(guarded), server)
        return ()

    options = [("grpc.max_receive_message_length", max_message_bytes)]
    server = make_server(register, interceptors=[RpcGate(gate)], options=options)
    port = bind(server, "127.0.0.1", 0)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def refusal(address: str, secret: str, *, model: str = MODEL) -> RequestError:
    async with Client(address, api_key=secret) as client:
        with pytest.raises(RequestError) as caught:
            await client.generate(token_ids=PROMPT, model=model)
    return caught.value


async def test_a_key_opens_every_method() -> None:
    async with served(Gate([key()])) as address, Client(address, api_key=ALICE) as client:
        assert (await client.generate(token_ids=PROMPT, model=MODEL)).text == "Hello"
        assert (await client.embed([PROMPT], model=MODEL)).vectors == [[0.5, 0.0]]
        assert [info.model.name for info in await client.list_models()] == [MODEL]
        assert await client.abort("nobody") is False


@pytest.mark.parametrize(("secret", "reason"), [("", Reason.API_KEY_MISSING), ("kvb-no", Reason.INVALID_API_KEY)])
async def test_without_one_every_method_is_unauthenticated(secret: str, reason: Reason) -> None:
    generation = ScriptedGeneration()
    async with served(Gate([key()]), generation) as address, Client(address, api_key=secret) as client:
        for call in (
            client.generate(token_ids=PROMPT),
            client.embed([PROMPT]),
            client.list_models(),
            client.model_info(),
            client.abort("x"),
            client.status(),
            client.probe(),
        ):
            with pytest.raises(RequestError) as caught:
                await call
            assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)
    assert generation.requests == []


async def test_health_and_reflection_stay_open() -> None:
    async with served(Gate([key()])) as address, make_channel(address) as channel:
        # The published stubs don't know asyncio's channels.
        health: Any = grpc_health_pb2_grpc.HealthStub(channel)
        await health.Check(grpc_health_pb2.HealthCheckRequest(), timeout=5)
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # pyright: ignore[reportArgumentType]
        answers = [answer async for answer in stub.ServerReflectionInfo(iter([listing]), timeout=5)]
        assert answers[0].list_services_response.service


async def test_the_refusal_does_not_wait_for_the_message() -> None:
    """A stream of requests that never sends one is refused, too."""
    async with served(Gate([key()])) as address, make_channel(address) as channel:
        call = channel.stream_stream("/kvbaton.v1.GenerateService/Generate")(timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_model_that_the_key_may_not_use() -> None:
    generation = ScriptedGeneration(models=(MODEL, "other"))
    async with served(Gate([key(models=frozenset({"other"}))]), generation) as address:
        error = await refusal(address, ALICE)
        assert (error.code, error.field) == (grpc.StatusCode.PERMISSION_DENIED, "model")
        assert error.reason is Reason.MODEL_NOT_ALLOWED
        async with Client(address, api_key=ALICE) as client:
            with pytest.raises(RequestError) as caught:
                await client.embed([PROMPT], model=MODEL)
            assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED
            assert [info.model.name for info in await client.list_models()] == ["other"]
            with pytest.raises(RequestError) as hidden:
                await client.model_info(MODEL)
            assert hidden.value.code is grpc.StatusCode.NOT_FOUND
    assert generation.requests == []


async def test_limits_come_with_error_info_and_retry_info() -> None:
    gate = Gate([key(requests_per_minute=1)], clock=Clock())
    async with served(gate) as address, make_channel(address) as channel:
        stub = generate_pb2_grpc.GenerateServiceStub(channel)
        metadata = (("authorization", f"Bearer {ALICE}"),)
        request = generate_pb2.GenerateRequest(model=MODEL, token_ids=generate_pb2.TokenIds(ids=PROMPT))
        async for _ in stub.Generate(request, timeout=5, metadata=metadata):  # type: ignore[attr-defined]
            pass
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(request, timeout=5, metadata=metadata):  # type: ignore[attr-defined]
                pass
        status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
        assert status is not None
        assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        assert [detail.Unpack(info) or detail.Unpack(retry) for detail in status.details] == [True, True]
        assert (info.domain, info.reason) == ("kvbaton", "RATE_LIMIT_EXCEEDED")
        assert retry.retry_delay.seconds == 60


async def test_a_stream_holds_its_place_until_it_ends() -> None:
    generation = ScriptedGeneration(said("Hel"), Hang())
    gate = Gate([key(concurrent_requests=1)])
    async with served(gate, generation) as address, Client(address, api_key=ALICE) as client:
        chunks = client.stream(token_ids=PROMPT, model=MODEL)
        assert (await anext(chunks)).text == "Hel"
        error = await refusal(address, ALICE)
        assert error.reason is Reason.CONCURRENCY_LIMIT_EXCEEDED
        await chunks.aclose()  # type: ignore[attr-defined]
        caller = gate.identify(f"Bearer {ALICE}".encode())
        await eventually(lambda: caller.running == 0, within=5.0, what="the place to be free")


async def test_nobody_aborts_the_request_of_another_key() -> None:
    class Aborting(ScriptedGeneration):
        def abort(self, request_id: str) -> bool:
            for each in self.live:
                if each.request_id == request_id:
                    each.cancel()
                    return True
            return False

    generation = Aborting(said("Hel"), Hang())
    async with (
        served(Gate([key(), key("bob", BOB)]), generation) as address,
        Client(address, api_key=ALICE) as alice,
        Client(address, api_key=BOB) as bob,
    ):
        chunks = alice.stream(token_ids=PROMPT, model=MODEL, request_id="r-1")
        await anext(chunks)
        assert await bob.abort("r-1") is False
        assert not generation.live[0].cancelled.is_set()
        assert await alice.abort("r-1") is True
        with pytest.raises(RequestError) as caught:
            await anext(chunks)
        assert caught.value.code is grpc.StatusCode.CANCELLED


async def test_an_abort_that_came_first_waits_for_the_request_of_its_own_key() -> None:
    class Remembering(ScriptedGeneration):
        def abort(self, request_id: str) -> bool:
            raise AssertionError(f"{request_id} would be remembered for whoever comes first")

    async with (
        served(Gate([key(), key("bob", BOB)]), Remembering()) as address,
        Client(address, api_key=ALICE) as alice,
        Client(address, api_key=BOB) as bob,
    ):
        assert await bob.abort("r-1") is False
        assert (await alice.generate(token_ids=PROMPT, model=MODEL, request_id="r-1")).text == "Hello"
        with pytest.raises(RequestError) as caught:
            await bob.generate(token_ids=PROMPT, model=MODEL, request_id="r-1")
        assert caught.value.code is grpc.StatusCode.CANCELLED
        # Once.
        assert (await bob.generate(token_ids=PROMPT, model=MODEL, request_id="r-1")).text == "Hello"


async def test_the_commands_send_their_key_to_the_frontend_and_to_nobody_else() -> None:
    async with served(Gate([key()])) as address:
        async with ClientFlags(endpoint=address, api_key=ALICE).client() as client:
            await client.list_models()
        async with ClientFlags(endpoint="localhost:1", api_key=ALICE).client(address) as client:
            with pytest.raises(RequestError) as caught:
                await client.list_models()
            assert caught.value.reason is Reason.API_KEY_MISSING


async def test_a_benchmark_sends_its_key() -> None:
    request = generate_pb2.GenerateRequest(model=MODEL, token_ids=generate_pb2.TokenIds(ids=PROMPT))
    async with served(Gate([key()])) as address, make_channel(address) as channel:
        for secret, kind in ((ALICE, Kind.FINISHED), ("", Kind.ERROR)):
            sample = await Sender([channel], 5.0, CancelTimes(None), secret).send(Planned(0, request, None))
            assert sample.outcome.kind is kind


async def test_a_message_that_is_too_large_is_refused_by_grpc_and_harms_nobody() -> None:
    generation = ScriptedGeneration()
    async with (
        served(Gate([key()]), generation, max_message_bytes=1000) as address,
        Client(address, api_key=ALICE) as client,
    ):
        for _ in range(3):
            with pytest.raises(RequestError) as caught:
                await client.generate(text="x" * 100_000, model=MODEL)
            assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert caught.value.reason is Reason.MESSAGE_TOO_LARGE
        assert generation.requests == []
        answers = await asyncio.gather(*(client.generate(token_ids=PROMPT, model=MODEL) for _ in range(3)))
        assert [answer.text for answer in answers] == ["Hello"] * 3
