"""How an SGLang engine is launched: options, arguments, environment, temporary folder, stand-ins."""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from services.config.yaml_file import ConfigFile
from services.modes import Mode, mode_of
from services.telemetry.otlp import OtlpTarget
from services.worker.engines.protocol import Role
from services.worker.engines.sglang_death import on_sigquit
from services.worker.engines.sglang_writers import GONE_WRITER_TIMEOUT

CPU_STANDINS = Path(__file__).parent / "cpu_standins"

_IPC_PATH_LIMIT = 107
_TMP_PREFIX = "kvb-"
_TMP_SETTLING_S = 60.0


@dataclass(frozen=True, slots=True)
class SglangOptions:
    """What one SGLang engine is started with. Times in seconds."""

    role: Role
    model_path: str
    served_model_name: str
    device: Literal["cpu", "cuda"] = "cuda"

    bootstrap_host: str = "127.0.0.1"
    """Address that prefill's bootstrap server binds and that its own schedulers register at."""

    bootstrap_port: int = 12345

    transfer_host: str = ""
    """Address at which the other leg reaches this worker's schedulers; empty: SGLang picks the first interface."""

    transfer_backend: str = "nixl"

    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of SGLang's `ServerArgs` that have flags of Baton's (page_size, tp_size, ...) and are set."""

    native_args: tuple[str, ...] = ()
    """SGLang's own flags, parsed by SGLang's own parser."""

    native_file: ConfigFile | None = None
    """The same from the file of --config; flags win."""

    kv_events: bool = True
    """Tell of what the prefix cache holds; decode and embedding engines have none."""

    metrics: bool = False
    """Collect SGLang's own metrics."""

    spans: OtlpTarget | None = None
    """Where SGLang exports spans of its own; None: nowhere."""

    backstop_timeout_s: float = 120.0
    """When SGLang itself gives up a hand-shake or a transfer; longer than every deadline of ours."""

    gone_writer_timeout_s: float = 1.0
    """For how long a prefill rank must refuse connections until decode takes it for ended; 0: it never does."""

    abort_timeout_s: float = 5.0
    """How long an aborted request may take to end; its iterator ends then whatever the engine does."""

    probe_timeout_s: float = 25.0
    """Shorter than the deadline of whoever asks, so that the engine says why."""

    log_level: str = "warning"
    """SGLang's own; `--log-level` among the native arguments wins."""

    tmp_root: Path = Path("/tmp")
    """Where the engine's private temporary folder is made; short, because socket paths are."""

    @property
    def mode(self) -> Mode:
        """What the role makes of the engine."""
        return mode_of(self.role)

    @property
    def tells_kv_events(self) -> bool:
        """Whether the schedulers are made to tell of their prefix caches."""
        return self.kv_events and self.role in (Role.PREFILL, Role.AGGREGATED)


@dataclass(frozen=True, slots=True)
class KvSockets:
    """Where the schedulers publish KV events, and repeat them: in the engine's private folder, on no network.

    SGLang adds the dp rank to the number behind the last colon, of addresses that have "tcp" in them.
    """

    folder: Path

    def events(self, dp_rank: int) -> str:
        """The publisher's socket."""
        return f"ipc://{self.folder}/kv-tcp:{dp_rank}"

    def replay(self, dp_rank: int) -> str:
        """The socket that repeats."""
        return f"ipc://{self.folder}/kvr-tcp:{dp_rank}"

    def config(self) -> str:
        """SGLang's `--kv-events-config`."""
        return json.dumps({"publisher": "zmq", "endpoint": self.events(0), "replay_endpoint": self.replay(0)})


def forced_fields(options: SglangOptions, kv_sockets: KvSockets | None = None) -> dict[str, Any]:
    """Fields of SGLang's `ServerArgs` that Baton decides; passing them through is refused.

    `kv_sockets` is where the schedulers tell of their prefix caches, None if they don't.
    """
    fields: dict[str, Any] = {
        "model_path": options.model_path,
        "served_model_name": options.served_model_name,
        "device": options.device,
        "skip_tokenizer_init": True,
        "incremental_streaming_output": True,
        "custom_sigquit_handler": on_sigquit,
        **options.fields,
        **options.mode.engine_fields,
    }
    if kv_sockets is not None:
        fields["kv_events_config"] = kv_sockets.config()
    if options.metrics:
        fields["enable_metrics"] = True
    if options.mode.disaggregated:
        fields["disaggregation_transfer_backend"] = options.transfer_backend
    if options.mode.has_bootstrap:
        fields["host"] = options.bootstrap_host.strip("[]")
        fields["disaggregation_bootstrap_port"] = options.bootstrap_port
        # What both versions make of "auto": the decode leg and the frontend take the room for the rank.
        fields["load_balance_method"] = "follow_bootstrap_room"
    return fields


def default_fields(options: SglangOptions) -> dict[str, Any]:
    """Fields that Baton sets where SGLang's own default doesn't fit; passed-through flags win."""
    fields: dict[str, Any] = {"log_level": options.log_level}
    if options.spans is not None:
        grpc = options.spans.protocol == "grpc"
        fields["enable_trace"] = True
        fields["otlp_traces_endpoint"] = options.spans.host_and_port if grpc else options.spans.endpoint
    if options.role is Role.EMBEDDING:
        # A pooler sees only the tokens of its forward pass: a mean or the first token's state would be wrong behind a
        # cached prefix, or over chunks.
        fields |= {"disable_radix_cache": True, "chunked_prefill_size": -1}
    if options.device != "cpu":
        return fields
    fields |= {
        "attention_backend": "torch_native",
        "dtype": "float32",
        "page_size": 16,
        # 755 MB for SmolLM2-135M in float32.
        "max_total_tokens": 16384,
        "mem_fraction_static": 0.3,
        "sleep_on_idle": True,
    }
    if options.mode.disaggregated:
        # The overlap scheduler of these roles makes CUDA events.
        fields["disable_overlap_schedule"] = True
        fields["disaggregation_decode_retraction_backup"] = "cpu_tensor"
    return fields


def environment(options: SglangOptions, tmp_dir: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """Variables that SGLang, NIXL and UCX read, for this process and its children. `inherited` wins where it may."""
    backstop = str(max(1, int(options.backstop_timeout_s)))
    forced = {
        "TMPDIR": str(tmp_dir),
        # A dead scheduler must not cost 5 s of stack dumps before the host hears of it.
        "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
        # On the nodes behind the first the launch would otherwise never return.
        "SGLANG_BLOCK_NONZERO_RANK_CHILDREN": "0",
        "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": backstop,
        "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": backstop,
        GONE_WRITER_TIMEOUT: str(options.gone_writer_timeout_s),
        # Log probabilities of one distribution, whatever the temperature is: what the contract says.
        "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
    }
    defaults = {
        # Polls of 5 ms or one step each: a backstop behind the trial of every grammar.
        "SGLANG_GRAMMAR_MAX_POLL_ITERATIONS": "2000",
        # SGLang's shortest: a replaced prefill is forgotten after one missed heartbeat.
        "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "2.0",
        "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": "1",
        # These caches follow TMPDIR and are to outlive this process.
        "TORCHINDUCTOR_CACHE_DIR": str(
            Path(inherited.get("TMPDIR") or options.tmp_root) / f"torchinductor_{getpass.getuser()}"
        ),
    }
    if options.spans is not None:
        # Above 2 each decoded token is a span.
        defaults["SGLANG_TRACE_LEVEL"] = "2"
        forced["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = options.spans.protocol  # SGLang doesn't read the general one
    if options.log_level.lower() not in ("debug", "info"):
        defaults["NIXL_LOG_LEVEL"] = "WARN"  # it writes to stdout
    if Path(options.model_path).exists():
        defaults["HF_HUB_OFFLINE"] = "1"
    if options.transfer_host:
        forced["SGLANG_HOST_IP"] = options.transfer_host.strip("[]")
    if options.device == "cpu":
        forced["SGLANG_USE_CPU_ENGINE"] = "1"
        # UCX hooks mmap for GPU memory; without them an agent starts in 20 ms instead of 420.
        defaults["UCX_MEM_MMAP_HOOK_MODE"] = "none"
        # The first request with a temperature would otherwise wait 15 s for a C++ compiler, and every other with it.
        defaults["TORCH_COMPILE_DISABLE"] = "1"
        rest = inherited.get("PYTHONPATH", "").split(os.pathsep)
        forced["PYTHONPATH"] = os.pathsep.join([str(CPU_STANDINS), *(part for part in rest if part)])
    return {**{name: value for name, value in defaults.items() if name not in inherited}, **forced}


def apply_environment(options: SglangOptions, tmp_dir: Path, target: MutableMapping[str, str]) -> None:
    """Set `environment` in `target` and make this process use the temporary folder from now on."""
    target.update(environment(options, tmp_dir, dict(target)))
    tempfile.tempdir = None


def prepare_import_path(device: Literal["cpu", "cuda"]) -> None:
    """Put the stand-ins on `sys.path` for a CPU engine. Raises RuntimeError where a GPU engine could import them."""
    if device == "cpu":
        if str(CPU_STANDINS) not in sys.path:
            sys.path.insert(0, str(CPU_STANDINS))
        return
    for name in ("sgl_kernel", "torchvision"):
        module = sys.modules.get(name)
        origin = getattr(module, "__file__", None) if module else getattr(find_spec(name), "origin", None)
        if origin is not None and Path(origin).resolve().is_relative_to(CPU_STANDINS.resolve()):
            raise RuntimeError(
                f"{name} would be imported from {CPU_STANDINS}, the stand-ins for machines without a GPU: "
                "take that folder off PYTHONPATH and sys.path before starting an engine on cuda"
            )


class TmpDir:
    """A private folder short enough for SGLang's sockets, locked while its owner lives.

    The lock lets the next worker remove the folders of those that were killed.
    """

    def __init__(self, root: Path) -> None:
        """Raises RuntimeError when `root` is too long."""
        length = len(os.fsencode(root)) + len(f"/{_TMP_PREFIX}12345678") + len("/tmp12345678")
        if length > _IPC_PATH_LIMIT:
            raise RuntimeError(f"{root} is too long for socket paths ({length} of {_IPC_PATH_LIMIT} bytes)")
        self.path = Path(tempfile.mkdtemp(prefix=_TMP_PREFIX, dir=root))
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Delete the folder with everything in it. Once."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_stale_tmp_dirs(root: Path) -> None:
    """Delete the folders below `root` whose owners are gone; those of the last minute may not be locked yet."""
    for folder in root.glob(f"{_TMP_PREFIX}????????"):
        try:
            if time.time() - folder.stat().st_mtime < _TMP_SETTLING_S:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # another user's, or just removed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
