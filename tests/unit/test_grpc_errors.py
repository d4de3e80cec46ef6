"""What a client gets when a handler raises or a message can't be parsed, over a real gRPC server."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from kvbaton.errors import RequestError, invalid
from kvbaton.v1 import generate_pb2
from services.grpc_errors import TypedErrors

NO_MESSAGE = b"\xff" * 20
parse = generate_pb2.AbortRequest.FromString


class Request:
    """A message that can be watched."""

    born: list[weakref.ref[Request]] = []  # noqa: RUF012

    def __init__(self, _: bytes) -> None:
        self.born.append(weakref.ref(self))


async def one(_request: Any, _context: Any) -> bytes:
    return b"one"


async def several(_request: Any, _context: Any) -> AsyncIterator[bytes]:
    yield b"one"


async def echo(requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[bytes]:
    async for _ in requests:
        yield b"one"


async def refuse(_request: Any, _context: Any) -> bytes:
    try:
        raise invalid("text", "too long")
    except RequestError as error:
        raise error.with_context(request_id="r") from error


async def refuse_later(_request: Any, _context: Any) -> AsyncIterator[bytes]:
    yield b"one"
    raise invalid("text", "too long")


@pytest_asyncio.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[TypedErrors()])
    handlers = {
        "One": grpc.unary_unary_rpc_method_handler(one, parse),
        "Several": grpc.unary_stream_rpc_method_handler(several, parse),
        "Echo": grpc.stream_stream_rpc_method_handler(echo, parse),
        "Refuse": grpc.unary_unary_rpc_method_handler(refuse, Request),
        "RefuseLater": grpc.unary_stream_rpc_method_handler(refuse_later, Request),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


async def error_of(call: Any) -> RequestError:
    async def end() -> None:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await end()
    return RequestError.from_rpc_error(caught.value)


async def test_a_message_that_cannot_be_parsed_is_an_invalid_argument(
    channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    calls = [
        channel.unary_unary("/t.T/One")(NO_MESSAGE),
        channel.unary_stream("/t.T/Several")(NO_MESSAGE),
        channel.stream_stream("/t.T/Echo")(iter([b"", NO_MESSAGE])),
    ]
    for call in calls:
        error = await error_of(call)
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "AbortRequest" in error.message
    assert not caplog.records, "anybody can send such bytes: they are worth no log"


@pytest.mark.parametrize("method", ["Refuse", "RefuseLater"])
async def test_a_refused_request_is_not_kept_until_the_garbage_collector_comes(
    channel: grpc.aio.Channel, method: str
) -> None:
    Request.born.clear()
    gc.collect()
    gc.disable()
    try:
        kind: Any = channel.unary_unary if method == "Refuse" else channel.unary_stream
        assert (await error_of(kind(f"/t.T/{method}")(b"x"))).field == "text"
        await asyncio.sleep(0.05)
        assert [each() for each in Request.born] == [None]
    finally:
        gc.enable()
