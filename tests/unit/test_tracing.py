"""Spans and their context: what is handed on, what is refused, what costs nothing when it is off, ids in the logs."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider

from kvbaton.errors import Reason, RequestError, cancelled
from services.telemetry import tracing
from services.telemetry.logging import configure_logging
from services.telemetry.otlp import OtlpTarget, tracer_provider

ROOT = Path(__file__).parents[2]
HEADERS = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "vendor=1"}


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Spans are recorded, and go nowhere."""
    monkeypatch.setattr(tracing, "_tracer", TracerProvider(shutdown_on_exit=False).get_tracer("test"))
    yield
    structlog.reset_defaults()
    # It writes to what pytest has captured and closed.
    logging.basicConfig(handlers=[logging.NullHandler()], force=True)


# Off


def test_a_context_that_came_is_handed_on_as_it_is() -> None:
    request = tracing.server_span("request", HEADERS)
    assert tracing.headers_of(tracing.client_span("attempt", request)) == HEADERS


@pytest.mark.parametrize("headers", [{}, {"traceparent": "nonsense"}, {"tracestate": "vendor=1"}])
def test_without_a_context_nothing_is_handed_on(headers: dict[str, str]) -> None:
    assert tracing.headers_of(tracing.server_span("request", headers)) == {}


@pytest.mark.parametrize("module", ["services.frontend.process", "services.worker.process"])
def test_a_process_that_exports_nothing_imports_neither_sdk_nor_exporter(module: str) -> None:
    program = (
        f"import json, sys, {module}\n"
        "from services.telemetry.tracing import configure_tracing\n"
        "configure_tracing(enabled=%s, service='s')()\n"
        "print(json.dumps([name for name in sys.modules if name.startswith('opentelemetry.')]))"
    )

    def loaded(enabled: bool) -> list[str]:
        arguments = [sys.executable, "-c", program % enabled]
        done = subprocess.run(arguments, check=True, capture_output=True, text=True, cwd=ROOT)
        paid_for = ("opentelemetry.sdk", "opentelemetry.exporter")
        return [name for name in json.loads(done.stdout) if name.startswith(paid_for)]

    assert loaded(False) == []
    assert loaded(True) != [], "or this test looks for the wrong thing"


# On


@pytest.mark.usefixtures("recording")
def test_every_hop_is_a_child_of_the_one_before() -> None:
    request = tracing.server_span("request", HEADERS)
    attempt = tracing.client_span("attempt", request)
    sent = tracing.headers_of(attempt)
    assert sent["traceparent"].split("-")[1] == "a" * 32
    assert sent["traceparent"].split("-")[2] not in ("b" * 16, f"{request.get_span_context().span_id:016x}")
    assert sent["tracestate"] == "vendor=1"


@pytest.mark.usefixtures("recording")
def test_what_the_client_does_not_sample_is_neither_recorded_nor_sampled_behind_us() -> None:
    span = tracing.server_span("request", {"traceparent": f"00-{'a' * 32}-{'b' * 16}-00"})
    assert not span.is_recording()
    assert tracing.headers_of(span)["traceparent"].startswith(f"00-{'a' * 32}-")
    assert tracing.headers_of(span)["traceparent"].endswith("-00")


@pytest.mark.usefixtures("recording")
def test_nothing_is_recorded_under_the_parent_of_probes() -> None:
    assert not tracing.server_span("leg", tracing.headers_of(tracing.UNSAMPLED)).is_recording()


@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_log_lines_under_a_recorded_span_carry_its_ids(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(level="info", format=log_format, service="test")
    log = structlog.get_logger()
    span = tracing.server_span("request", HEADERS)
    tracing.call_under(span, log.info, "inside")
    log.info("outside")
    span.end()
    tracing.call_under(span, log.info, "behind its end")
    inside, *others = capsys.readouterr().err.splitlines()
    assert "a" * 32 in inside
    assert f"{span.get_span_context().span_id:016x}" in inside
    if log_format == "json":
        assert json.loads(inside)["trace_id"] == "a" * 32
    assert [line for line in others if "trace_id" in line or "span_id" in line] == []


def test_the_end_of_a_process_does_not_wait_for_a_receiver_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "FLUSH_TIMEOUT", 0.3)
    monkeypatch.setattr(tracing, "_tracer", tracing._tracer)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        flush = tracing.configure_tracing(enabled=True, service="test")
        tracing.server_span("request", {}).end()
        began = time.monotonic()
        flush()
        assert 0.2 < time.monotonic() - began < 2.0


@pytest.mark.parametrize(
    ("error", "outcome", "status"),
    [
        (None, "finished", "UNSET"),
        (cancelled(), "CANCELLED", "UNSET"),
        (tracing.as_request_error(GeneratorExit()), "CANCELLED", "UNSET"),
        (tracing.as_request_error(KeyError("x")), "INTERNAL", "ERROR"),
    ],
)
@pytest.mark.usefixtures("recording")
def test_a_span_says_how_it_ended_and_cancelling_is_no_error(
    error: RequestError | None, outcome: str, status: str
) -> None:
    span = tracing.server_span("request", {})
    tracing.set_outcome(span, error)
    assert span.attributes["kvbaton.outcome"] == outcome  # type: ignore[attr-defined]
    assert span.status.status_code.name == status  # type: ignore[attr-defined]


# Headers


def test_only_trace_headers_are_picked_and_several_of_one_are_one_list() -> None:
    metadata = [("tracestate", "a=1"), ("x-other", "1"), ("tracestate", "b=2"), ("traceparent", HEADERS["traceparent"])]
    assert tracing.pick_headers(metadata) == {"traceparent": HEADERS["traceparent"], "tracestate": "a=1,b=2"}


def test_a_header_that_is_too_long_is_dropped() -> None:
    assert tracing.pick_headers([("tracestate", "a=" + "1" * 511), ("traceparent", "t")]) == {"traceparent": "t"}


@pytest.mark.parametrize(("name", "value"), [("authorization", "x"), ("traceparent", "0" * 513)])
def test_a_message_with_other_or_longer_headers_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        tracing.check_headers({name: value}, "submits.trace_headers")
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "submits.trace_headers")


# Variables


@pytest.mark.parametrize(
    ("variables", "protocol", "endpoint", "host_and_port"),
    [
        ({}, "grpc", "http://localhost:4317", "localhost:4317"),
        ({"ENDPOINT": "http://c:1"}, "grpc", "http://c:1", "c:1"),
        ({"ENDPOINT": "c:1"}, "grpc", "c:1", "c:1"),
        ({"ENDPOINT": "http://c:1", "TRACES_ENDPOINT": "http://t:2"}, "grpc", "http://t:2", "t:2"),
        ({"PROTOCOL": "http/protobuf"}, "http/protobuf", "http://localhost:4318/v1/traces", "localhost:4318"),
        (
            {"PROTOCOL": "grpc", "TRACES_PROTOCOL": "http/protobuf", "ENDPOINT": "http://c:1/"},
            "http/protobuf",
            "http://c:1/v1/traces",
            "c:1",
        ),
        (
            {"PROTOCOL": "http/protobuf", "TRACES_ENDPOINT": "http://t:2/x"},
            "http/protobuf",
            "http://t:2/x",
            "t:2",
        ),
    ],
)
def test_the_receiver_is_the_one_that_the_variables_name(
    variables: dict[str, str], protocol: str, endpoint: str, host_and_port: str
) -> None:
    target = OtlpTarget.from_environment({f"OTEL_EXPORTER_OTLP_{name}": value for name, value in variables.items()})
    assert (target.protocol, target.endpoint, target.host_and_port) == (protocol, endpoint, host_and_port)


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"), ("OTEL_TRACES_EXPORTER", "zipkin")]
)
def test_a_variable_that_can_not_be_followed_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}: '{value}'"):
        tracer_provider("s")


@pytest.mark.parametrize(
    ("variables", "service"),
    [
        ({}, "kvbaton-frontend"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=theirs"}, "theirs"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=theirs", "OTEL_SERVICE_NAME": "named"}, "named"),
    ],
)
def test_a_service_has_our_name_where_no_variable_gives_another(
    variables: dict[str, str], service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"OTEL_TRACES_EXPORTER": "none", **variables}.items():
        monkeypatch.setenv(name, value)
    assert tracer_provider("kvbaton-frontend").resource.attributes["service.name"] == service
