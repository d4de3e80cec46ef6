"""Configuration of a prefill, decode or aggregated worker."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from services.config.common import EtcdFlags, LogFlags, TlsFlags
from services.config.flags import flag, group
from services.requests import Role


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker process. `native_args` are SGLang's own flags, parsed by SGLang's own parser."""

    role: Role = Role.AGGREGATED
    native_args: tuple[str, ...] = ()

    model_path: str = flag("", "a known small model (smollm2), a folder, or a hub id")
    served_model_name: str = flag("", "the name that clients use; default: the model's own, from --model-path")
    device: Literal["cuda", "cpu"] = flag("cuda", "where the engine runs")
    engine: Literal["sglang", "simulated"] = flag("sglang", "inference engine; simulated needs no model and no GPU")
    sim: str = flag("", "options of the simulated engine, key=value,key=value")
    page_size: int | None = flag(
        None, "tokens per KV page; both roles must agree; default: 16 on a CPU, SGLang's own on a GPU"
    )
    disaggregation_transfer_backend: Literal["nixl"] = flag("nixl", "how KV caches move between the GPUs")
    disaggregation_bootstrap_port: int = flag(12345, "port of SGLang's bootstrap server (prefill)")

    window: int = flag(0, "legs that a decode worker runs at once; 0: as many as its engine runs")

    host: str = flag("127.0.0.1", "address that all servers of this process bind")
    port: int = flag(0, "gRPC port; default 50061 (prefill), 50062 (decode); 0 here picks that default")
    system_port: int = flag(0, "HTTP port of /health, /live and /metrics; default 8081 (prefill), 8082 (decode)")
    advertise_host: str = flag("", "address that others reach this process at; default: the one that routes to etcd")
    instance_id: str = flag("", "name in the registry, stable over restarts; default: role, address and port")

    warmup_timeout: float = flag(300.0, "seconds until every dp rank must have generated its first token")
    drain_grace: float = flag(1.0, "seconds after the withdrawal in which requests are still accepted")
    drain_timeout: float = flag(30.0, "seconds that running requests have to finish on SIGTERM")
    backstop_timeout: float = flag(180.0, "seconds until SGLang itself gives up a hand-shake or transfer")
    lease_ttl: float = flag(10.0, "seconds until etcd forgets a worker that doesn't renew")

    etcd: EtcdFlags = group(EtcdFlags)
    tls: TlsFlags = group(TlsFlags)
    log: LogFlags = group(LogFlags)

    def __post_init__(self) -> None:
        for name in ("warmup_timeout", "drain_timeout", "backstop_timeout", "lease_ttl"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive")
        if self.window < 0:
            raise ValueError("--window must not be negative")
        if self.drain_grace < 0:
            raise ValueError("--drain-grace must not be negative")
        for name in ("port", "system_port", "disaggregation_bootstrap_port"):
            if not 0 <= getattr(self, name) < 65536:
                raise ValueError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not a port")
        if self.page_size is not None and self.page_size < 1:
            raise ValueError("--page-size must be at least 1")

    def completed(self, **values: Any) -> WorkerConfig:
        """The configuration with role, pass-through flags and the role's default ports filled in. Raises ValueError."""
        config = replace(self, **values)
        if not config.model_path:
            raise ValueError("--model-path is missing: smollm2, a folder, or a hub id")
        grpc_port, system_port = (50061, 8081) if config.role is Role.PREFILL else (50062, 8082)
        return replace(config, port=config.port or grpc_port, system_port=config.system_port or system_port)
