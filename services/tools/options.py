"""What a local cluster consists of: its processes, and the arguments and environment of each."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import services
from services.config.flags import ConfigError, flag
from services.requests import Role
from services.tools.ports import Ports

FRONTEND = "frontend"


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """A cluster on this machine. `native_args` go to every worker, `env` to the process of that name."""

    mode: Literal["agg", "disagg"] = flag("disagg", "prefill and decode workers, or both phases in one worker")
    model_path: str = flag("smollm2", "a known small model (smollm2), a folder, or a hub id")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto is cuda where there is a GPU")
    host: str = flag("127.0.0.1", "address that the frontend binds; the workers do too if --etcd-endpoints is given")
    grpc_port: int | None = flag(None, "gRPC port of the frontend; when not given 50051, or a free one")
    http_port: int | None = flag(None, "HTTP port of the frontend; when not given 8000, or a free one")
    prefill_workers: int = flag(1, "prefill workers (disagg)")
    decode_workers: int = flag(1, "decode workers (disagg), or aggregated workers (agg)")
    etcd_endpoints: str = flag("", "a running etcd, host:port; when not given one is started")
    namespace: str = flag("default", "workers and frontends of one namespace see each other")
    state_dir: Path | None = flag(None, "folder for logs; when not given a new one under $XDG_STATE_HOME/kvbaton")
    api_key: str = flag("", "for this command's own questions, where KVBATON_API_KEYS makes the frontend ask for one")
    ready_timeout: float = flag(300.0, "seconds until the cluster must be ready")
    stop_timeout: float = flag(45.0, "seconds that the frontend, and then the workers, have to end on Ctrl-C")

    native_args: tuple[str, ...] = ()
    env: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])

    def __post_init__(self) -> None:
        for name in ("prefill_workers", "decode_workers", "ready_timeout", "stop_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive")
        for name in ("grpc_port", "http_port"):
            if not 0 <= (getattr(self, name) or 0) < 65536:
                raise ValueError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not a port")

    @property
    def engine_device(self) -> str:
        """cpu or cuda."""
        return self.device if self.device != "auto" else ("cuda" if has_gpu() else "cpu")

    @property
    def roles(self) -> list[Role]:
        """The role of every worker, prefill first."""
        if self.mode == "agg":
            return [Role.AGGREGATED] * self.decode_workers
        return [Role.PREFILL] * self.prefill_workers + [Role.DECODE] * self.decode_workers

    @property
    def worker_host(self) -> str:
        """Others can only need our workers when the etcd isn't ours alone."""
        return self.host if self.etcd_endpoints else "127.0.0.1"


@dataclass(slots=True)
class ProcessPlan:
    """One process of the cluster. `role` is None for the frontend; `index` counts the workers."""

    name: str
    role: Role | None
    index: int
    grpc_port: int = 0
    http_port: int = 0
    bootstrap_port: int = 0

    @property
    def ports(self) -> list[int]:
        """Every port that it listens on."""
        return [port for port in (self.grpc_port, self.http_port, self.bootstrap_port) if port]


def plan_processes(options: ClusterOptions, ports: Ports) -> list[ProcessPlan]:
    """The frontend, then the workers, each with its ports. Raises ConfigError when a port that was named is taken."""
    plans = [ProcessPlan(FRONTEND, None, 0)]
    roles = options.roles
    for index, role in enumerate(roles):
        number = roles[: index + 1].count(role)
        plans.append(ProcessPlan(role.value if roles.count(role) == 1 else f"{role.value}-{number}", role, index))
    if options.grpc_port:
        plans[0].grpc_port = ports.take(options.host, options.grpc_port, "--grpc-port")
    if options.http_port:
        plans[0].http_port = ports.take(options.host, options.http_port, "--http-port")
    for plan in plans:
        give_ports(plan, options, ports)
    return plans


def give_ports(plan: ProcessPlan, options: ClusterOptions, ports: Ports) -> None:
    """New ports for the process, except those that the operator named."""
    if plan.role is None:
        if not options.grpc_port:
            plan.grpc_port = ports.pick(options.host, 50051 if options.grpc_port is None else 0)
        if not options.http_port:
            plan.http_port = ports.pick(options.host, 8000 if options.http_port is None else 0)
        return
    # The first worker of each role gets the ports that it has when it is started by hand.
    offset = plan.index + (1 if plan.role is Role.AGGREGATED else 0)
    plan.grpc_port = ports.pick(options.worker_host, 50061 + offset)
    plan.http_port = ports.pick(options.worker_host, 8081 + offset)
    if plan.role is Role.PREFILL:
        plan.bootstrap_port = ports.pick(options.worker_host, 12345 + offset)


def command(plan: ProcessPlan, options: ClusterOptions, etcd_endpoints: str) -> list[str]:
    """The command line of a process."""
    common = ["--etcd-endpoints", etcd_endpoints, "--namespace", options.namespace]
    # -P: a folder named "services" where the operator happens to stand is not our package.
    python = [sys.executable, "-P", "-m", "services.cli"]
    if plan.role is None:
        ports = ["--host", options.host, "--port", str(plan.grpc_port), "--http-port", str(plan.http_port)]
        return [*python, FRONTEND, *ports, *common]
    arguments = ["prefill"] if plan.role is Role.PREFILL else ["decode"]
    if plan.role is Role.AGGREGATED:
        arguments += ["--disaggregation-mode", "null"]
    if plan.role is Role.PREFILL:
        arguments += ["--disaggregation-bootstrap-port", str(plan.bootstrap_port)]
    arguments += ["--model-path", options.model_path, "--device", options.engine_device]
    arguments += ["--host", options.worker_host, "--port", str(plan.grpc_port), "--system-port", str(plan.http_port)]
    return [*python, *arguments, *common, *options.native_args]


def environment(plan: ProcessPlan, options: ClusterOptions, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process: what it inherits, minus what contradicts this cluster."""
    # Between the processes of one machine everything is plain text, and so is our own etcd.
    unwanted = ("KVBATON_TLS_",) if options.etcd_endpoints else ("KVBATON_TLS_", "KVBATON_ETCD_")
    env = {name: value for name, value in inherited.items() if not name.startswith(unwanted)}
    root = Path(services.__file__).parent.parent
    if root.name != "site-packages":
        env["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [inherited.get("PYTHONPATH")])])
    if plan.role is not None and options.engine_device == "cpu" and len(options.roles) > 1:
        env.setdefault("OMP_NUM_THREADS", "1")
    if plan.role is not None and options.engine_device == "cuda":
        env["CUDA_VISIBLE_DEVICES"] = gpus_of(
            plan.index, gpus_per_worker(options.native_args), inherited.get("CUDA_VISIBLE_DEVICES")
        )
    return {**env, **options.env.get(plan.name, {})}


def gpus_of(index: int, count: int, visible: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of the index-th worker when each needs `count` GPUs. Raises ConfigError."""
    first, end = index * count, (index + 1) * count
    if visible is None:
        return ",".join(str(gpu) for gpu in range(first, end))
    gpus = [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
    if len(gpus) < end:
        raise ConfigError(f"worker {index + 1} needs {count} GPU(s), but CUDA_VISIBLE_DEVICES={visible} is used up")
    return ",".join(gpus[first:end])


def gpus_per_worker(native_args: Sequence[str]) -> int:
    """How many GPUs SGLang takes with these flags."""
    tensor = _number(native_args, "--tp", "--tp-size", "--tensor-parallel-size")
    pipeline = _number(native_args, "--pp", "--pp-size", "--pipeline-parallel-size")
    data = _number(native_args, "--dp", "--dp-size", "--data-parallel-size")
    return tensor * pipeline * (1 if "--enable-dp-attention" in native_args else data)


def has_gpu() -> bool:
    """Whether the NVIDIA driver shows a GPU."""
    return any(Path("/proc/driver/nvidia/gpus").glob("*")) or Path("/dev/nvidia0").exists()


def _number(arguments: Sequence[str], *names: str) -> int:
    for index, argument in enumerate(arguments):
        name, separator, value = argument.partition("=")
        if name in names:
            text = value if separator else (arguments[index + 1] if index + 1 < len(arguments) else "")
            return int(text) if text.isdigit() else 1
    return 1
