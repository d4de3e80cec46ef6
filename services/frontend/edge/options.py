"""What an operator can set on the HTTP edge."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeOptions:
    """Limits on what one client may cost. Raises ValueError for one that is not positive."""

    max_body_bytes: int = 32 * 1024 * 1024
    """A longer request body is refused with 413, while it is read."""

    max_bodies_bytes: int = 256 * 1024 * 1024
    """All bodies together, each from its first byte until its request is understood; then 503."""

    body_timeout_seconds: float = 60.0
    """From the headers until the whole body has arrived; then 408."""

    write_timeout_seconds: float = 60.0
    """How long a client may take nothing of its answer before its request is cancelled."""

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_bodies_bytes", "body_timeout_seconds", "write_timeout_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")
