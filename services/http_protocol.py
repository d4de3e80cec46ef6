"""What may one HTTP connection cost? uvicorn's protocol with limits: header size and time, slow and idle clients.

uvicorn parses with h11 or httptools, whichever is installed. This is h11's, always: httptools has no limit on headers.
"""

from __future__ import annotations

import asyncio
import http
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

MAX_HEADERS = 128
# How long a client may still send what nobody reads any more. To close at once would reset the connection, and with it
# the answer that says why.
LINGER_SECONDS = 2.0
_RETRY_SECONDS = 1
# Of a connection's age, so that connections that were opened together don't all come back together.
_AGE_JITTER = 0.1
_CLOSE = (b"connection", b"close")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Times are in seconds."""

    max_connections: int = 8192
    """More are answered 503 and closed."""

    max_header_bytes: int = 32 * 1024
    """Of the request line and all headers; then 431."""

    header_timeout: float = 10.0
    """From the connection, or a request's first byte, until its headers are complete; then 408. TLS handshakes, too."""

    write_timeout: float = 60.0
    """How long a client may take nothing of what was sent; then the connection is reset."""

    keep_alive_timeout: float = 75.0
    """How long a connection may be idle between two requests."""

    max_age: float = 0.0
    """After so long, a tenth more or less by chance, the next answer that begins is the connection's last; 0: never."""


Wait = Literal["headers", "rest of a body"]


class LimitedProtocol(H11Protocol):
    """One connection.

    A client that closes its side, even if only that for writing, is gone: nothing tells the two apart before something
    is written, and until then an engine would work for nobody.
    """

    def __init__(
        self, limits: ConnectionLimits, config: Config, server_state: ServerState, app_state: dict[str, Any]
    ) -> None:
        super().__init__(config, server_state, app_state, asyncio.get_running_loop())
        self.conn: _LimitedParser = _LimitedParser(limits.max_header_bytes)
        self._limits = limits
        self._refused = False
        self._waiting_for: Wait | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._aging: asyncio.TimerHandle | None = None
        self._is_old = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Refuses it when there are too many."""
        # No isinstance: uvloop's is none of asyncio's classes.
        transport = cast("asyncio.Transport", transport)
        super().connection_made(transport)
        if len(self.connections) > 2 * self._limits.max_connections:
            transport.abort()
        elif len(self.connections) > self._limits.max_connections:
            self._refuse(503, "too_many_connections", "too many connections", {"retry-after": str(_RETRY_SECONDS)})
        else:
            self._wait_for("headers")
            if age := self._limits.max_age:
                spread = random.uniform(1 - _AGE_JITTER, 1 + _AGE_JITTER)
                self._aging = self.loop.call_later(age * spread, self._grow_old)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, whoever wanted it."""
        self._wait_for(None)
        if self._aging is not None:
            self._aging.cancel()
        # uvicorn leaves it armed after an error.
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Hands what has come to the application."""
        super().handle_events()
        self._close_after_this_answer()

    def data_received(self, data: bytes) -> None:
        """Reads on, or throws away what comes after a refusal."""
        if self._refused:
            return
        super().data_received(data)
        self._wait_for_what_is_missing()

    def on_response_complete(self) -> None:
        """The next request, if it has come already."""
        super().on_response_complete()
        self._wait_for_what_is_missing()

    def send_400_response(self, msg: str) -> None:
        """Answers what can't be parsed."""
        status = self.conn.refused_with or 400
        if status == 431:
            limit = self._limits.max_header_bytes
            self._refuse(status, "headers_too_large", f"more than {limit} bytes or {MAX_HEADERS} of headers")
        else:
            self._refuse(status, "invalid_http", "this is no valid HTTP/1.1 request")

    def shutdown(self) -> None:
        """The server stops."""
        if self._refused:
            self.transport.close()
        else:
            super().shutdown()

    @property
    def _cycle(self) -> RequestResponseCycle | None:
        # Before the first request it is None; its type says otherwise.
        return self.cycle

    def _wait_for_what_is_missing(self) -> None:
        if self._refused or self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:
            begun = self._cycle is None or bool(self.conn.trailing_data[0])
            self._wait_for("headers" if begun else None)
        elif self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete:
            self._wait_for("rest of a body")
        else:
            self._wait_for(None)
            self._stay_aware_of_the_client()

    def _stay_aware_of_the_client(self) -> None:
        """uvicorn stops reading when the next request comes early, and would then not see the client leave."""
        whole = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        if whole and self.flow.read_paused and len(self.conn.trailing_data[0]) <= self._limits.max_header_bytes:
            self.flow.resume_reading()

    def _wait_for(self, what: Wait | None) -> None:
        if what == self._waiting_for:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._waiting_for = what
        if what == "headers":
            self._timer = self.loop.call_later(self._limits.header_timeout, self._headers_are_late)
        elif what is not None:
            self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _grow_old(self) -> None:
        # Idle connections stay: to close one may cross a request that is on its way.
        self._is_old = True
        self._close_after_this_answer()

    def _close_after_this_answer(self) -> None:
        """Of an old connection; an answer that has begun is not the one, because its headers are gone."""
        cycle = self._cycle
        if self._is_old and cycle is not None and not cycle.response_started and _CLOSE not in cycle.default_headers:
            # A list of its own: uvicorn's is shared by all connections.
            cycle.default_headers = [*cycle.default_headers, _CLOSE]

    def _headers_are_late(self) -> None:
        if self.conn.trailing_data[0]:
            seconds = self._limits.header_timeout
            self._refuse(408, "header_timeout", f"the request's headers did not arrive within {seconds:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        """Answers in place of the application, and closes."""
        self._refused = True
        self._wait_for(None)
        self._unset_keepalive_if_required()
        cycle = self._cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.close()
                return
        self.transport.write(_answer(status, code, message, headers or {}))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.abort)


class _LimitedParser(h11.Connection):
    """A server's parser that knows why it refused something."""

    def __init__(self, max_header_bytes: int) -> None:
        super().__init__(h11.SERVER, max_header_bytes)
        self._max_header_bytes = max_header_bytes
        self.refused_with = 0

    def next_event(self) -> Any:
        """As h11's. Raises RemoteProtocolError for large headers, also when they came in one piece."""
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._check(event)
        except h11.RemoteProtocolError as error:
            self.refused_with = error.error_status_hint
            raise
        return event

    def _check(self, request: h11.Request) -> None:
        if request.http_version not in (b"1.0", b"1.1"):
            raise h11.RemoteProtocolError("another version of HTTP", error_status_hint=505)
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in request.headers}:
            # Allowed, but whoever stands before us may have read it the other way: the rest would be a smuggled request
            # (RFC 9112, 6.1).
            raise h11.RemoteProtocolError("two lengths of one body", error_status_hint=400)
        size = len(request.method) + len(request.target)
        size += sum(len(name) + len(value) + 4 for name, value in request.headers)
        if size > self._max_header_bytes or len(request.headers) > MAX_HEADERS:
            raise h11.RemoteProtocolError("headers too large", error_status_hint=431)


def _answer(status: int, code: str, message: str, headers: Mapping[str, str]) -> bytes:
    """In the error shape of OpenAI's API."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
    lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", "connection: close"]
    lines += ["content-type: application/json", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()
