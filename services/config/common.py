"""Flags that every process has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.config.flags import flag
from services.config.yaml_file import ConfigFile, read_config_file
from services.transport import TlsConfig


@dataclass(frozen=True, slots=True)
class EtcdFlags:
    """Where the registry is."""

    etcd_endpoints: str = flag("127.0.0.1:2379", "etcd, host:port, several separated by commas")
    etcd_tls_cert: Path | None = flag(None, "client certificate for etcd (PEM)")
    etcd_tls_key: Path | None = flag(None, "its key (PEM)")
    etcd_tls_ca: Path | None = flag(None, "authority of etcd's certificate (PEM); switches TLS to etcd on")
    namespace: str = flag("default", "workers and frontends of one namespace see each other")

    @property
    def endpoints(self) -> list[str]:
        """The endpoints as a list."""
        return [endpoint.strip() for endpoint in self.etcd_endpoints.split(",") if endpoint.strip()]

    def tls(self) -> TlsConfig | None:
        """TLS to etcd, or None for plain text."""
        if not (self.etcd_tls_ca or self.etcd_tls_cert or self.etcd_tls_key):
            return None
        return TlsConfig(self.etcd_tls_cert, self.etcd_tls_key, self.etcd_tls_ca)


@dataclass(frozen=True, slots=True)
class TlsFlags:
    """TLS between Baton's own processes and their clients. The same files serve as server and as client identity."""

    tls_cert: Path | None = flag(None, "certificate of this process (PEM)")
    tls_key: Path | None = flag(None, "its key (PEM)")
    tls_ca: Path | None = flag(None, "authority of the peers' certificates (PEM)")
    tls_client_auth: bool = flag(False, "refuse clients without a certificate of --tls-ca (mTLS)")

    @property
    def _any(self) -> bool:
        return bool(self.tls_cert or self.tls_key or self.tls_ca or self.tls_client_auth)

    def server(self) -> TlsConfig | None:
        """TLS of this process's gRPC server, or None for plain text."""
        if not self._any:
            return None
        if self.tls_cert is None:
            raise ValueError("--tls-ca, --tls-key and --tls-client-auth need --tls-cert: every process is a server")
        return TlsConfig(self.tls_cert, self.tls_key, self.tls_ca, self.tls_client_auth)

    def client(self) -> TlsConfig | None:
        """TLS towards other Baton processes, or None for plain text. No --tls-ca: the system's authorities count."""
        if not self._any:
            return None
        return TlsConfig(self.tls_cert, self.tls_key, self.tls_ca)


@dataclass(frozen=True, slots=True)
class LogFlags:
    """Logs go to stderr."""

    log_level: Literal["debug", "info", "warning", "error"] = flag("info", "what is logged")
    log_format: Literal["console", "json"] = flag("console", "lines for people or for machines")


# What the longest request is taken to be where its length is not known.
_LONGEST_PROMPT = 131072
_LARGEST_CACHE = 16 * 2**30
_BACKSTOP_MARGIN = 10.0


@dataclass(frozen=True, slots=True)
class PhaseFlags:
    """How long the phases before the first token may take. Frontends keep these deadlines, by abort.

    Workers derive from them when their engine gives up by itself, so give both the same.
    """

    prefill_timeout: float = flag(60.0, "seconds from dispatch until prefill's token, for an empty prompt")
    prefill_timeout_per_1k: float = flag(2.0, "more of them for every 1000 prompt tokens")
    transfer_timeout: float = flag(10.0, "seconds from prefill's token until decode's first, for an empty KV cache")
    transfer_timeout_per_gib: float = flag(10.0, "more of them for every GiB of KV cache")

    def __post_init__(self) -> None:
        for name in ("prefill_timeout", "transfer_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive")
        for name in ("prefill_timeout_per_1k", "transfer_timeout_per_gib"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative")

    def prefill(self, prompt_tokens: int) -> float:
        """Seconds for a prompt of that length."""
        return self.prefill_timeout + self.prefill_timeout_per_1k * prompt_tokens / 1000

    def transfer(self, cache_bytes: int) -> float:
        """Seconds for a KV cache of that size."""
        return self.transfer_timeout + self.transfer_timeout_per_gib * cache_bytes / 2**30

    @property
    def backstop(self) -> float:
        """Later than every deadline before the first token, for all but absurdly long prompts."""
        return self.prefill(_LONGEST_PROMPT) + self.transfer(_LARGEST_CACHE) + _BACKSTOP_MARGIN


@dataclass(frozen=True, slots=True)
class TraceFlags:
    """OpenTelemetry; where spans go is in the standard OTEL_* variables."""

    enable_otel: bool = flag(False, "export traces over OTLP")


_PolicyName = Literal["round-robin", "random", "power-of-two", "least-loaded", "kv-aware", "direct"]


@dataclass(frozen=True, slots=True)
class RoutingFlags:
    """Which of the workers that could take a request get it; docs/routing.md."""

    prefill_policy: _PolicyName = flag("round-robin", "how prefill workers are chosen")
    decode_policy: _PolicyName = flag("round-robin", "how decode workers, and aggregated ones, are chosen")
    kv_aware_weight: float = flag(
        1.0, "cost of a prompt token that is not in a worker's prefix cache, in tokens that wait in its queue"
    )
    kv_aware_temperature: float = flag(
        0.1, "0: always the lowest cost; above it a draw that minds a higher cost the less the higher this is"
    )
    kv_aware_events: bool = flag(
        True, "follow the workers' KV events; otherwise guess what they hold from what was sent there"
    )
    kv_aware_max_pages: int = flag(1_000_000, "pages that the index of prefixes remembers, 100 bytes each")

    def __post_init__(self) -> None:
        for name in ("kv_aware_weight", "kv_aware_temperature"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative")
        if self.kv_aware_max_pages < 1:
            raise ValueError("--kv-aware-max-pages must be at least 1")

    @property
    def kv_aware(self) -> bool:
        """Whether anybody asks who holds which prefix."""
        return "kv-aware" in (self.prefill_policy, self.decode_policy)


@dataclass(frozen=True, slots=True)
class FileFlags:
    """Where a configuration comes from and goes to. These three can't stand in the file themselves."""

    config: Path | None = flag(None, "YAML file with the flags of this process as keys")
    config_key: str = flag("", "section of the file, a.b.c for a nested one; default: the whole file")
    dump_config_to: Path | None = flag(
        None, "write the configuration in force, with the source of each value, and go on"
    )

    def __post_init__(self) -> None:
        if self.config_key and self.config is None:
            raise ValueError("--config-key needs --config")

    def read(self) -> ConfigFile | None:
        """The section, None without --config. Raises ConfigError."""
        return None if self.config is None else read_config_file(self.config, self.config_key)
