"""What one client may cost at the HTTP edge, behind a real socket: sizes, slowness, idleness, many at once."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from services.frontend.edge import EdgeOptions
from services.frontend.edge.body import MAX_JSON_PARTS
from services.http_protocol import MAX_HEADERS, ConnectionLimits
from services.http_server import HttpServer
from services.transport import TlsConfig
from tests.support.certificates import Authority
from tests.support.waiting import eventually
from tests.unit.edge.fakes import MODEL, Hang, ScriptedGeneration, ended, said
from tests.unit.edge.harness import BODIES, CHAT, COMPLETION, COMPLETIONS, CONVERSATION, app_for, error_of, in_memory

LIVE = b"GET /live HTTP/1.1\r\nhost: e\r\n\r\n"


@asynccontextmanager
async def edge(
    generation: ScriptedGeneration | None = None, options: EdgeOptions | None = None, **limits: Any
) -> AsyncGenerator[Edge]:
    """An edge behind a real socket, with these limits."""
    app = app_for(generation or ScriptedGeneration(), options)
    limited = ConnectionLimits(**limits)
    async with (
        HttpServer(app, host="127.0.0.1", port=0, flag="-", limits=limited, stop_grace_seconds=1.0) as server,
        AsyncExitStack() as stack,
    ):
        yield Edge(server.port, stack)


class Edge:
    def __init__(self, port: int, stack: AsyncExitStack) -> None:
        self.port, self._stack = port, stack

    async def connect(self) -> Connection:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)
        self._stack.callback(writer.close)
        return Connection(reader, writer)

    async def ask(self, request: bytes) -> Answer:
        """The answer on a connection of its own."""
        connection = await self.connect()
        connection.send(request)
        return await connection.answer()


class Answer:
    def __init__(self, head: bytes, body: bytes) -> None:
        lines = head.decode().split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        self.body = body

    @property
    def code(self) -> str:
        """Of an error in OpenAI's shape."""
        error = json.loads(self.body)["error"]
        assert self.headers["content-type"] == "application/json"
        assert set(error) == {"message", "type", "param", "code"}
        return error["code"]


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def trickle(self, data: bytes, every: float) -> None:
        """Byte by byte, until all is sent or the server hangs up."""
        for position in range(len(data)):
            self._writer.write(data[position : position + 1])
            await asyncio.sleep(every)
            if self._reader.at_eof() or self._writer.is_closing():
                return

    @property
    def unsent(self) -> int:
        """Bytes that the server has not taken."""
        return self._writer.transport.get_write_buffer_size()

    def shut_writing(self) -> None:
        self._writer.write_eof()

    def leave(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        self._writer.transport.abort()

    async def answer(self) -> Answer:
        async with asyncio.timeout(10):
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            return Answer(head, await self._reader.readexactly(int(length[1])) if length else b"")

    async def until(self, mark: bytes) -> bytes:
        async with asyncio.timeout(10):
            return await self._reader.readuntil(mark)

    async def closed(self, within: float = 5.0) -> bytes:
        """What came before the end. Fails if there is none."""
        async with asyncio.timeout(within):
            try:
                return await self._reader.read()
            except ConnectionError:
                return b""

    async def is_open(self, after: float) -> bool:
        try:
            await self.closed(within=after)
        except TimeoutError:
            return True
        return False


def post(route: str, body: bytes | None = None, *headers: str) -> bytes:
    body = orjson.dumps(BODIES[route]) if body is None else body
    lines = [f"POST {route} HTTP/1.1", "host: e", "content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


async def soon(condition: Callable[[], bool]) -> None:
    await eventually(condition, within=2.0, what="the server to notice")


def cancelled(generation: ScriptedGeneration) -> Callable[[], bool]:
    return lambda: bool(generation.live) and generation.live[0].cancelled.is_set()


# Headers


@pytest.mark.parametrize("pieces", [1, 8])
async def test_headers_that_are_too_large_are_431(pieces: int) -> None:
    async with edge(max_header_bytes=4096) as server:
        connection = await server.connect()
        request = b"GET /live HTTP/1.1\r\nhost: e\r\nx-large: " + b"x" * 8000 + b"\r\n\r\n"
        for start in range(0, len(request), len(request) // pieces + 1):
            connection.send(request[start : start + len(request) // pieces + 1])
            await asyncio.sleep(0.01)
        answer = await connection.answer()
        assert (answer.status, answer.code) == (431, "headers_too_large")
        assert answer.headers["connection"] == "close"
        assert await connection.closed() == b""


async def test_a_long_path_is_431_too() -> None:
    async with edge(max_header_bytes=4096) as server:
        answer = await server.ask(b"GET /" + b"x" * 8000 + b" HTTP/1.1\r\nhost: e\r\n\r\n")
        assert (answer.status, answer.code) == (431, "headers_too_large")


async def test_headers_that_are_too_many_are_431() -> None:
    async with edge() as server:
        few = b"".join(b"x-%d: 1\r\n" % number for number in range(MAX_HEADERS - 1))
        assert (await server.ask(b"GET /live HTTP/1.1\r\nhost: e\r\n" + few + b"\r\n")).status == 200
        many = few + b"x-more: 1\r\n"
        assert (await server.ask(b"GET /live HTTP/1.1\r\nhost: e\r\n" + many + b"\r\n")).status == 431


async def test_headers_below_the_limit_pass() -> None:
    async with edge(max_header_bytes=4096) as server:
        assert (await server.ask(b"GET /live HTTP/1.1\r\nhost: e\r\nx: " + b"x" * 3900 + b"\r\n\r\n")).status == 200


async def test_a_refused_client_may_keep_sending_for_a_moment_and_reads_why() -> None:
    """A connection that is closed with unread bytes in it is reset, and the answer lost."""
    async with edge(max_header_bytes=4096) as server:
        connection = await server.connect()
        for _ in range(64):
            connection.send(b"x" * 65536)
        assert (await connection.answer()).status in (400, 431)


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # somebody speaks TLS
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nhost: e\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: e\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: e\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: e\r\nno colon\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_400(junk: bytes) -> None:
    async with edge() as server:
        answer = await server.ask(junk + b"\r\n\r\n")
        assert (answer.status, answer.code) == (400, "invalid_http")


async def test_another_version_of_http_is_505() -> None:
    """A gRPC client at the wrong port, for example."""
    async with edge() as server:
        assert (await server.ask(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")).status == 505


async def test_both_framings_at_once_smuggle_nothing() -> None:
    """The chunks count, as RFC 9112 has it; what follows them is the next request, never a part of this one."""
    async with edge() as server:
        connection = await server.connect()
        connection.send(
            b"POST /live HTTP/1.1\r\nhost: e\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
        )
        assert (await connection.answer()).status in (400, 405)


async def test_websockets_are_not_spoken() -> None:
    async with edge() as server:
        answer = await server.ask(
            b"GET /live HTTP/1.1\r\nhost: e\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        assert answer.status == 200


# Slow and idle clients


@pytest.mark.parametrize("sent_before", [0, 1])
async def test_headers_that_come_byte_by_byte_are_408(sent_before: int) -> None:
    """On a fresh connection and on one that has had an answer."""
    async with edge(header_timeout=0.4) as server:
        connection = await server.connect()
        for _ in range(sent_before):
            connection.send(LIVE)
            assert (await connection.answer()).status == 200
        trickling = asyncio.create_task(connection.trickle(LIVE * 100, 0.05))
        answer = await connection.answer()
        assert (answer.status, answer.code) == (408, "header_timeout")
        assert await connection.closed() == b""
        await trickling


async def test_a_connection_without_a_request_is_closed() -> None:
    async with edge(header_timeout=0.2) as server:
        assert await (await server.connect()).closed(within=2.0) == b""


async def test_a_tls_handshake_has_the_same_deadline(tmp_path: Path) -> None:
    cert, secret = Authority(tmp_path, "a").issue("edge")
    app = app_for(ScriptedGeneration(), None)
    limits = ConnectionLimits(header_timeout=0.3)
    async with HttpServer(
        app, host="127.0.0.1", port=0, flag="-", tls=TlsConfig(cert, secret), limits=limits, stop_grace_seconds=1.0
    ) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        assert await Connection(reader, writer).closed(within=3.0) == b""
        writer.close()


async def test_an_idle_connection_is_kept_and_then_closed() -> None:
    async with edge(header_timeout=0.2, keep_alive_timeout=0.8) as server:
        connection = await server.connect()
        connection.send(LIVE)
        assert (await connection.answer()).status == 200
        await asyncio.sleep(0.5)
        connection.send(LIVE)
        assert (await connection.answer()).status == 200
        assert await connection.closed(within=3.0) == b""


async def test_the_next_answer_on_an_old_connection_is_its_last() -> None:
    async with edge(max_age=1.0) as server:
        connection = await server.connect()
        await asyncio.sleep(1.3)
        assert await connection.is_open(after=0.1)  # a request may be on its way
        connection.send(LIVE)
        answer = await connection.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await connection.closed() == b""


async def test_a_connection_that_is_not_old_says_nothing_of_it() -> None:
    async with edge(max_age=1000.0) as server:
        connection = await server.connect()
        for _ in range(3):
            connection.send(LIVE)
            assert "connection" not in (await connection.answer()).headers
        assert await connection.is_open(after=0.1)


async def test_an_answer_that_has_not_begun_when_its_connection_grows_old_is_its_last() -> None:
    async with edge(max_age=1.0) as server:
        connection = await server.connect()
        request = post(COMPLETIONS)
        connection.send(request[:-5])
        await asyncio.sleep(1.3)
        connection.send(request[-5:])
        answer = await connection.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await connection.closed() == b""


async def test_an_answer_that_runs_when_its_connection_grows_old_is_not_cut() -> None:
    generation = ScriptedGeneration(said("Hel"), Hang())
    async with edge(generation, max_age=0.2) as server:
        connection = await server.connect()
        connection.send(post(COMPLETIONS, orjson.dumps(COMPLETION | {"stream": True})))
        await connection.until(b"Hel")
        assert await connection.is_open(after=1.0)
        assert not generation.live[0].cancelled.is_set()


async def test_a_long_answer_outlives_all_of_these() -> None:
    generation = ScriptedGeneration(said("Hel"), Hang())
    options = EdgeOptions(body_timeout_seconds=0.2, write_timeout_seconds=0.2)
    async with edge(generation, options, header_timeout=0.2, keep_alive_timeout=0.2, write_timeout=0.2) as server:
        connection = await server.connect()
        connection.send(post(COMPLETIONS, orjson.dumps(COMPLETION | {"stream": True})))
        await connection.until(b"Hel")
        assert await connection.is_open(after=1.0)
        assert not generation.live[0].cancelled.is_set()


async def test_a_body_that_stalls_is_408() -> None:
    async with edge(options=EdgeOptions(body_timeout_seconds=0.2)) as server:
        connection = await server.connect()
        connection.send(post(COMPLETIONS)[:-5])
        answer = await connection.answer()
        assert (answer.status, answer.code) == (408, "body_timeout")
        assert await connection.closed() == b""


async def test_a_body_that_trickles_is_408() -> None:
    async with edge(options=EdgeOptions(body_timeout_seconds=0.4)) as server:
        connection = await server.connect()
        head, _, body = post(COMPLETIONS).partition(b"\r\n\r\n")
        connection.send(head + b"\r\n\r\n")
        trickling = asyncio.create_task(connection.trickle(body * 50, 0.05))
        assert (await connection.answer()).status == 408
        await trickling


async def test_an_endless_body_that_nobody_reads_ends_the_connection() -> None:
    """The route was wrong, the answer is out, and the client sends on."""
    async with edge() as server:
        connection = await server.connect()
        connection.send(b"POST /nowhere HTTP/1.1\r\nhost: e\r\ntransfer-encoding: chunked\r\n\r\n")
        assert (await connection.answer()).status == 404
        trickling = asyncio.create_task(connection.trickle(b"1\r\nx\r\n" * 1000, 0.02))
        await connection.closed(within=6.0)
        trickling.cancel()


async def test_after_a_body_that_nobody_reads_the_connection_goes_on() -> None:
    async with edge() as server:
        connection = await server.connect()
        connection.send(post(COMPLETIONS, b"x" * 1_000_000).replace(b"/v1/completions", b"/nowhere"))
        assert (await connection.answer()).status == 404
        connection.send(LIVE)
        assert (await connection.answer()).status == 200


async def test_a_client_that_reads_nothing_is_dropped_though_the_answer_is_out() -> None:
    """The whole answer fits the server's buffers, so no write ever waits: the kernel has to notice."""
    generation = ScriptedGeneration(*[said("x" * 60_000)] * 40, ended())
    async with edge(generation, write_timeout=1.0, keep_alive_timeout=0.2) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, ("127.0.0.1", server.port))
        await loop.sock_sendall(connection, post(COMPLETIONS))
        await asyncio.sleep(4)
        received = 0
        try:
            while data := await asyncio.wait_for(loop.sock_recv(connection, 1 << 20), 2):
                received += len(data)
        except ConnectionResetError:
            pass
        connection.close()
        assert received < 60_000 * 40


# Many at once


async def test_one_connection_too_many_is_503() -> None:
    async with edge(max_connections=2) as server:
        first, second = await server.connect(), await server.connect()
        first.send(LIVE)
        assert (await first.answer()).status == 200
        third = await server.connect()
        answer = await third.answer()
        assert (answer.status, answer.code) == (503, "too_many_connections")
        assert answer.headers["retry-after"] == "1"
        assert await third.closed() == b""
        third.leave()
        second.leave()
        await asyncio.sleep(0.1)
        assert (await server.ask(LIVE)).status == 200
        first.send(LIVE)
        assert (await first.answer()).status == 200


async def test_refused_connections_do_not_pile_up() -> None:
    async with edge(max_connections=1) as server:
        kept = await server.connect()
        others = [await server.connect() for _ in range(10)]
        await asyncio.gather(*(other.closed(within=6.0) for other in others))
        kept.send(LIVE)
        assert (await kept.answer()).status == 200


async def test_pipelined_requests_are_answered_in_their_order() -> None:
    async with edge() as server:
        connection = await server.connect()
        connection.send(LIVE + post(COMPLETIONS) + b"GET /nowhere HTTP/1.1\r\nhost: e\r\n\r\n" + LIVE)
        assert [(await connection.answer()).status for _ in range(4)] == [200, 200, 404, 200]


# Clients that leave


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["leave", "reset", "shut_writing"])
async def test_leaving_in_any_way_cancels_the_request(how: str, stream: bool) -> None:
    generation = ScriptedGeneration(said("Hel"), Hang())
    async with edge(generation) as server:
        connection = await server.connect()
        connection.send(post(COMPLETIONS, orjson.dumps(COMPLETION | {"stream": stream})))
        await soon(lambda: bool(generation.live))
        getattr(connection, how)()
        await soon(cancelled(generation))


async def test_a_half_closed_connection_gets_no_answer_and_is_closed() -> None:
    generation = ScriptedGeneration(Hang())
    async with edge(generation) as server:
        connection = await server.connect()
        connection.send(post(COMPLETIONS))
        connection.shut_writing()
        assert await connection.closed() == b""


async def test_leaving_behind_a_pipelined_request_is_noticed() -> None:
    generation = ScriptedGeneration(Hang())
    async with edge(generation) as server:
        connection = await server.connect()
        connection.send(post(COMPLETIONS))
        await soon(lambda: bool(generation.live))
        for _ in range(3):
            connection.send(LIVE)
            await asyncio.sleep(0.02)
        assert not generation.live[0].cancelled.is_set()
        connection.leave()
        await soon(cancelled(generation))


async def test_what_is_pipelined_behind_a_running_answer_is_bounded() -> None:
    generation = ScriptedGeneration(Hang())
    async with edge(generation) as server:
        connection = await server.connect()
        connection.send(post(COMPLETIONS))
        await soon(lambda: bool(generation.live))
        for _ in range(200):
            connection.send(LIVE * 3000)
            await asyncio.sleep(0)
        await asyncio.sleep(0.3)
        assert connection.unsent > 10_000_000, "the server reads no more"


async def test_leaving_in_the_body_starts_nothing() -> None:
    generation = ScriptedGeneration()
    async with edge(generation) as server:
        connection = await server.connect()
        connection.send(post(COMPLETIONS)[:-5])
        await asyncio.sleep(0.1)
        connection.leave()
        await asyncio.sleep(0.2)
        assert generation.requests == []
        assert (await server.ask(LIVE)).status == 200


async def test_a_broken_chunk_ends_the_request() -> None:
    generation = ScriptedGeneration()
    async with edge(generation) as server:
        answer = await server.ask(
            b"POST /v1/completions HTTP/1.1\r\nhost: e\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\nzz\r\n"
        )
        assert (answer.status, answer.code) == (400, "invalid_http")
        assert generation.requests == []


# Bodies


async def test_a_body_that_is_too_large_is_413_and_the_client_reads_it() -> None:
    async with edge(options=EdgeOptions(max_body_bytes=1000)) as server:
        for headers in ([], ["expect: 100-continue"]):
            connection = await server.connect()
            connection.send(post(COMPLETIONS, b" " * 5_000_000, *headers))
            answer = await connection.answer()
            assert (answer.status, answer.code) == (413, "body_too_large")
            # To hang up on a client that is sending resets the connection; what it read last may be lost then.
            connection.send(LIVE)
            assert (await connection.answer()).status == 200


async def test_many_large_bodies_at_once_are_503() -> None:
    options = EdgeOptions(max_body_bytes=100_000, max_bodies_bytes=150_000)
    async with edge(options=options) as server:
        body = orjson.dumps(COMPLETION | {"prompt": "x" * 90_000})
        waiting = await server.connect()
        waiting.send(post(COMPLETIONS, body)[:-5])
        await asyncio.sleep(0.2)
        answer = await server.ask(post(COMPLETIONS, body))
        assert (answer.status, answer.code) == (503, "too_many_bodies")
        assert answer.headers["retry-after"] == "1"
        assert (await server.ask(post(COMPLETIONS))).status == 200, "small ones pass"
        waiting.send(body[-5:])
        assert (await waiting.answer()).status == 200
        assert (await server.ask(post(COMPLETIONS, body))).status == 200, "what was taken is given back"


@pytest.mark.parametrize("depth", [100, 1000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
async def test_deep_json_is_400(depth: int, opening: str, closing: str) -> None:
    inner = closing.join([opening * depth, ""]) if closing == "]" else opening * depth + "1"
    text = '{"model": "m", "messages": ' + inner + closing * depth + "}"
    async with in_memory(ScriptedGeneration()) as client:
        response = await client.post(CHAT, content=text.encode(), headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert error_of(response)["code"] in ("invalid_json", "invalid_field")


MILLION = 1_000_000


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x"}] * MILLION}),
        (CHAT, CONVERSATION | {f"k{number}": 1 for number in range(MILLION)}),
        (COMPLETIONS, COMPLETION | {"logit_bias": {str(number): "x" for number in range(MILLION)}}),
        (COMPLETIONS, COMPLETION | {"prompt": [[]] * MILLION}),
    ],
    ids=["messages", "fields", "biases", "prompts"],
)
async def test_a_million_of_anything_is_400_before_it_costs_much(route: str, fields: dict[str, Any]) -> None:
    body = orjson.dumps({"model": MODEL} | fields)
    async with in_memory(ScriptedGeneration()) as client:
        began = time.process_time()
        response = await client.post(route, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert error_of(response)["code"] == "invalid_json"
        assert time.process_time() - began < 10, "seconds; a minute if each were checked"


async def test_thousands_of_messages_are_no_attack() -> None:
    async with in_memory(ScriptedGeneration()) as client:
        messages = [{"role": "user", "content": "x"}] * 5000
        assert (await client.post(CHAT, json=CONVERSATION | {"messages": messages})).status_code == 200


async def test_brackets_and_colons_in_a_text_are_no_structure() -> None:
    async with in_memory(ScriptedGeneration()) as client:
        content = "[" * 1000 + "{" * 1000 + ":" * MAX_JSON_PARTS
        messages = [{"role": "user", "content": content}] * 40
        assert (await client.post(CHAT, json=CONVERSATION | {"messages": messages})).status_code == 200
