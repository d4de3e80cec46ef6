"""structlog set-up: events with names and fields, to stderr, as console lines or JSON."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

import structlog
from opentelemetry import trace


def configure_logging(*, level: str, format: str, service: str, **names: object) -> None:
    """Configures structlog for this process.

    `service` and what else `names` it stand in every event, the ids of a recorded span in its own.
    """
    numeric = logging.getLevelNamesMapping()[level.upper()]
    renderer: structlog.typing.Processor
    if format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _name_process({"service": service, **names}),
            _add_trace,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=max(numeric, logging.WARNING), stream=sys.stderr, force=True)


def _add_trace(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    span = trace.get_current_span()
    if span.is_recording():
        ids = span.get_span_context()
        event["trace_id"] = trace.format_trace_id(ids.trace_id)
        event["span_id"] = trace.format_span_id(ids.span_id)
    return event


def _name_process(names: Mapping[str, object]) -> structlog.typing.Processor:
    """No context variables: every thread of the process logs under these names."""

    def add(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {**names, **event}

    return add
