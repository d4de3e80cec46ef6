"""Runs an ASGI application inside an event loop that is already running, without touching the process's signals."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Generator
from types import TracebackType
from typing import Any, Self

import uvicorn

from services.transport import PortTakenError, TlsConfig, join_host_port


class _EmbeddedServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        # The process that hosts us owns SIGTERM and SIGINT: it drains first, then stops this server.
        yield


class HttpServer:
    """One listening HTTP server, HTTPS with `tls`; use it as an async context manager.

    Binding happens on entry, so that a taken port is an error of its own (PortTakenError names `flag`). Creating it
    raises ValueError for a `tls` that no server can use.
    """

    def __init__(
        self,
        app: Any,
        *,
        host: str,
        port: int,
        flag: str,
        tls: TlsConfig | None = None,
        stop_grace_seconds: float = 5.0,
    ) -> None:
        self._host, self._port, self._flag = host, port, flag
        self._server = _EmbeddedServer(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=int(stop_grace_seconds),
                server_header=False,
                **_tls_options(tls),
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


def _tls_options(tls: TlsConfig | None) -> dict[str, Any]:
    if tls is None:
        return {}
    cert, key = tls.server_files()
    return {
        "ssl_certfile": cert,
        "ssl_keyfile": key,
        "ssl_ca_certs": tls.ca,
        "ssl_cert_reqs": ssl.CERT_REQUIRED if tls.require_client_cert else ssl.CERT_NONE,
    }


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
