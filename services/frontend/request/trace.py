"""What a trace tells of a request: one span from its receipt to its end, and one below it for each attempt."""

from __future__ import annotations

import contextvars
from collections.abc import Mapping

from opentelemetry.trace import Span

from services.frontend.request.report import Report
from services.telemetry import tracing


class RequestTrace:
    """Begins with the request; ends with `refused` or `ended`. `trace_headers` are the client's."""

    def __init__(self, trace_headers: Mapping[str, str]) -> None:
        self._span = tracing.server_span("kvbaton.request", trace_headers)

    def task_context(self) -> contextvars.Context | None:
        """For the task that owns the request: its log lines carry the span's ids."""
        return tracing.context_under(self._span)

    def attempt(self, number: int, choice: int) -> Span:
        """Begins the span of the attempt of this number, from 1, at this choice, from 0; the attempt ends it."""
        span = tracing.client_span("kvbaton.attempt", self._span)
        if span.is_recording():
            span.set_attribute("kvbaton.attempt", number)
            if choice:
                span.set_attribute("kvbaton.choice", choice)
        return span

    def refused(self, request_id: str, model: str, error: BaseException) -> None:
        """The request never had an owner: it was refused, or its caller left before it was prepared."""
        if not self._span.is_recording():
            return
        self._name(request_id, model)
        tracing.set_outcome(self._span, tracing.as_request_error(error))
        self._span.end()

    def ended(self, report: Report) -> None:
        """Every leg is gone."""
        span = self._span
        if not span.is_recording():
            return
        self._name(report.request_id, report.model)
        span.set_attribute("gen_ai.usage.input_tokens", report.prompt_tokens)
        span.set_attribute("gen_ai.usage.output_tokens", report.completion_tokens)
        if len(report.answers) > 1:
            span.set_attribute("gen_ai.request.choice.count", len(report.answers))
        for phase, seconds in report.phases.items():
            span.set_attribute(f"kvbaton.{phase}_s", seconds)
        if complete := [answer.complete for answer in report.answers if answer.complete is not None]:
            span.set_attribute("gen_ai.response.finish_reasons", [finished.reason for finished in complete])
            span.set_attribute("kvbaton.prefill.worker", complete[0].prefill_worker)
            span.set_attribute("kvbaton.decode.worker", complete[0].decode_worker)
        tracing.set_outcome(span, report.error)
        span.end()

    def _name(self, request_id: str, model: str) -> None:
        self._span.set_attribute("kvbaton.request_id", request_id)
        self._span.set_attribute("gen_ai.request.model", model)
