"""Runs one stage: common flags, engines' flags behind `--`, one JSON file, one archive of logs, a short table last."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import io
import os
import platform
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.launch import GPU_FLAGS, MODEL, Setup
from benchmarks.gpu.outcome import LIMIT, Outcome
from benchmarks.gpu.transfers import gpu_names
from services.models.smollm2 import NAME

STAGES = ("smoke", "parity", "ranks", "faults", "bench", "timeline")
# Of one log file in the archive, from its end.
_LOG_BYTES = 4 << 20


def main() -> int:
    """The exit status: 1 when something that was promised didn't hold."""
    parsed = _parse()
    out: Path = parsed.out.resolve()
    logs = out.parent / f"{out.name}-logs" / parsed.stage
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    flags = tuple(parsed.native_args) or (GPU_FLAGS if parsed.device == "cuda" else ())
    setup = Setup(logs, parsed.model or (str(MODEL) if parsed.device == "cuda" else NAME), parsed.device, flags)
    about = {
        "when": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "command": sys.argv[1:],
        "host": platform.node(),
        "gpus": gpu_names(),
        "device": parsed.device,
        "quick": parsed.quick,
        "simulated": setup.simulated,
        "flags": list(flags),
    }
    outcome = Outcome(parsed.stage, parsed.limit)
    outcome.keep = lambda: outcome.write(out / f"{parsed.stage}.json", **about)
    module = importlib.import_module(f"benchmarks.gpu.{parsed.stage}")
    try:
        asyncio.run(_until_told(module.run(parsed, setup, outcome)))
    except asyncio.CancelledError:
        outcome.check("stage", False, "ended by SIGTERM")
    finally:
        outcome.keep()
        _archive(logs, out / f"{parsed.stage}-logs.tar.gz")
        print(outcome.text(), flush=True)
    return 0 if outcome.ok else 1


async def _until_told(work: Coroutine[Any, Any, None]) -> None:
    """SIGTERM, as of `timeout`, ends the stage and what it has started, and the results are kept."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await work


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    for name in STAGES:
        module = importlib.import_module(f"benchmarks.gpu.{name}")
        stage = stages.add_parser(name, description=module.__doc__)
        stage.add_argument("--out", type=Path, required=True, help="folder for the results; logs go beside it")
        stage.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        stage.add_argument("--quick", action="store_true", help="as little as shows that it runs")
        stage.add_argument("--model", default="", help="a folder or smollm2; by default the shape of Qwen3-8B on GPUs")
        stage.add_argument("--limit", type=float, default=LIMIT, help="seconds after which nothing more is begun")
        if hasattr(module, "add_flags"):
            module.add_flags(stage)
        stage.add_argument("native_args", nargs="*", help="behind --: SGLang's flags instead of those for two GPUs")
    return parser.parse_args()


def _archive(logs: Path, path: Path) -> None:
    """One file instead of many: the GPU host gives few files back."""

    top = path.name.removesuffix(".tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        for file in sorted(logs.rglob("*")):
            if not file.is_file() or file.is_symlink():
                continue
            with file.open("rb") as log:
                log.seek(-min(_LOG_BYTES, file.stat().st_size), os.SEEK_END)
                end = log.read(_LOG_BYTES)
            member = tarfile.TarInfo(f"{top}/{file.relative_to(logs)}")
            member.size, member.mtime = len(end), int(file.stat().st_mtime)
            archive.addfile(member, io.BytesIO(end))


if __name__ == "__main__":
    sys.exit(main())
