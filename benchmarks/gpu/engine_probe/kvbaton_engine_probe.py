"""An SGLang plugin with what benchmarks need inside engines: a probe, and dummy weights whose answers mean something.

SGLang loads it where this folder is on PYTHONPATH (`sglang.srt.plugins` entry point), in 0.5.17 and 0.5.23 alike.

With `$KVBATON_ENGINE_PROBE` it writes down when each request and each NIXL transfer of this process did what. A JSON
object a line goes to `$KVBATON_ENGINE_PROBE/<pid>.jsonl`, times in seconds since the epoch:

    {"event": "posted", "time"}                                       a NIXL write is handed to the backend
    {"event": "written", "time", "bytes", "descriptors", "post_us", "transfer_us"}   SGLang has seen it complete
    {"event": "request", "room", "role", "input_tokens", "cached_tokens", "output_tokens", "times": {...}}

A request's writes are its KV pages, chunk by chunk, and one of about 1 600 bytes with the first token. `times` has what
SGLang's own `SchedulerReqTimeStats` has. Only benchmarks load this: a wrapped call costs some microseconds.

With `$KVBATON_DUMMY_WEIGHTS` it takes the place of SGLang's own for `--load-format dummy`, which are all within 1e-3 of
0, norms too, and the same in every layer: attention then changes nothing that bfloat16 can show, an answer depends on
the prompt's last token alone, and a KV cache of zeros would give it too.
"""

from __future__ import annotations

import json
import os
import threading
import time
import zlib
from pathlib import Path
from typing import Any

_FIELDS = ("transfer_us", "post_us", "bytes", "descriptors")


class Writer:
    """Lines of this process."""

    def __init__(self, folder: Path) -> None:
        self._lock = threading.Lock()
        self._file = (folder / f"{os.getpid()}.jsonl").open("a", encoding="utf-8")

    def write(self, event: str, **fields: Any) -> None:
        """One line."""
        line = json.dumps({"event": event, **fields})
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()


def install() -> None:
    """What SGLang calls in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if os.environ.get("KVBATON_DUMMY_WEIGHTS"):
        HookRegistry.register(
            "sglang.srt.model_loader.weight_utils.initialize_dummy_weights", dummy_weights, HookType.REPLACE
        )
    folder = os.environ.get("KVBATON_ENGINE_PROBE")
    if not folder:
        return
    from nixl._api import nixl_agent

    writer = Writer(Path(folder))
    watch_transfers(nixl_agent, writer)

    def told(result: Any, request: Any, *_: Any, **__: Any) -> Any:
        writer.write("request", **request_line(request))
        return result

    HookRegistry.register("sglang.srt.managers.schedule_batch.Req.log_time_stats", told, HookType.AFTER)
    stats = "sglang.srt.observability.req_time_stats.APIServerReqTimeStats"
    HookRegistry.register(f"{stats}.__getstate__", with_host_times, HookType.AFTER)


def with_host_times(state: dict[str, Any], stats: Any) -> dict[str, Any]:
    """The scheduler hears when the request came to SGLang's host process, and when that sent it on."""
    return {**state, "created_time": stats.created_time, "api_server_dispatch_time": stats.api_server_dispatch_time}


def dummy_weights(model: Any, *_: Any, **__: Any) -> None:
    """Normal with deviation 0.02, norms 1; the same in every process, and others for every parameter.

    A tensor-parallel rank has others too: with the same, its heads could be taken for another rank's.
    """
    import torch

    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    for name, parameter in model.state_dict().items():
        if not torch.is_floating_point(parameter):
            continue
        if "norm" in name:
            parameter.fill_(1.0)
            continue
        generator = torch.Generator(device=parameter.device)
        generator.manual_seed(zlib.crc32(name.encode()) + rank)
        parameter.normal_(0.0, 0.02, generator=generator)


def request_line(request: Any) -> dict[str, Any]:
    """What SGLang has measured of a finished request. `time_stats` are on the clock of perf_counter."""
    stats = request.time_stats
    since_epoch = time.time() - time.perf_counter()
    times = {
        name.removesuffix("_time"): value + since_epoch
        for name, value in vars(stats).items()
        if name.endswith("_time") and isinstance(value, float) and value > 0
    }
    return {
        "room": request.bootstrap_room,
        "role": str(stats.disagg_mode_str()),
        "input_tokens": len(request.origin_input_ids),
        "cached_tokens": request.cached_tokens,
        "output_tokens": len(request.output_ids),
        "times": times,
    }


def watch_transfers(agent: Any, writer: Writer) -> None:
    """Wraps the class's methods. Which request a transfer belongs to is for the reader to say, from the times."""
    begin, post, check = agent.__init__, agent.transfer, agent.check_xfer_state
    live: set[int] = set()

    def capturing(self: Any, name: str, nixl_conf: Any = None, *args: Any, **kwargs: Any) -> None:
        if nixl_conf is not None:
            nixl_conf.capture_telemetry = True
        begin(self, name, nixl_conf, *args, **kwargs)

    def posting(self: Any, handle: Any, *args: Any, **kwargs: Any) -> Any:
        live.add(id(handle))
        writer.write("posted", time=time.time())
        return post(self, handle, *args, **kwargs)

    def checking(self: Any, handle: Any) -> Any:
        state = check(self, handle)
        # Handles are asked until all of a request's are done: only the first time counts.
        if state == "DONE" and id(handle) in live:
            live.discard(id(handle))
            writer.write("written", time=time.time(), **telemetry(self, handle))
        return state

    agent.__init__, agent.transfer, agent.check_xfer_state = capturing, posting, checking


def telemetry(agent: Any, handle: Any) -> dict[str, Any]:
    """NIXL's own numbers of one transfer; none where it has none."""
    try:
        found = agent.get_xfer_telemetry(handle)
    except Exception:  # noqa: BLE001 - telemetry may be off in this build; the transfer must go on
        return {}
    values = (found.xferDuration, found.postDuration, found.totalBytes, found.descCount)
    return {name: _number(value) for name, value in zip(_FIELDS, values, strict=True)}


def _number(value: Any) -> float:
    """Durations come as timedelta or as microseconds."""
    return value.total_seconds() * 1e6 if hasattr(value, "total_seconds") else float(value)
