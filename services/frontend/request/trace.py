"""What a trace tells of a request: one span from its receipt to its end, and one below it for each attempt."""

from __future__ import annotations

import contextvars
from collections.abc import Mapping

from opentelemetry.trace import Span

from services.frontend.request.answer import Answer
from services.telemetry import tracing


class RequestTrace:
    """Begins with the request; ends with `refused` or `ended`. `trace_headers` are the client's."""

    def __init__(self, trace_headers: Mapping[str, str]) -> None:
        self._span = tracing.server_span("kvbaton.request", trace_headers)

    def task_context(self) -> contextvars.Context | None:
        """For the task that owns the request: its log lines carry the span's ids."""
        return tracing.context_under(self._span)

    def attempt(self, number: int) -> Span:
        """Begins the span of the attempt of this number, from 1; the attempt ends it."""
        span = tracing.client_span("kvbaton.attempt", self._span)
        if span.is_recording():
            span.set_attribute("kvbaton.attempt", number)
        return span

    def refused(self, request_id: str, model: str, error: BaseException) -> None:
        """The request never had an owner: it was refused, or its caller left before it was prepared."""
        if not self._span.is_recording():
            return
        self._name(request_id, model)
        tracing.set_outcome(self._span, tracing.as_request_error(error))
        self._span.end()

    def ended(self, request_id: str, model: str, answer: Answer, phases: Mapping[str, float | None]) -> None:
        """Every leg is gone. `phases` are seconds."""
        span = self._span
        if not span.is_recording():
            return
        self._name(request_id, model)
        span.set_attribute("gen_ai.usage.input_tokens", answer.prompt_tokens)
        span.set_attribute("gen_ai.usage.output_tokens", answer.completion_tokens)
        for phase, seconds in phases.items():
            if seconds is not None:
                span.set_attribute(f"kvbaton.{phase}_s", seconds)
        if (finished := answer.complete) is not None:
            span.set_attribute("gen_ai.response.finish_reasons", [finished.reason])
            span.set_attribute("kvbaton.prefill.worker", finished.prefill_worker)
            span.set_attribute("kvbaton.decode.worker", finished.decode_worker)
        tracing.set_outcome(span, answer.error)
        span.end()

    def _name(self, request_id: str, model: str) -> None:
        self._span.set_attribute("kvbaton.request_id", request_id)
        self._span.set_attribute("gen_ai.request.model", model)
