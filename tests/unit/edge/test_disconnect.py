"""A client that leaves, or stops reading, cancels its request in every phase; behind a real socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import orjson
import pytest

from services.frontend.edge import EdgeOptions
from tests.unit.edge.fakes import Hang, ScriptedGeneration, said
from tests.unit.edge.harness import BODIES, COMPLETIONS, ROUTES, served

CANCEL_SECONDS = 1.0


@asynccontextmanager
async def requested(port: int, route: str, *, stream: bool, receive_buffer: int = 0) -> AsyncGenerator[Connection]:
    """A connection on which one request was sent."""
    connection = socket.socket()
    connection.setblocking(False)
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, ("127.0.0.1", port))
    body = orjson.dumps(BODIES[route] | {"stream": stream})
    head = f"POST {route} HTTP/1.1\r\nhost: e\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    await loop.sock_sendall(connection, head.encode() + body)
    try:
        yield Connection(connection)
    finally:
        connection.close()


class Connection:
    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    async def read_until(self, mark: bytes) -> bytes:
        received = b""
        async with asyncio.timeout(5):
            while mark not in received:
                data = await asyncio.get_running_loop().sock_recv(self._socket, 4096)
                assert data, received
                received += data
        return received

    def leave(self) -> None:
        self._socket.close()


async def soon(event: asyncio.Event) -> None:
    async with asyncio.timeout(CANCEL_SECONDS):
        await event.wait()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_before_the_first_output(route: str, stream: bool) -> None:
    generation = ScriptedGeneration(Hang())
    async with served(generation) as port, requested(port, route, stream=stream) as connection:
        await soon(generation.submitted)
        # submit() of this one has no await, so the request is live.
        assert not generation.live[0].cancelled.is_set()
        connection.leave()
        await soon(generation.live[0].cancelled)


@pytest.mark.parametrize("route", ROUTES)
async def test_leaving_in_a_stream(route: str) -> None:
    generation = ScriptedGeneration(said("Hel"), Hang())
    async with served(generation) as port, requested(port, route, stream=True) as connection:
        await connection.read_until(b"Hel")
        assert not generation.live[0].cancelled.is_set()
        connection.leave()
        await soon(generation.live[0].cancelled)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_while_the_request_is_being_submitted(route: str, stream: bool) -> None:
    generation = ScriptedGeneration(submit_hangs=True)
    async with served(generation) as port, requested(port, route, stream=stream) as connection:
        await soon(generation.submitted)
        connection.leave()
        await soon(generation.submit_cancelled)


async def test_leaving_with_unread_events() -> None:
    generation = ScriptedGeneration(*[said("x" * 4096)] * 10_000, Hang())
    async with served(generation) as port, requested(port, COMPLETIONS, stream=True, receive_buffer=4096) as connection:
        await connection.read_until(b"200 OK")
        await asyncio.sleep(0.2)
        assert not generation.live[0].cancelled.is_set()
        connection.leave()
        await soon(generation.live[0].cancelled)


async def test_a_client_that_reads_nothing_loses_its_request() -> None:
    generation = ScriptedGeneration(*[said("x" * 4096)] * 10_000, Hang())
    options = EdgeOptions(write_timeout_seconds=0.3)
    async with (
        served(generation, options) as port,
        requested(port, COMPLETIONS, stream=True, receive_buffer=4096) as connection,
    ):
        await connection.read_until(b"200 OK")
        await soon(generation.live[0].cancelled)


async def test_a_client_that_stays_is_not_cancelled() -> None:
    generation = ScriptedGeneration(said("Hel"), Hang())
    async with served(generation) as port, requested(port, COMPLETIONS, stream=True) as connection:
        await connection.read_until(b"Hel")
        await asyncio.sleep(0.3)
        assert not generation.live[0].cancelled.is_set()


async def test_an_event_is_sent_when_it_happens() -> None:
    """Not only once the answer is over."""
    generation = ScriptedGeneration(said("Hel"), Hang())
    async with served(generation) as port, requested(port, COMPLETIONS, stream=True) as connection:
        assert b'"text":"Hel"' in await connection.read_until(b"Hel")


async def test_stopping_the_server_cancels_what_runs() -> None:
    generation = ScriptedGeneration(said("Hel"), Hang())
    async with served(generation) as port, requested(port, COMPLETIONS, stream=True) as connection:
        await connection.read_until(b"Hel")
    await soon(generation.live[0].cancelled)


@pytest.mark.parametrize("route", ROUTES)
async def test_a_connection_serves_one_answer_after_the_other(route: str) -> None:
    generation = ScriptedGeneration()
    async with served(generation) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(3):
            body = orjson.dumps(BODIES[route])
            writer.write(f"POST {route} HTTP/1.1\r\nhost: e\r\ncontent-type: application/json\r\n".encode())
            writer.write(f"content-length: {len(body)}\r\n\r\n".encode() + body)
            async with asyncio.timeout(5):
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                answer = orjson.loads(await reader.readexactly(length))
            assert answer["usage"]["total_tokens"] == 10
        writer.close()
    assert len(generation.live) == 3
