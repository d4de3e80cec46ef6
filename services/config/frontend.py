"""Configuration of the frontend."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from services.config.common import EtcdFlags, LogFlags, PhaseFlags, RoutingFlags, TlsFlags, TraceFlags
from services.config.flags import flag, group
from services.config.limits import AccessFlags, LimitFlags

# A connection stays with the process that the kernel chose, so a client's load moves to others only with a new one.
# Often enough to fill a process that was replaced, and a handshake in five minutes costs nothing.
_AGE_WITH_SEVERAL_PROCESSES = 300.0


@dataclass(frozen=True, slots=True)
class BreakerFlags:
    """When a worker that fails its requests gets no more of them, although it says that it is well."""

    breaker_faults: int = flag(5, "faults of a worker in a row that open its breaker; 0: no breakers")
    breaker_pause: float = flag(1.0, "seconds until the worker behind an open breaker is probed; then doubled")
    breaker_longest_pause: float = flag(30.0, "seconds between two such probes at most")

    def __post_init__(self) -> None:
        if self.breaker_faults < 0:
            raise ValueError("--breaker-faults must not be negative")
        if self.breaker_pause <= 0:
            raise ValueError("--breaker-pause must be positive")
        if self.breaker_longest_pause < self.breaker_pause:
            raise ValueError("--breaker-longest-pause must not be shorter than --breaker-pause")


@dataclass(frozen=True, slots=True)
class FrontendConfig:
    """One frontend process."""

    host: str = flag("127.0.0.1", "address that all servers of this process bind")
    port: int = flag(50051, "gRPC port")
    http_port: int = flag(8000, "HTTP port of the OpenAI API, /health, /live and /metrics")

    processes: int = flag(1, "processes that share both ports, each with its own view of the workers (Linux)")
    max_connection_age: float | None = flag(
        None,
        "seconds until a client is asked to connect anew, gRPC and HTTP; nothing that runs is cut; 0: never"
        " (unset: 300 with several processes, else 0)",
    )

    link: Literal["streams", "session"] = flag("session", "one session per worker, or one gRPC stream per leg")
    heartbeat: float = flag(0.5, "seconds; a worker that is silent for two of them gets no new work (session)")
    max_live_requests: int = flag(4096, "requests accepted at once, of all models; more get RESOURCE_EXHAUSTED")
    max_queued_requests: int = flag(1024, "requests of one model that wait for workers; more get RESOURCE_EXHAUSTED")
    max_buffered_bytes: int = flag(1 << 20, "bytes of an answer that its client may leave unread before it is ended")
    ready_queue_timeout: float = flag(5.0, "seconds that requests wait while no workers serve their model")
    queue_timeout: float = flag(30.0, "seconds until a request has workers")
    check_pairs: bool = flag(True, "prove each pair with a one-page request before its first real one")
    routing: RoutingFlags = group(RoutingFlags)
    phases: PhaseFlags = group(PhaseFlags)
    token_gap_timeout: float = flag(30.0, "seconds between two tokens")
    total_timeout: float = flag(1800.0, "seconds that one request may take")
    unregistered_grace: float = flag(
        60.0, "seconds that a worker stays routable without its etcd record, if it answers"
    )
    retries: int = flag(2, "further attempts, before the first token, at a request whose workers failed")
    max_migrations: int = flag(
        3, "times that an answer goes on with other workers, behind its first token, when its own have failed; 0: never"
    )
    breaker: BreakerFlags = group(BreakerFlags)
    max_embedding_calls: int = flag(64, "embedding calls at once to each worker; more get RESOURCE_EXHAUSTED")
    embedding_timeout: float = flag(60.0, "seconds that one embedding request may take, with all its attempts")
    drain_timeout: float = flag(30.0, "seconds that live requests have to finish on SIGTERM")

    access: AccessFlags = group(AccessFlags)
    limits: LimitFlags = group(LimitFlags)
    etcd: EtcdFlags = group(EtcdFlags)
    tls: TlsFlags = group(TlsFlags)
    log: LogFlags = group(LogFlags)
    trace: TraceFlags = group(TraceFlags)

    def __post_init__(self) -> None:
        positive = (
            "heartbeat",
            "queue_timeout",
            "token_gap_timeout",
            "total_timeout",
            "embedding_timeout",
            "drain_timeout",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive")
        for name in ("retries", "max_migrations", "ready_queue_timeout", "max_connection_age"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative")
        for name in (
            "max_live_requests",
            "max_queued_requests",
            "max_buffered_bytes",
            "max_embedding_calls",
            "processes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if self.processes > 1 and sys.platform != "linux":
            raise ValueError("--processes above 1 needs Linux, which spreads connections over them")
        for name in ("port", "http_port"):
            if not 0 <= getattr(self, name) < 65536:
                raise ValueError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not a port")

    @property
    def connection_age(self) -> float:
        """Seconds; 0.0 for connections that live as long as they are used."""
        if self.max_connection_age is None:
            return _AGE_WITH_SEVERAL_PROCESSES if self.processes > 1 else 0.0
        return self.max_connection_age
