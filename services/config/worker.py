"""Configuration of a prefill, decode, aggregated or embedding worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from services.config.common import EtcdFlags, LogFlags, PhaseFlags, TlsFlags, TraceFlags
from services.config.flags import DEFAULT, ENV_PREFIX, flag, group, options_of
from services.config.yaml_file import ConfigFile
from services.modes import DisaggregationMode, Mode
from services.requests import Role

# 12345 is what the field's manifests use; SGLang's own default is 8998.
BOOTSTRAP_PORT = 12345


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker process.

    `native_args` are SGLang's own flags and `native_file` the keys of --config that aren't Baton's; both are parsed by
    SGLang's own parser, once its packages are loaded.
    """

    role: Role = Role.AGGREGATED
    native_args: tuple[str, ...] = ()
    native_file: ConfigFile | None = None

    model_path: str = flag("", "a known small model (smollm2), a folder, or a hub id (org/name[@revision])")
    served_model_name: str = flag("", "the name that clients use; default: the model's own, from --model-path")
    model_timeout: float = flag(
        3600.0, "seconds that node ranks above 0 wait for rank 0 to download the model into a shared HF_HOME"
    )
    device: Literal["cuda", "cpu"] = flag("cuda", "where the engine runs")
    engine: Literal["sglang", "simulated"] = flag("sglang", "inference engine; simulated needs no model and no GPU")
    sim: str = flag("", "options of the simulated engine, key=value,key=value")

    disaggregation_mode: DisaggregationMode | None = flag(
        None, "must fit the command; null makes a decode worker run both phases; default: the command's"
    )
    disaggregation_transfer_backend: Literal["nixl", "none"] = flag(
        "nixl", "how KV caches move between the GPUs; none only for a worker that runs both phases"
    )
    disaggregation_bootstrap_port: int = flag(BOOTSTRAP_PORT, "port of SGLang's bootstrap server (prefill only)")
    embedding_worker: bool = flag(False, "serve embeddings instead of generating")
    allow_version_skew: bool = flag(
        False, "pair with workers of other SGLang and NIXL versions; on both sides, at your own risk"
    )

    page_size: int | None = flag(
        None,
        "tokens per KV page; both roles must agree; default: 16 on a CPU, SGLang's own on a GPU",
        sglang="page_size",
    )
    tp: int | None = flag(
        None,
        "tensor parallelism: GPUs that share one copy of the model; default: SGLang's, 1",
        aliases=("tp-size", "tensor-parallel-size"),
        sglang="tp_size",
    )
    dp: int | None = flag(
        None,
        "data parallelism: copies of the model, or of its attention; default: SGLang's, 1",
        aliases=("dp-size", "data-parallel-size"),
        sglang="dp_size",
    )
    nnodes: int | None = flag(None, "machines that one engine spans; default: SGLang's, 1", sglang="nnodes")
    node_rank: int | None = flag(None, "this machine's number among them; rank 0 serves requests", sglang="node_rank")
    dist_init_addr: str = flag(
        "",
        "host:port of node rank 0, for engines on several machines",
        aliases=("nccl-init-addr",),
        sglang="dist_init_addr",
    )
    skip_tokenizer_init: bool = flag(
        True, "always true: the frontend owns the tokenizer, and workers take token ids only"
    )
    trust_remote_code: bool = flag(
        False, "let the engine run code that comes with the model", sglang="trust_remote_code"
    )
    kv_events: bool = flag(True, "tell subscribers of KvEventService which prefixes the engine holds")
    enable_metrics: bool = flag(False, "serve SGLang's own metrics beside Baton's on /metrics", sglang="enable_metrics")

    window: int = flag(
        0,
        "legs that a decode worker runs, or an embedding worker takes, at once; 0: as many as its engine runs",
    )

    host: str = flag("127.0.0.1", "address that all servers of this process bind")
    port: int = flag(
        0, "gRPC port; default 50061 (prefill), 50062 (decode), 50063 (embedding); 0 here picks that default"
    )
    system_port: int = flag(
        0, "HTTP port of /health, /live and /metrics; default 8081 (prefill), 8082 (decode), 8083 (embedding)"
    )
    advertise_host: str = flag("", "address that others reach this process at; default: the one that routes to etcd")
    instance_id: str = flag("", "name in the registry, stable over restarts; default: role, address and port")

    warmup_timeout: float = flag(300.0, "seconds until every dp rank must have answered its first probe")
    health_check_payload: str = flag(
        "", "what probes and canaries ask for: JSON of a GenerateRequest's token_ids and sampling, or @FILE with it"
    )
    canary_interval: float = flag(10.0, "seconds without traffic until the worker probes its own engine")
    engine_silence_timeout: float = flag(
        30.0, "seconds that the engine may say nothing with work pending until the worker is unhealthy"
    )
    drain_grace: float = flag(1.0, "seconds after the withdrawal in which requests are still accepted")
    drain_timeout: float = flag(30.0, "seconds that running requests have to finish on SIGTERM")
    backstop_timeout: float | None = flag(
        None,
        "seconds until the engine itself gives up a hand-shake or transfer; default: 10 more than --prefill-timeout and"
        " --transfer-timeout give 128k tokens and 16 GiB",
    )
    gone_writer_timeout: float = flag(
        1.0,
        "seconds for which a prefill process's port must refuse connections until decode gives back the pages that it"
        " was writing into; 0: never, which leaves it to the engine's own deadline",
    )
    lease_ttl: float = flag(10.0, "seconds until etcd forgets a worker that doesn't renew")

    phases: PhaseFlags = group(PhaseFlags)
    etcd: EtcdFlags = group(EtcdFlags)
    tls: TlsFlags = group(TlsFlags)
    log: LogFlags = group(LogFlags)
    trace: TraceFlags = group(TraceFlags)

    def __post_init__(self) -> None:
        for name in (
            "warmup_timeout",
            "canary_interval",
            "engine_silence_timeout",
            "drain_timeout",
            "lease_ttl",
            "model_timeout",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive")
        if self.backstop_timeout is not None and self.backstop_timeout <= 0:
            raise ValueError("--backstop-timeout must be positive")
        if self.window < 0:
            raise ValueError("--window must not be negative")
        for name in ("drain_grace", "gone_writer_timeout"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative")
        for name, lowest in (("port", 0), ("system_port", 0), ("disaggregation_bootstrap_port", 1)):
            if not lowest <= getattr(self, name) < 65536:
                raise ValueError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not a port")
        for name in ("page_size", "tp", "dp", "nnodes"):
            if (getattr(self, name) or 1) < 1 or getattr(self, name) == 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if not self.skip_tokenizer_init:
            raise ValueError("--no-skip-tokenizer-init: workers take token ids only, the frontend has the tokenizer")
        self._check_nodes()

    @property
    def backstop(self) -> float:
        """Seconds until the engine itself gives up; the deadlines of frontends come first."""
        return self.phases.backstop if self.backstop_timeout is None else self.backstop_timeout

    def _check_nodes(self) -> None:
        nnodes, rank = self.nnodes or 1, self.node_rank or 0
        if not 0 <= rank < nnodes:
            raise ValueError(f"--node-rank {rank} is not one of --nnodes {nnodes} machines (0 to {nnodes - 1})")
        if nnodes > 1 and not self.dist_init_addr:
            raise ValueError(f"--nnodes {nnodes} needs --dist-init-addr, the same on every machine")

    @property
    def engine_fields(self) -> dict[str, Any]:
        """What is set of the flags that SGLang owns and Baton knows, by the names of SGLang's fields."""
        values = ((option.sglang, getattr(self, option.field)) for option in options_of(type(self)) if option.sglang)
        return {name: value for name, value in values if value not in (None, False, "")}

    def completed(self, mode: Mode, sources: Mapping[str, str] | None = None, **values: Any) -> WorkerConfig:
        """The configuration of a worker in that mode: its default ports filled in, and no contradiction left.

        `sources` says which settings somebody made. Raises ValueError.
        """
        config = replace(self, role=mode.role, disaggregation_mode=mode.disaggregation_mode, **values)
        if not config.model_path:
            raise ValueError("--model-path is missing: smollm2, a folder, or a hub id")
        if mode.disaggregated and config.disaggregation_transfer_backend == "none":
            raise ValueError(
                f"--disaggregation-transfer-backend none: a {mode.name} worker needs one for its KV caches; use nixl"
            )
        # The environment may be one for all of a cluster's processes; a flag or a key of a file is meant for this one.
        bootstrap = (sources or {}).get("disaggregation_bootstrap_port", "")
        if not mode.has_bootstrap and bootstrap not in ("", DEFAULT) and not bootstrap.startswith(ENV_PREFIX):
            raise ValueError(f"{bootstrap}: a worker in {mode.name} mode has no bootstrap server; that is prefill's")
        return replace(config, port=config.port or mode.grpc_port, system_port=config.system_port or mode.system_port)
