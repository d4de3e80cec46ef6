"""The gate in front of the HTTP edge: every route but the open ones needs a key, before its body is read."""

from __future__ import annotations

from contextlib import ExitStack

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvbaton.errors import Reason, RequestError
from services.frontend.access.gate import Caller, Gate, RateState
from services.frontend.edge.errors import error_response

OPEN_PATHS = frozenset({"/health", "/live", "/metrics", "/openapi.json"})
"""What probes, scrapers and generators of clients ask for. Every other path needs a key, also one that is no route."""

_UNCOUNTED_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class HttpGate:
    """ASGI middleware. What it lets through counts as running until its answer has ended."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        caller: Caller | None = None
        with ExitStack() as request:
            try:
                caller = self._gate.identify(_authorization(scope))
                request.enter_context(self._gate.admit(caller, counted=scope["method"] not in _UNCOUNTED_METHODS))
            except RequestError as error:
                headers = self._rate_headers(caller) | _challenge(error)
                await error_response(error, headers)(scope, receive, send)
                return
            await self._app(scope, receive, _with_headers(send, self._rate_headers(caller)))

    def _rate_headers(self, caller: Caller | None) -> dict[str, str]:
        state = None if caller is None else self._gate.rate_of(caller)
        return {} if state is None else rate_headers(state)


def rate_headers(state: RateState) -> dict[str, str]:
    """As OpenAI sends them."""
    return {
        "x-ratelimit-limit-requests": str(state.limit),
        "x-ratelimit-remaining-requests": str(state.remaining),
        "x-ratelimit-reset-requests": duration(state.reset),
    }


def duration(seconds: float) -> str:
    """As OpenAI writes one: 17ms, 1.5s, 6m0s."""
    milliseconds = round(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    shown = f"{milliseconds / 1000:g}s"
    return f"{minutes}m{shown}" if minutes else shown


def _challenge(error: RequestError) -> dict[str, str]:
    """RFC 6750, 3: no error code for a request that has no key at all."""
    if error.reason is Reason.API_KEY_MISSING:
        return {"www-authenticate": 'Bearer realm="kvbaton"'}
    if error.reason is Reason.INVALID_API_KEY:
        return {"www-authenticate": 'Bearer realm="kvbaton", error="invalid_token"'}
    return {}


def _authorization(scope: Scope) -> bytes | None:
    """The header's value; one that nobody's key can be when there are several."""
    values: list[bytes] = [value for name, value in scope["headers"] if name == b"authorization"]
    return b", ".join(values) if values else None


def _with_headers(send: Send, extra: dict[str, str]) -> Send:
    if not extra:
        return send

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message.get("headers", [])))
            headers.update(extra)
            message = {**message, "headers": headers.raw}
        await send(message)

    return sending
