"""Spans of requests, and the W3C context by which they belong to one trace in every process.

Only OpenTelemetry's API is imported. Without --enable-otel its no-op spans hand on the context that came, so that a
trace goes on behind processes that export nothing.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import ParamSpec, TypeVar

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kvbaton.errors import Reason, RequestError, cancelled, invalid
from services.version import own_version

_P = ParamSpec("_P")
_T = TypeVar("_T")

TRACE_HEADERS = ("traceparent", "tracestate")
# What W3C asks everybody to hand on of a tracestate; a traceparent has 55.
MAX_TRACE_HEADER_CHARS = 512
# Seconds that the end of a process waits for a receiver of spans.
FLUSH_TIMEOUT = 5.0

NO_HEADERS: Mapping[str, str] = MappingProxyType({})
# The parent of what is nobody's request: probes, proofs of pairs. Samplers that heed parents record nothing under it.
UNSAMPLED = NonRecordingSpan(SpanContext(trace_id=1, span_id=1, is_remote=True))

_PROPAGATOR = TraceContextTextMapPropagator()
_tracer: trace.Tracer = trace.NoOpTracer()


def configure_tracing(*, enabled: bool, service: str) -> Callable[[], None]:
    """Begins to export spans, if `enabled`; `service` names the process where no OTEL_* variable does.

    Returns what flushes them, for the end of the process. Raises ValueError for variables that can't be followed.
    """
    global _tracer
    if not enabled:
        return lambda: None
    # Imported late: who exports nothing must not pay for the SDK.
    from services.telemetry.otlp import tracer_provider

    # Not the global provider of the process: SGLang sets that one, and libraries trace under it what they like.
    provider = tracer_provider(service)
    _tracer = provider.get_tracer("kvbaton", own_version())
    return lambda: _shut_down(provider)


def _shut_down(provider: object) -> None:
    """SGLang's provider too, if there is one: its own exit handler would wait 30 s for a receiver that is gone."""
    ends = time.monotonic() + FLUSH_TIMEOUT
    flushing: list[threading.Thread] = []
    for each in (provider, trace.get_tracer_provider()):
        if (shutdown := getattr(each, "shutdown", None)) is not None:
            flushing.append(threading.Thread(target=shutdown, name="flush spans", daemon=True))
            flushing[-1].start()
    for thread in flushing:
        thread.join(max(0.0, ends - time.monotonic()))


def server_span(name: str, headers: Mapping[str, str]) -> Span:
    """Begins what this process does for the one that sent `headers`. Whoever begins a span ends it."""
    parent = _PROPAGATOR.extract(headers) if headers else otel_context.Context()
    return _tracer.start_span(name, parent, SpanKind.SERVER)


def client_span(name: str, parent: Span) -> Span:
    """Begins what other processes are asked for on behalf of `parent`."""
    return _tracer.start_span(name, trace.set_span_in_context(parent, otel_context.Context()), SpanKind.CLIENT)


def headers_of(span: Span) -> dict[str, str]:
    """What makes another process's spans children of this one. Empty for a span outside every trace."""
    headers: dict[str, str] = {}
    if span.get_span_context().is_valid:
        _PROPAGATOR.inject(headers, trace.set_span_in_context(span, otel_context.Context()))
    return headers


def pick_headers(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    """The trace headers among gRPC metadata or HTTP headers; what is too long is dropped, as W3C has it."""
    found: dict[str, str] = {}
    for name, value in metadata:
        if name in TRACE_HEADERS and isinstance(value, str):
            found[name] = f"{found[name]},{value}" if name in found else value
    return {name: value for name, value in found.items() if len(value) <= MAX_TRACE_HEADER_CHARS}


def check_headers(headers: Mapping[str, str], field: str) -> dict[str, str]:
    """Trace headers in a message of ours. Raises RequestError naming what is not one, or too long."""
    for name, value in headers.items():
        if name not in TRACE_HEADERS:
            raise invalid(field, f"{name!r} is not one of {', '.join(TRACE_HEADERS)}")
        if len(value) > MAX_TRACE_HEADER_CHARS:
            raise invalid(field, f"{name} has {len(value)} characters, more than {MAX_TRACE_HEADER_CHARS}")
    return dict(headers)


def as_request_error(error: BaseException) -> RequestError:
    """What ended something, for `set_outcome`: a caller that left has cancelled, and what isn't typed is internal."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return cancelled()
    return RequestError(grpc.StatusCode.INTERNAL, Reason.INTERNAL, type(error).__name__)


def set_outcome(span: Span, error: RequestError | None) -> None:
    """Finished, or how not. Cancelling is the caller's right and no error."""
    if not span.is_recording():
        return
    if error is None:
        span.set_attribute("kvbaton.outcome", "finished")
        return
    span.set_attribute("kvbaton.outcome", error.code.name)
    if error.code is not grpc.StatusCode.CANCELLED:
        span.set_attribute("error.type", error.reason)
        span.set_status(Status(StatusCode.ERROR, str(error)))


def context_under(span: Span) -> contextvars.Context | None:
    """For a task whose log lines are to carry the ids of `span`; None, the running context, if it isn't recorded."""
    if not span.is_recording():
        return None
    context = contextvars.copy_context()
    context.run(otel_context.attach, trace.set_span_in_context(span))
    return context


def call_under(span: Span, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Calls `function` so that the tasks that it starts log with the ids of `span`."""
    context = context_under(span)
    return function(*args, **kwargs) if context is None else context.run(function, *args, **kwargs)
