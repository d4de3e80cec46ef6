"""Stage `bench`: Baton's pair and bare SGLang's pair on the same two GPUs, the same loads in turn, one table.

Both pairs are up all the time, and an engine without requests leaves its GPU alone. Each round runs every load on one
system and then on the other, in alternating order; the table has the rounds together.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import platform
import re
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.bare import BareAggregated, BareEngine, BarePair
from benchmarks.gpu.load import Load, run
from benchmarks.gpu.rows import Measured, table, write_times
from benchmarks.gpu.systems import Baton, System, Workers
from kvbaton.client import Client
from kvbaton.v1 import worker_pb2
from services.tools.cluster import LocalCluster
from services.tools.options import ClusterOptions

BOOTSTRAP_PORT = 18998
MODEL = Path(__file__).resolve().parents[2] / "tests/gpu/qwen3-8b-shape"
GPU_FLAGS = (
    *("--load-format", "dummy", "--random-seed", "1", "--page-size", "16"),
    *("--attention-backend", "triton", "--sampling-backend", "pytorch"),
    *("--cuda-graph-backend-prefill", "disabled", "--cuda-graph-max-bs-decode", "64"),
    *("--max-total-tokens", "150000"),
)
LOADS = (
    Load(500, 32, requests=16, concurrency=1),
    Load(2000, 32, requests=16, concurrency=1),
    Load(4000, 32, requests=16, concurrency=1),
    Load(8000, 32, requests=8, concurrency=1),
    Load(500, 128, requests=160, concurrency=32),
    Load(2000, 128, requests=128, concurrency=32),
    Load(4000, 32, requests=96, concurrency=32),
    Load(2000, 128, requests=100, rate=8.0),
)
QUICK = (Load(64, 8, requests=4, concurrency=1), Load(64, 8, requests=12, concurrency=4))


async def main(parsed: argparse.Namespace) -> int:
    """The exit status: 1 when a request failed."""
    out: Path = parsed.out
    loads = [load for load in (QUICK if parsed.quick else LOADS) if re.search(parsed.loads, load.name)]
    async with contextlib.AsyncExitStack() as stack:
        systems: list[System] = []
        for name in parsed.systems.split(","):
            began = time.monotonic()
            systems += await stack.enter_async_context(_started(name, parsed, out, len(systems)))
            print(f"{name}: up after {time.monotonic() - began:.0f} s", flush=True)
        # Two ways to the same engines: the second one would find the first one's prompts in the prefix cache.
        shared = {"workers": " again"}
        for system in systems:
            for load in loads:  # every shape of batch once
                warm = Load(load.input_tokens, 4, requests=2 if not load.rate else 8, concurrency=load.concurrency or 8)
                await run(warm, system, "warm-up")
        measured = {(load.name, each.name): Measured(load.name, each.name) for load in loads for each in systems}
        for number in range(parsed.rounds):
            for load in loads:
                for system in systems if number % 2 == 0 else reversed(systems):
                    turn = await run(load, system, f"round {number}{shared.get(system.name, '')}")
                    measured[load.name, system.name].rounds.append(turn)
                    for outcome, example in turn.results.examples.items():
                        print(f"{system.name} {load.name}: {outcome}: {example}", flush=True)
    rows = [each.row() for each in measured.values()]
    write_times(list(measured.values()), out / "times.json.gz")
    (out / "bench.json").write_text(json.dumps({"host": platform.node(), "rows": rows}, indent=1))
    print(table(rows))
    return 1 if any(row["failed"] for row in rows) else 0


@contextlib.asynccontextmanager
async def _started(name: str, parsed: argparse.Namespace, out: Path, position: int) -> AsyncGenerator[list[System]]:
    # Each engine takes its share of what those before it have left.
    fraction = ["--mem-fraction-static", f"{0.4 + 0.2 * position:g}"]
    flags = [*(parsed.native_args or GPU_FLAGS), *(fraction if parsed.device == "cuda" else [])]
    async with contextlib.AsyncExitStack() as stack:
        if name in ("baton", "baton-agg"):
            yield await _baton(name, parsed, out, flags, stack)
        else:
            yield [await _bare(name, parsed, out, flags, stack)]


async def _baton(
    name: str, parsed: argparse.Namespace, out: Path, flags: Sequence[str], stack: contextlib.AsyncExitStack
) -> list[System]:
    options = ClusterOptions(
        mode="agg" if name == "baton-agg" else "disagg",
        model_path=str(parsed.model),
        device=parsed.device,
        grpc_port=0,
        http_port=0,
        state_dir=out / name,
        ready_timeout=420.0,
        native_args=tuple(flags),
        decode_workers=2 if name == "baton-agg" else 1,
        env={"frontend": dict(pair.split("=", 1) for pair in parsed.frontend_env)},
    )
    cluster = await stack.enter_async_context(LocalCluster(options))
    systems: list[System] = [Baton(name, await stack.enter_async_context(Client(cluster.grpc_endpoint)))]
    if parsed.workers and name == "baton":
        systems.append(await _workers(cluster, stack))
    return systems


async def _workers(cluster: LocalCluster, stack: contextlib.AsyncExitStack) -> Workers:
    """The same engines without the frontend."""
    clients = {
        record.role: await stack.enter_async_context(Client(record.grpc_endpoint))
        for record in cluster.workers.values()
    }
    bootstrap = next(each.bootstrap for each in cluster.workers.values() if each.HasField("bootstrap"))
    return Workers(
        "workers", clients[worker_pb2.WORKER_ROLE_PREFILL], clients[worker_pb2.WORKER_ROLE_DECODE], bootstrap
    )


async def _bare(
    name: str, parsed: argparse.Namespace, out: Path, flags: Sequence[str], stack: contextlib.AsyncExitStack
) -> System:
    folder = out / name
    folder.mkdir(exist_ok=True)
    common = ["--model-path", str(parsed.model), "--device", parsed.device, *flags]
    gpus = [0, 1] if parsed.device == "cuda" else [None, None]

    async def engine(label: str, gpu: int | None, *own: str) -> BareEngine:
        started = BareEngine(label, folder)
        stack.push_async_callback(started.stop)
        await started.start([*common, *own], gpu=gpu)
        return started

    if name == "bare-agg":
        return BareAggregated(name, await asyncio.gather(engine("agg-0", gpus[0]), engine("agg-1", gpus[1])))
    pair = ["--disaggregation-transfer-backend", "nixl", "--disaggregation-bootstrap-port", str(BOOTSTRAP_PORT)]
    prefill, decode = await asyncio.gather(
        engine("prefill", gpus[0], "--disaggregation-mode", "prefill", "--host", "127.0.0.1", *pair),
        engine("decode", gpus[1], "--disaggregation-mode", "decode", "--host", "127.0.0.1", *pair),
    )
    return BarePair(name, prefill, decode, BOOTSTRAP_PORT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--systems", default="baton,bare", help="of baton, bare, baton-agg, bare-agg, in this order")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--loads", default="", help="only those whose names this regular expression is found in")
    parser.add_argument("--workers", action="store_true", help="also Baton's workers, asked without the frontend")
    parser.add_argument("--quick", action="store_true", help="two small loads, to see that it runs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--frontend-env", action="append", default=[], help="NAME=VALUE for Baton's frontend")
    parser.add_argument("native_args", nargs="*", help="behind --: SGLang's flags instead of those for two GPUs")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sys.exit(asyncio.run(main(arguments)))
