"""Configuration of the frontend."""

from __future__ import annotations

from dataclasses import dataclass

from services.config.common import EtcdFlags, LogFlags, TlsFlags
from services.config.flags import flag, group


@dataclass(frozen=True, slots=True)
class FrontendConfig:
    """One frontend process."""

    host: str = flag("127.0.0.1", "address that all servers of this process bind")
    port: int = flag(50051, "gRPC port")
    http_port: int = flag(8000, "HTTP port of the OpenAI API, /health, /live and /metrics")

    max_live_requests: int = flag(4096, "requests accepted at once; more get RESOURCE_EXHAUSTED")
    first_token_timeout: float = flag(120.0, "seconds from dispatch until the first token")
    token_gap_timeout: float = flag(30.0, "seconds between two tokens")
    total_timeout: float = flag(1800.0, "seconds that one request may take")
    unregistered_grace: float = flag(
        60.0, "seconds that a worker stays routable without its etcd record, if it answers"
    )
    drain_timeout: float = flag(30.0, "seconds that live requests have to finish on SIGTERM")

    etcd: EtcdFlags = group(EtcdFlags)
    tls: TlsFlags = group(TlsFlags)
    log: LogFlags = group(LogFlags)

    def __post_init__(self) -> None:
        for name in ("first_token_timeout", "token_gap_timeout", "total_timeout", "drain_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive")
        if self.max_live_requests < 1:
            raise ValueError("--max-live-requests must be at least 1")
        for name in ("port", "http_port"):
            if not 0 <= getattr(self, name) < 65536:
                raise ValueError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not a port")
