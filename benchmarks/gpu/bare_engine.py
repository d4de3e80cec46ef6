"""One SGLang engine and nothing else: requests in over a Unix socket, tokens out, a JSON object a line.

This is the side that Baton is compared with: no gRPC, no router, no etcd. The driver posts both legs itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import orjson

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    """Builds the engine from SGLang's own flags, then serves until it is terminated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parsed, native_args = parser.parse_known_args()
    on_cpu = "cpu" in native_args
    if on_cpu:
        _prepare_cpu()
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import prepare_server_args

    engine_class: Any = type("CpuEngine", (Engine,), _cpu_entry_points()) if on_cpu else Engine
    # As in Baton: ids in, ids out, deltas instead of everything again.
    own = ["--skip-tokenizer-init", "--incremental-streaming-output", "--log-level", "warning"]
    engine = engine_class(server_args=prepare_server_args([*native_args, *own]))
    try:
        asyncio.run(serve(engine, parsed.socket))
    finally:
        engine.shutdown()


def _prepare_cpu() -> None:
    """What SGLang needs where there is no GPU: Baton's stand-ins. Only to try the benchmark out."""
    from services.worker.engines.sglang_launch import CPU_STANDINS, prepare_import_path

    path = [str(CPU_STANDINS), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {
        "SGLANG_USE_CPU_ENGINE": "1",
        "UCX_MEM_MMAP_HOOK_MODE": "none",
        "OMP_NUM_THREADS": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "TMPDIR": tempfile.mkdtemp(prefix="kvb-"),
        "PYTHONPATH": os.pathsep.join(path),
    }
    prepare_import_path("cpu")


def _cpu_entry_points() -> dict[str, Any]:
    from services.worker.engines.sglang_child import run_scheduler

    return {"run_scheduler_process_func": staticmethod(run_scheduler)}


async def serve(engine: Any, path: Path) -> None:
    """Until SIGTERM."""
    engine.tokenizer_manager.auto_create_handle_loop()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.TaskGroup() as group:
            while line := await reader.readline():
                group.create_task(answer(engine, orjson.loads(line), writer))
        writer.close()

    server = await asyncio.start_unix_server(connected, path, limit=1 << 24)
    async with server:
        path.with_suffix(".ready").write_text(str(os.getpid()))
        await stop.wait()


async def answer(engine: Any, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """Streams one request's tokens; the last line has `end`."""
    number = request.pop("number")
    try:
        stream = await engine.async_generate(**request, stream=True)
        async for chunk in stream:
            reason = chunk["meta_info"].get("finish_reason")
            tokens = chunk.get("output_ids") or []
            cached = chunk["meta_info"].get("cached_tokens") or 0
            line = {"number": number, "tokens": tokens, "end": reason and reason["type"], "cached": cached}
            writer.write(orjson.dumps(line) + b"\n")
    except Exception as error:  # noqa: BLE001 - the driver raises it
        line = {"number": number, "tokens": [], "end": f"failed: {error}", "cached": 0}
        writer.write(orjson.dumps(line) + b"\n")
    with contextlib.suppress(ConnectionError):
        await writer.drain()


if __name__ == "__main__":
    main()
