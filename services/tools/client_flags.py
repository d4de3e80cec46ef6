"""How a command reaches the frontend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvbaton.client import Client
from services.config.flags import ConfigError, flag


@dataclass(frozen=True, slots=True)
class ClientFlags:
    """Address and TLS files of a client."""

    endpoint: str = flag("localhost:50051", "gRPC endpoint of the frontend, host:port")
    tls_ca: Path | None = flag(None, "authority of the servers' certificates (PEM); switches TLS on")
    tls_cert: Path | None = flag(None, "certificate of this client (PEM), for mTLS")
    tls_key: Path | None = flag(None, "its key (PEM)")
    api_key: str = flag("", "API key, where the frontend asks for one; others can see flags, but not variables")

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together")

    def client(self, endpoint: str = "", *, timeout: float = 600.0, call_timeout: float = 10.0) -> Client:
        """A client of `endpoint` (default: the frontend). Raises ConfigError for a file that can't be read."""
        try:
            return Client(
                endpoint or self.endpoint,
                timeout=timeout,
                call_timeout=call_timeout,
                ca=self.tls_ca,
                cert=self.tls_cert,
                key=self.tls_key,
                # A worker is asked for its status, too, and has no business with it.
                api_key=self.api_key if endpoint in ("", self.endpoint) else "",
            )
        except OSError as error:
            raise ConfigError(f"TLS files: {error}") from error
