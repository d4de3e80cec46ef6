"""May this request go on? Whose key it has, and whether that key's limits leave room; one gate for HTTP and gRPC."""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import grpc
import structlog

from kvbaton.errors import Reason, RequestError
from services.frontend.access.keys import ApiKey, digest_of
from services.frontend.access.rates import RequestRate
from services.frontend.access.usage import Usage, own_usage
from services.telemetry import metrics

log = structlog.get_logger()

_BEARER = re.compile(rb"bearer +([\x21-\x7e]+) *", re.IGNORECASE)
# A guess: how soon one of the key's answers may have ended.
_CONCURRENCY_RETRY_SECONDS = 1.0


class Caller:
    """The owner of one key, and what it uses right now."""

    def __init__(self, key: ApiKey, usage: Usage) -> None:
        self.key = key
        self.usage = usage
        self.rate: RequestRate | None = None
        self.now_has(key)

    def now_has(self, key: ApiKey) -> None:
        """The file was read again. What was used so far counts on."""
        self.key = key
        if key.requests_per_minute is None:
            self.rate = None
        elif self.rate is None:
            self.rate = RequestRate(key.requests_per_minute, self.usage.full_at)
        else:
            self.rate.per_minute = key.requests_per_minute

    @property
    def name(self) -> str:
        """Of the key, for logs and metrics."""
        return self.key.name

    @property
    def running(self) -> int:
        """Requests, of all processes of the frontend."""
        return self.usage.running

    def may_use(self, model: str) -> bool:
        """Whether the key's list has the model."""
        return self.key.models is None or model in self.key.models


@dataclass(frozen=True, slots=True)
class RateState:
    """What a key's rate leaves, for the headers of an answer. `reset` in seconds until all of it is there again."""

    limit: int
    remaining: int
    reset: float


@dataclass(frozen=True, slots=True)
class Admission:
    """One request that went through the gate. `at_end` is closed when its answer has ended."""

    caller: Caller
    at_end: ExitStack


_ADMISSION: ContextVar[Admission | None] = ContextVar("kvbaton_admission", default=None)


def current_admission() -> Admission | None:
    """The request that this is about; None where no key was asked for."""
    return _ADMISSION.get()


class Gate:
    """The keys in force. Memory is bounded by their number, not by that of clients."""

    def __init__(
        self,
        keys: Iterable[ApiKey],
        *,
        clock: Callable[[], float] = time.monotonic,
        usage: Callable[[str], Usage] = own_usage,
    ) -> None:
        """`usage` says where a key of that name is counted."""
        self._clock = clock
        self._usage = usage
        self._callers: dict[str, Caller] = {}
        self.replace(keys)

    def replace(self, keys: Iterable[ApiKey]) -> None:
        """From now on these. A name that stays keeps what it has used; requests of one that goes may end."""
        before, callers = self._callers, dict[str, Caller]()
        for key in keys:
            caller = before.get(key.name) or Caller(key, self._usage(key.name))
            caller.now_has(key)
            callers[key.name] = caller
        self._callers = callers

    def identify(self, authorization: bytes | None) -> Caller:
        """Whose key the header holds. Raises RequestError, UNAUTHENTICATED."""
        if authorization is None:
            raise _refused("", Reason.API_KEY_MISSING, "no API key: send the header 'authorization: Bearer KEY'")
        match = _BEARER.fullmatch(authorization)
        found = None if match is None else self._owner(digest_of(match[1]))
        if found is None:
            raise _refused("", Reason.INVALID_API_KEY, "the API key is not valid")
        return found

    @contextmanager
    def admit(self, caller: Caller, *, counted: bool = True) -> Generator[None]:
        """Around one request of the caller, until its answer has ended.

        `counted`: it counts towards the key's limits, as one whatever it asks for; what merely lists or aborts doesn't.
        Raises RequestError, RESOURCE_EXHAUSTED, and then counts nothing.
        """
        if counted:
            self._require_room(caller)
            caller.usage.add(1)
        try:
            with ExitStack() as at_end, structlog.contextvars.bound_contextvars(key_name=caller.name):
                token = _ADMISSION.set(Admission(caller, at_end))
                at_end.callback(_ADMISSION.reset, token)
                yield
        finally:
            if counted:
                caller.usage.add(-1)

    def rate_of(self, caller: Caller) -> RateState | None:
        """None for a key without a rate."""
        if caller.rate is None:
            return None
        now = self._clock()
        return RateState(caller.rate.per_minute, caller.rate.remaining(now), caller.rate.seconds_to_full(now))

    def _owner(self, digest: bytes) -> Caller | None:
        found = None
        # All of them, so that the time says nothing about where in the file a key stands.
        for caller in self._callers.values():
            if hmac.compare_digest(caller.key.digest, digest):
                found = caller
        return found

    def _require_room(self, caller: Caller) -> None:
        limit = caller.key.concurrent_requests
        if limit is not None and caller.running >= limit:
            raise _refused(
                caller.name,
                Reason.CONCURRENCY_LIMIT_EXCEEDED,
                f"{limit} requests of this API key are running, as many as it may have",
                _CONCURRENCY_RETRY_SECONDS,
            )
        if caller.rate is not None and (wait := caller.rate.take(self._clock())):
            raise _refused(
                caller.name,
                Reason.RATE_LIMIT_EXCEEDED,
                f"this API key may send {caller.rate.per_minute} requests a minute",
                wait,
            )


def require_model(model: str, served: Iterable[str]) -> None:
    """Raises RequestError, PERMISSION_DENIED, when the current caller may not use the model.

    An empty name stands for the only one that is `served`, so all of them must be the caller's; UNAVAILABLE while there
    is none.
    """
    admission = _ADMISSION.get()
    if admission is None or admission.caller.key.models is None:
        return
    caller = admission.caller
    meant = {model} if model else set(served)
    if not meant:
        raise RequestError(
            grpc.StatusCode.UNAVAILABLE, Reason.NO_WORKER, "model: missing, and no worker serves one", retry_after=1.0
        )
    if all(map(caller.may_use, meant)):
        return
    message = f"this API key may not use {model!r}" if model else "missing: this API key may not use every model"
    error = _refused(caller.name, Reason.MODEL_NOT_ALLOWED, f"model: {message}")
    error.field = "model"
    raise error


_CODES = {
    Reason.API_KEY_MISSING: grpc.StatusCode.UNAUTHENTICATED,
    Reason.INVALID_API_KEY: grpc.StatusCode.UNAUTHENTICATED,
    Reason.MODEL_NOT_ALLOWED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.RATE_LIMIT_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.CONCURRENCY_LIMIT_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def _refused(name: str, reason: Reason, message: str, retry_after: float | None = None) -> RequestError:
    """The refusal, counted. `name` is empty for a key that is not ours."""
    metrics.ACCESS_REFUSALS.labels(name, reason.value).inc()
    log.debug("access refused", key_name=name, reason=reason.value)
    return RequestError(_CODES[reason], reason, message, retry_after=retry_after)
