"""How every stage starts engines: Baton's cluster, bare SGLang's pair and aggregated ones, all with the same flags."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from benchmarks.gpu.bare import BareAggregated, BareEngine, BarePair
from benchmarks.gpu.words import write_words
from kvbaton.client import Client
from services.models.resolve import resolve_model_path
from services.models.smollm2 import NAME
from services.tools.cluster import LocalCluster
from services.tools.options import FRONTEND, ClusterOptions
from services.tools.ports import Ports

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "benchmarks/gpu/qwen3-8b-shape"
PROBE = ROOT / "benchmarks/gpu/engine_probe"
BOOTSTRAP_PORT = 18998
GPU_FLAGS = (
    *("--load-format", "dummy", "--random-seed", "1"),
    *("--attention-backend", "triton", "--sampling-backend", "pytorch"),
    *("--cuda-graph-backend-prefill", "disabled", "--cuda-graph-max-bs-decode", "64"),
    *("--page-size", "16", "--max-total-tokens", "150000"),
)
# Baton sets these itself where it runs on a CPU.
_BARE_CPU_FLAGS = (
    *("--attention-backend", "torch_native", "--dtype", "float32", "--page-size", "16", "--grammar-backend", "none"),
    *("--max-total-tokens", "16384", "--mem-fraction-static", "0.3", "--sleep-on-idle"),
)
_BARE_CPU_PAIR = ("--disable-overlap-schedule", "--disaggregation-decode-retraction-backup", "cpu_tensor")
# Of all clusters of this process: some start at the same time.
_PORTS = Ports()
# An engine that never gets there must not take the time of what comes behind it.
_READY_SECONDS = 200.0
_CALL_SECONDS = 240.0


@dataclass(frozen=True, slots=True)
class Setup:
    """What the engines of a stage have in common. Logs go to a folder of each system under `logs`."""

    logs: Path
    model: str
    device: Literal["cuda", "cpu"]
    flags: tuple[str, ...]
    """SGLang's, or `--engine simulated` with its options."""
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of every worker and of every bare engine."""
    probe: bool = False
    """Engines tell what `benchmarks/gpu/engine_probe` sees of each request and transfer."""

    @property
    def simulated(self) -> bool:
        """Whether there is no SGLang in it."""
        return "simulated" in self.flags

    @property
    def vocabulary(self) -> int:
        """Every token id below it is one of the model's."""
        return 30_000 if self.model == NAME else 150_000

    @property
    def probe_folder(self) -> Path:
        """Where engines with a probe write."""
        return self.logs / "probe"

    def worker_env(self) -> dict[str, str]:
        """The environment of workers and bare engines beside what they inherit."""
        dummy = "dummy" in self.flags
        if self.simulated or not (self.probe or dummy):
            return dict(self.env)
        path = [str(PROBE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        told = {"PYTHONPATH": os.pathsep.join(path)}
        if dummy:
            told["KVBATON_DUMMY_WEIGHTS"] = "1"
        if self.probe:
            self.probe_folder.mkdir(parents=True, exist_ok=True)
            told["KVBATON_ENGINE_PROBE"] = str(self.probe_folder.resolve())
        return {**told, **self.env}

    def with_flags(self, *flags: str) -> Setup:
        """With more flags of SGLang's; a simulated engine takes none."""
        return self if self.simulated else replace(self, flags=(*self.flags, *flags))

    def with_flag(self, name: str, value: str) -> Setup:
        """With this flag of SGLang's, in place of the value that it had."""
        if name not in self.flags:
            return self.with_flags(name, value)
        at = self.flags.index(name)
        return replace(self, flags=(*self.flags[:at], name, value, *self.flags[at + 2 :]))

    def sharing(self, fraction: float) -> Setup:
        """That leaves room for other engines on the GPU: each takes its share of what those before it have left."""
        return self.with_flag("--mem-fraction-static", f"{fraction:g}") if self.device == "cuda" else self

    def engine_flags(self) -> tuple[str, ...]:
        """With those that the probe needs."""
        return (*self.flags, "--enable-request-time-stats-logging") if self.probe and not self.simulated else self.flags


def shape(layers: int, folder: Path) -> Path:
    """The model's shape with so many layers, as a folder of a model in `folder`."""
    config = json.loads((MODEL / "config.json").read_text())
    config["num_hidden_layers"] = layers
    if "layer_types" in config:  # as long as the layers it describes
        config["layer_types"] = config["layer_types"][:layers]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_words(setup: Setup, folder: Path) -> Setup:
    """The model's shape with a tokenizer to which every token is a word of its own: text edges say each token.

    A model that was chosen by hand is left as it is.
    """
    if setup.model != str(MODEL):
        return setup
    shape(json.loads((MODEL / "config.json").read_text())["num_hidden_layers"], folder)
    write_words(folder, 151_936)
    return replace(setup, model=str(folder))


@dataclass(frozen=True, slots=True)
class Running:
    """A cluster that answers. `ready` is how long it took, in seconds."""

    cluster: LocalCluster
    client: Client
    ready: float

    @property
    def versions(self) -> str:
        """Of the engine and of what moves its pages."""
        (worker, *_) = self.cluster.workers.values()
        return f"sglang {worker.runtime.versions.engine_version}, nixl {worker.runtime.versions.nixl}"

    def log(self, process: str) -> Path:
        """Of a process of the cluster."""
        return self.cluster.log_dir / f"{process}.log"


@contextlib.asynccontextmanager
async def baton(
    setup: Setup,
    name: str,
    mode: Literal["agg", "disagg"] = "disagg",
    *,
    prefill: int = 1,
    decode: int = 1,
    env: Mapping[str, Mapping[str, str]] | None = None,
) -> AsyncGenerator[Running]:
    """etcd, a frontend and workers; `env` by process. Raises as LocalCluster; RuntimeError for what is left."""
    options = ClusterOptions(
        mode=mode,
        model_path=setup.model,
        device=setup.device,
        grpc_port=0,
        http_port=0,
        state_dir=setup.logs / name,
        ready_timeout=_READY_SECONDS,
        prefill_workers=prefill,
        decode_workers=decode,
        native_args=setup.engine_flags(),
        env=_environments(setup, mode, prefill, decode, env or {}),
    )
    began = time.monotonic()
    cluster = LocalCluster(options, ports=_PORTS)
    async with cluster, Client(cluster.grpc_endpoint, timeout=_CALL_SECONDS) as client:
        ready = time.monotonic() - began
        print(f"{name}: ready after {ready:.0f} s", flush=True)
        yield Running(cluster, client, ready)
    if left := cluster.leftovers():
        raise RuntimeError(f"{name}: left behind: {left}")


def _environments(
    setup: Setup, mode: str, prefill: int, decode: int, more: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    counts = {"aggregated": decode} if mode == "agg" else {"prefill": prefill, "decode": decode}
    workers = [
        role if count == 1 else f"{role}-{number}" for role, count in counts.items() for number in range(1, count + 1)
    ]
    given = {FRONTEND: {}, **dict.fromkeys(workers, setup.worker_env())}
    return {name: {"KVBATON_LOG_FORMAT": "json", **env, **more.get(name, {})} for name, env in given.items()}


@contextlib.asynccontextmanager
async def bare_pair(setup: Setup, name: str = "bare") -> AsyncGenerator[BarePair]:
    """Bare SGLang's prefill engine on the first GPU and decode engine on the second."""
    common = ("--disaggregation-transfer-backend", "nixl", "--disaggregation-bootstrap-port", str(BOOTSTRAP_PORT))
    own = (*common, "--host", "127.0.0.1", *(_BARE_CPU_PAIR if setup.device == "cpu" else ()))
    async with contextlib.AsyncExitStack() as stack:
        prefill, decode = await asyncio.gather(
            _engine(setup, name, "prefill", 0, ("--disaggregation-mode", "prefill", *own), stack),
            _engine(setup, name, "decode", 1, ("--disaggregation-mode", "decode", *own), stack),
        )
        yield BarePair(name, prefill, decode, BOOTSTRAP_PORT)


@contextlib.asynccontextmanager
async def bare_aggregated(setup: Setup, name: str = "bare-agg") -> AsyncGenerator[BareAggregated]:
    """An aggregated engine on each of the two GPUs, asked in turn."""
    async with contextlib.AsyncExitStack() as stack:
        engines = await asyncio.gather(*(_engine(setup, name, f"agg-{gpu}", gpu, (), stack) for gpu in (0, 1)))
        yield BareAggregated(name, engines)


async def _engine(
    setup: Setup, system: str, label: str, gpu: int, own: tuple[str, ...], stack: contextlib.AsyncExitStack
) -> BareEngine:
    folder = setup.logs / system
    folder.mkdir(parents=True, exist_ok=True)
    engine = BareEngine(label, folder)
    stack.push_async_callback(engine.stop)
    on_cpu = setup.device == "cpu"
    model = str(await asyncio.to_thread(lambda: resolve_model_path(setup.model).path))
    native = ["--model-path", model, "--device", setup.device, *(_BARE_CPU_FLAGS if on_cpu else ())]
    await engine.start([*native, *setup.engine_flags(), *own], gpu=None if on_cpu else gpu, env=setup.worker_env())
    return engine
