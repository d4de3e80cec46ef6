"""Where spans go: OTLP, by the standard OTEL_* variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self
from urllib.parse import urlsplit

from services.version import own_version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_DEFAULT_ENDPOINTS = {"grpc": "http://localhost:4317", "http/protobuf": "http://localhost:4318"}


@dataclass(frozen=True, slots=True)
class OtlpTarget:
    """The receiver that the variables name. `endpoint` is a URL, with the path where OTLP goes over HTTP."""

    protocol: Literal["grpc", "http/protobuf"]
    endpoint: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Raises ValueError naming the variable for a protocol that Baton doesn't speak."""
        name = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
        if not environment.get(name):
            name = "OTEL_EXPORTER_OTLP_PROTOCOL"
        protocol = environment.get(name) or "grpc"
        if protocol not in ("grpc", "http/protobuf"):
            raise ValueError(f"{name}: {protocol!r} is neither grpc nor http/protobuf")
        if endpoint := environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
            return cls(protocol, endpoint)
        endpoint = environment.get("OTEL_EXPORTER_OTLP_ENDPOINT") or _DEFAULT_ENDPOINTS[protocol]
        return cls(protocol, endpoint if protocol == "grpc" else f"{endpoint.rstrip('/')}/v1/traces")

    @property
    def encrypted(self) -> bool:
        """Whether the URL asks for TLS."""
        return urlsplit(self.endpoint).scheme == "https"

    @property
    def host_and_port(self) -> str:
        """The endpoint without scheme and path; gRPC's may be written without a scheme."""
        return urlsplit(self.endpoint).netloc or self.endpoint


def tracer_provider(service: str) -> TracerProvider:
    """The SDK's provider; sampler, limits, batches, headers and certificates are the SDK's affair.

    `service` is the service's name where no variable gives another. Raises ValueError for what can't be followed.
    """
    # Imported late: who exports nothing must not pay for the SDK.
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = {"service.name": service, "service.version": own_version(), **OTELResourceDetector().detect().attributes}
    # The process says itself when everything is to be flushed, in bounded time.
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    wanted = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    if wanted == "otlp":
        provider.add_span_processor(BatchSpanProcessor(_exporter(OtlpTarget.from_environment(os.environ))))
    elif wanted != "none":
        raise ValueError(f"OTEL_TRACES_EXPORTER: {wanted!r} is neither otlp nor none")
    return provider


def _exporter(target: OtlpTarget) -> SpanExporter:
    """Both exporters read endpoint, headers and certificates themselves."""
    if target.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpanExporter
    except ImportError as error:
        raise ValueError("OTLP over HTTP needs the package opentelemetry-exporter-otlp-proto-http") from error
    return HttpSpanExporter()
