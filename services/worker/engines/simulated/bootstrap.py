"""Prefill's bootstrap server, and how decode asks it: GET /health and GET /route, the table of its data sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_HEAD_LIMIT = 8192
_REQUEST = "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True, slots=True)
class PrefillTable:
    """What decode keeps of a prefill: who it is, and host and port of every dp rank's data socket."""

    incarnation: bytes
    page_size: int
    ranks: tuple[tuple[str, int], ...]

    def to_json(self) -> bytes:
        """For the wire."""
        ranks = [{"host": host, "port": port} for host, port in self.ranks]
        return json.dumps({"incarnation": self.incarnation.hex(), "page_size": self.page_size, "ranks": ranks}).encode()

    @classmethod
    def from_json(cls, text: bytes) -> PrefillTable:
        """The opposite. Raises ValueError."""
        try:
            values: dict[str, Any] = json.loads(text)
            ranks = tuple((str(rank["host"]), int(rank["port"])) for rank in values["ranks"])
            return cls(bytes.fromhex(values["incarnation"]), int(values["page_size"]), ranks)
        except (KeyError, TypeError) as error:
            raise ValueError(f"no table: {error!r}") from error


class BootstrapServer:
    """Lives in the host's event loop, so a frozen scheduler doesn't silence it; `silent` does."""

    def __init__(self, listener: socket.socket, silent: Callable[[], bool], delay: Callable[[], float]) -> None:
        """`silent` leaves every question without an answer; /route answers `delay` seconds late."""
        self._listener = listener
        self._silent = silent
        self._delay = delay
        self._table = b""
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[Any]] = set()

    async def start(self, table: PrefillTable) -> None:
        """Begins to answer."""
        self._table = table.to_json()
        self._server = await asyncio.start_server(self._answer, sock=self._listener, limit=_HEAD_LIMIT)

    def close(self) -> None:
        """Stops, open questions included. In the loop."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            async with asyncio.timeout(30.0):
                head = await reader.readuntil(b"\r\n\r\n")
                while self._silent():  # noqa: ASYNC110 - a fault that anyone may switch, at any time
                    await asyncio.sleep(0.05)
                status, body = await self._respond(head.split(b" ", 2)[1])
                length = f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                writer.write(f"HTTP/1.1 {status}\r\n{length}".encode() + body)
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # whoever asked is gone, or we are
        finally:
            self._connections.discard(task)
            writer.close()

    async def _respond(self, path: bytes) -> tuple[str, bytes]:
        if path == b"/health":
            return "200 OK", b"OK"
        if path == b"/route":
            await asyncio.sleep(self._delay())
            return "200 OK", self._table
        return "404 Not Found", b""


async def fetch_table(address: tuple[str, int], *, timeout: float) -> PrefillTable:
    """Prefill's table. Raises OSError, TimeoutError, ValueError."""
    return PrefillTable.from_json(await _get(address, "/route", timeout))


async def is_healthy(address: tuple[str, int], *, timeout: float) -> bool:
    """Whether /health answers 200 within `timeout` seconds."""
    try:
        await _get(address, "/health", timeout)
    except (OSError, TimeoutError, ValueError):
        return False
    return True


async def _get(address: tuple[str, int], path: str, timeout: float) -> bytes:
    host, port = address
    async with asyncio.timeout(timeout):
        reader, writer = await asyncio.open_connection(host.strip("[]"), port)
        try:
            writer.write(_REQUEST.format(path=path, address=f"{host}:{port}").encode())
            answer = await reader.read()
        finally:
            writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b"\r\n", 1)[0].decode("latin-1")
    if " 200 " not in f"{status} ":
        raise ValueError(f"{path} answers {status!r}")
    return body


def listen(host: str, port: int, what: str) -> socket.socket:
    """A bound, listening socket. Raises RuntimeError naming `what` when the port is taken."""
    bare = host.strip("[]")
    listener = socket.socket(socket.AF_INET6 if ":" in bare else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((bare, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise RuntimeError(f"{what}: can't listen on {host}:{port} ({error.strerror})") from error
    listener.setblocking(False)
    return listener
