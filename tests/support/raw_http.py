"""HTTP as no client library would send it: bytes to a socket, and the answers that come back, if any."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import socket
import struct
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any, cast

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class RawResponse:
    """One answer. `headers` has lower-case names."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One TCP connection; see `connected`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, data: bytes) -> None:
        """Raises ConnectionError once the server has hung up."""
        self._writer.write(data)
        await self._writer.drain()

    async def send_slowly(self, pieces: Iterable[bytes], *, every: float) -> None:
        """Each piece in a packet of its own, `every` seconds."""
        for piece in pieces:
            await self.send(piece)
            await asyncio.sleep(every)

    def half_close(self) -> None:
        """Says that nothing more will be sent; the answer could still be read."""
        self._writer.write_eof()

    def reset(self) -> None:
        """Hangs up without the TCP courtesies: the server sees a connection reset."""
        sock = cast("socket.socket", self._writer.get_extra_info("socket"))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def received(self, *, quiet: float = 1.0, within: float = 20.0) -> bytes:
        """All bytes until the server hangs up, or says nothing for `quiet` seconds after it said something."""
        data = b""
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(within):
                while chunk := await asyncio.wait_for(self._reader.read(1 << 16), quiet if data else None):
                    data += chunk
        return data

    async def responses(self, *, quiet: float = 1.0, within: float = 20.0) -> list[RawResponse]:
        """What `received`, as whole answers. Raises ValueError for bytes that are none."""
        return parse_responses(await self.received(quiet=quiet, within=within))


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncGenerator[Connection]:
    """A connection to this machine's `port`, closed at the end."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def exchange(port: int, data: bytes) -> list[RawResponse]:
    """What one connection that sends `data` is answered."""
    async with connected(port) as connection:
        # The server may hang up on what it does not like before it has read all of it.
        with contextlib.suppress(ConnectionError):
            await connection.send(data)
        return await connection.responses()


def request(path: str, body: bytes, *headers: str, method: str = "POST", json_body: bool = True) -> bytes:
    """A request with the usual headers and these, which ends its connection."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {HOST}", "Connection: close"]
    lines += ["Content-Type: application/json"] if json_body else []
    lines += [*headers, f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def parse_responses(data: bytes) -> list[RawResponse]:
    """Raises ValueError for what is no whole number of answers."""
    stream = _Stream(data)
    found: list[RawResponse] = []
    while stream.tell() < len(data):
        response = http.client.HTTPResponse(cast("socket.socket", stream))
        try:
            response.begin()
            body = response.read()
        except (http.client.HTTPException, OSError) as error:
            raise ValueError(f"not an answer ({error!r}): {data[:500]!r}") from error
        found.append(RawResponse(response.status, {k.lower(): v for k, v in response.getheaders()}, body))
    return found


class _Stream(io.BytesIO):
    def makefile(self, _mode: str) -> _Stream:
        return self

    def close(self) -> None:
        """HTTPResponse closes it after each answer; the next one follows."""
