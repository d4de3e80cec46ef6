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
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.bare import BareAggregated, BareEngine, BarePair
from benchmarks.gpu.load import Load, run
from benchmarks.gpu.systems import Baton, System
from kvbaton.client import Client
from services.tools.bench.results import Results
from services.tools.bench.samples import Kind
from services.tools.bench.statistics import Distribution
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
    loads = QUICK if parsed.quick else LOADS
    async with contextlib.AsyncExitStack() as stack:
        systems: list[System] = []
        for name in parsed.systems.split(","):
            began = time.monotonic()
            systems.append(await stack.enter_async_context(_started(name, parsed, out, len(systems))))
            print(f"{name}: up after {time.monotonic() - began:.0f} s", flush=True)
        for system in systems:
            for load in loads:  # every shape of batch once
                warm = Load(load.input_tokens, 4, requests=2 if not load.rate else 8, concurrency=load.concurrency or 8)
                await run(warm, system, "warm-up")
        collected: dict[tuple[str, str], list[Results]] = {}
        for number in range(parsed.rounds):
            for load in loads:
                for system in systems if number % 2 == 0 else reversed(systems):
                    results = await run(load, system, f"round {number}")
                    collected.setdefault((load.name, system.name), []).append(results)
                    for outcome, example in results.examples.items():
                        print(f"{system.name} {load.name}: {outcome}: {example}", flush=True)
    rows = [_row(load, system, results) for (load, system), results in collected.items()]
    (out / "bench.json").write_text(json.dumps({"host": platform.node(), "rows": rows}, indent=1))
    print(_table(rows))
    return 1 if any(row["failed"] for row in rows) else 0


@contextlib.asynccontextmanager
async def _started(name: str, parsed: argparse.Namespace, out: Path, position: int) -> AsyncGenerator[System]:
    # Each engine takes its share of what those before it have left.
    fraction = ["--mem-fraction-static", f"{0.4 + 0.2 * position:g}"]
    flags = [*(parsed.native_args or GPU_FLAGS), *(fraction if parsed.device == "cuda" else [])]
    async with contextlib.AsyncExitStack() as stack:
        if name in ("baton", "baton-agg"):
            yield await _baton(name, parsed, out, flags, stack)
        else:
            yield await _bare(name, parsed, out, flags, stack)


async def _baton(
    name: str, parsed: argparse.Namespace, out: Path, flags: Sequence[str], stack: contextlib.AsyncExitStack
) -> System:
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
    return Baton(name, await stack.enter_async_context(Client(cluster.grpc_endpoint)))


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


def _row(load: str, system: str, rounds: list[Results]) -> dict[str, Any]:
    """Milliseconds; the median round's percentiles, all rounds' counts."""

    def middle(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    def percentile(distribution: Distribution, share: int) -> float:
        return distribution.percentiles[{50: 0, 99: 3}[share]] * 1e3

    finished = [each.count(Kind.FINISHED) for each in rounds]
    return {
        "load": load,
        "system": system,
        "rounds": len(rounds),
        "finished": sum(finished),
        "failed": sum(map(len, rounds)) - sum(finished),
        "requests_per_second": middle([n / each.elapsed for n, each in zip(finished, rounds, strict=True)]),
        "goodput_share": sum(each.good for each in rounds) / max(1, sum(finished)),
        **{
            f"{metric}_p{share}_ms": middle([percentile(each.latency(metric), share) for each in rounds])
            for metric in ("ttft", "itl")
            for share in (50, 99)
        },
    }


def _table(rows: list[dict[str, Any]]) -> str:
    head = ("load", "system", "req/s", "TTFT p50", "p99", "ITL p50", "p99", "good", "failed")
    form = "{:<16} {:<10} {:>7} {:>9} {:>9} {:>8} {:>8} {:>5} {:>6}"
    lines = [form.format(*head)]
    lines += [
        form.format(
            row["load"],
            row["system"],
            *(f"{row[name]:.1f}" for name in ("requests_per_second", "ttft_p50_ms", "ttft_p99_ms")),
            *(f"{row[name]:.2f}" for name in ("itl_p50_ms", "itl_p99_ms", "goodput_share")),
            row["failed"],
        )
        for row in sorted(rows, key=lambda row: row["load"])
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--systems", default="baton,bare", help="of baton, bare, baton-agg, bare-agg, in this order")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two small loads, to see that it runs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--frontend-env", action="append", default=[], help="NAME=VALUE for Baton's frontend")
    parser.add_argument("native_args", nargs="*", help="behind --: SGLang's flags instead of those for two GPUs")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sys.exit(asyncio.run(main(arguments)))
