"""What may clients of a frontend do, and what may one of them cost?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.config.flags import flag


@dataclass(frozen=True, slots=True)
class AccessFlags:
    """Who may use the frontend."""

    api_keys: Path | None = flag(None, "YAML file with the API keys that clients need; without it they need none")


@dataclass(frozen=True, slots=True)
class LimitFlags:
    """Limits on one client. Times are in seconds."""

    max_body_bytes: int = flag(32 * 2**20, "bytes of a request: HTTP body (413), gRPC message (RESOURCE_EXHAUSTED)")
    max_bodies_bytes: int = flag(256 * 2**20, "bytes of all HTTP bodies that are being read or understood (503)")
    max_prompt_tokens: int | None = flag(None, "tokens of a prompt, below what the model takes")
    max_header_bytes: int = flag(32 * 2**10, "bytes of a request's line and headers over HTTP (431)")
    max_connections: int = flag(8192, "HTTP connections at once (503)")
    header_timeout: float = flag(10.0, "seconds until a request's headers, or a TLS handshake, are complete (408)")
    body_timeout: float = flag(60.0, "seconds from a request's headers until all of its body has come (408)")
    write_timeout: float = flag(60.0, "seconds that an HTTP client may take nothing of its answer")
    keep_alive_timeout: float = flag(75.0, "seconds that an HTTP connection may be idle between two requests")

    def __post_init__(self) -> None:
        for name in ("header_timeout", "body_timeout", "write_timeout", "keep_alive_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive")
        for name in ("max_body_bytes", "max_connections", "max_prompt_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if self.max_header_bytes < 1024:
            raise ValueError("--max-header-bytes must be at least 1024: a browser's own headers have as many")
        if self.max_bodies_bytes < self.max_body_bytes:
            raise ValueError("--max-bodies-bytes must be at least --max-body-bytes")
        if self.max_body_bytes >= 2**31:
            raise ValueError("--max-body-bytes must be below 2 GiB, which is gRPC's own limit on a message")
