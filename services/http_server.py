"""Runs an ASGI application inside an event loop that is already running, without touching the process's signals."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator
from types import TracebackType
from typing import Any, Self

import uvicorn

from services.transport import PortTakenError, join_host_port


class _EmbeddedServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        # The process that hosts us owns SIGTERM and SIGINT: it drains first, then stops this server.
        yield


class HttpServer:
    """One listening HTTP server; use it as an async context manager.

    Binding happens on entry, so that a taken port is an error of its own (PortTakenError names `flag`).
    """

    def __init__(self, app: Any, *, host: str, port: int, flag: str, stop_grace_seconds: float = 5.0) -> None:
        self._host, self._port, self._flag = host, port, flag
        self._server = _EmbeddedServer(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=int(stop_grace_seconds),
                server_header=False,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The bound port."""
        return self._port

    async def __aenter__(self) -> Self:
        listener = _listen(self._host, self._port, self._flag)
        self._port = listener.getsockname()[1]
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="http-server")
        while not self._server.started:
            if self._serving.done():
                await self._serving
                raise RuntimeError("the HTTP server ended while it was starting")
            await asyncio.sleep(0.01)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving


def _listen(host: str, port: int, flag: str) -> socket.socket:
    bare = host.strip("[]")
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((bare, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        address = join_host_port(host, port)
        raise PortTakenError(f"can't listen on {address} ({error.strerror}): choose another with {flag}") from error
    listener.setblocking(False)
    return listener
