"""Runs an ASGI application inside an event loop that is already running, without touching the process's signals."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
from collections.abc import Generator
from types import TracebackType
from typing import Any, Self

import structlog
import uvicorn

from services.http_protocol import ConnectionLimits, LimitedProtocol
from services.transport import TlsConfig, bound_socket

log = structlog.get_logger()

_BACKLOG = 2048


class _EmbeddedServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, limits: ConnectionLimits) -> None:
        super().__init__(config)
        self._limits = limits

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        # The process that hosts us owns SIGTERM and SIGINT: it drains first, then stops this server.
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # In place of uvicorn's, which has no way to give its protocol arguments, nor a handshake a deadline.
        tls = self.config.ssl
        handshake = None if tls is None else self._limits.header_timeout
        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(
                self._protocol, sock=each, ssl=tls, backlog=_BACKLOG, ssl_handshake_timeout=handshake
            )
            for each in sockets or ()
        ]
        self.started = True

    def _protocol(self) -> LimitedProtocol:
        return LimitedProtocol(self._limits, self.config, self.server_state, app_state={})


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
        limits: ConnectionLimits | None = None,
        stop_grace_seconds: float = 5.0,
        reuse_port: bool = False,
    ) -> None:
        """With `reuse_port` other processes of this user that say the same may listen there, too."""
        limits = limits or ConnectionLimits()
        self._host, self._port, self._flag = host, port, flag
        self._reuse_port = reuse_port
        self._limits = limits
        config = uvicorn.Config(
            app,
            http=LimitedProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            # Its type says int; it is the delay of a timer.
            timeout_keep_alive=limits.keep_alive_timeout,  # pyright: ignore[reportArgumentType]
            timeout_graceful_shutdown=int(stop_grace_seconds),
            server_header=False,
            **_tls_options(tls),
        )
        self._server = _EmbeddedServer(config, limits)
        self._serving: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The bound port."""
        return self._port

    async def __aenter__(self) -> Self:
        listener = bound_socket(self._host, self._port, flag=self._flag, reuse_port=self._reuse_port, backlog=_BACKLOG)
        listener.setblocking(False)
        _drop_dead_clients(listener, self._limits.write_timeout)
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


def allow_open_files(count: int) -> None:
    """Raises the process's own limit on open files, which is often 1024, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if hard != resource.RLIM_INFINITY and hard < count:
        log.warning("the system allows fewer open files than connections", allowed=hard, needed=count)


def _drop_dead_clients(listener: socket.socket, write_timeout: float) -> None:
    """The kernel resets connections whose client takes nothing, or has vanished. Accepted sockets inherit it.

    uvicorn can't: once an answer is in the socket's buffers it waits for them without end.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    seconds = max(1, int(write_timeout / 4))
    for name, value in (
        ("TCP_USER_TIMEOUT", int(write_timeout * 1000)),
        ("TCP_KEEPIDLE", seconds),
        ("TCP_KEEPINTVL", seconds),
        ("TCP_KEEPCNT", 3),
    ):
        # Linux has all of them.
        if (option := getattr(socket, name, None)) is not None:
            listener.setsockopt(socket.IPPROTO_TCP, option, value)


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
