"""The pair on two GPUs against one aggregated worker: greedy tokens for 5, 500 and 4 000 input tokens.

Every process has the same dummy weights (one seed), so equal tokens mean that decode read exactly the KV cache that
prefill wrote. Prints a table, writes smoke.json, exits 1 on a difference. Run it through smoke.sh.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kvbaton.client import Client, SamplingParams
from services.tools.cluster import LocalCluster
from services.tools.options import ClusterOptions

INPUT_TOKENS = (5, 500, 4000)
NEW_TOKENS = 32
MODEL = Path(__file__).parent / "qwen3-8b-shape"
ENGINE_FLAGS = (
    *("--load-format", "dummy", "--random-seed", "1"),
    *("--attention-backend", "triton", "--sampling-backend", "pytorch"),
    *("--mem-fraction-static", "0.85"),
    *("--cuda-graph-backend-prefill", "disabled", "--cuda-graph-max-bs-decode", "64"),
    *("--page-size", "16"),
)


@dataclass
class Run:
    """One mode's answers. Seconds; `first_token` by input length, the best of three."""

    mode: str
    ready: float
    versions: str
    tokens: dict[int, list[int]]
    first_token: dict[int, float]
    features: dict[str, bool]


def model_folder(layers: int | None, scratch: Path) -> Path:
    """The model's shape, with fewer layers if asked."""
    if layers is None:
        return MODEL
    config = json.loads((MODEL / "config.json").read_text())
    config["num_hidden_layers"] = layers
    # As long as the layers it describes.
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    (scratch / "config.json").write_text(json.dumps(config))
    return scratch


async def run(mode: Literal["agg", "disagg"], model: Path, out: Path) -> Run:
    """Starts the cluster, asks every prompt, stops it."""
    options = ClusterOptions(
        mode=mode,
        model_path=str(model),
        device="cuda",
        grpc_port=0,
        http_port=0,
        state_dir=out / mode,
        ready_timeout=420.0,
        native_args=ENGINE_FLAGS,
    )
    started = time.monotonic()
    cluster = LocalCluster(options)
    async with cluster, Client(cluster.grpc_endpoint) as client:
        ready = time.monotonic() - started
        print(f"{mode}: ready after {ready:.0f} s", flush=True)
        (worker, *_) = cluster.workers.values()
        versions = f"sglang {worker.runtime.versions.engine_version}, nixl {worker.runtime.versions.nixl}"
        result = Run(mode, ready, versions, {}, {}, {})
        for length in INPUT_TOKENS:
            result.tokens[length], result.first_token[length] = await ask(client, length)
        result.features = await features(client, (await client.model_info()).eos_token_ids[0])
    left = cluster.leftovers()
    if left:
        raise SystemExit(f"{mode}: left behind: {left}")
    return result


async def ask(client: Client, length: int) -> tuple[list[int], float]:
    """The answer to the fixed prompt of that length, and the best time to first token of three other prompts."""
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    answer = await client.generate(token_ids=prompt(length, 0), sampling=sampling)
    best = float("inf")
    for seed in (1, 2, 3):
        sent = time.monotonic()
        async for _ in client.stream(token_ids=prompt(length, seed), sampling=sampling):
            best = min(best, time.monotonic() - sent)
    return answer.token_ids, best


async def features(client: Client, end: int) -> dict[str, bool]:
    """What SGLang is asked for beside tokens, and whether it came. `end` is the model's end of sequence."""
    ask: dict[str, Any] = {"token_ids": prompt(50, 0)}
    likely = await client.generate(
        **ask, sampling=SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True), logprobs=2
    )
    forced: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0, "logit_bias": {end: 100.0}}
    short = await client.generate(**ask, sampling=SamplingParams(**forced))
    longer = await client.generate(**ask, sampling=SamplingParams(**forced, min_new_tokens=5))
    return {
        "log probabilities": [each.token_id for each in likely.logprobs] == likely.token_ids
        and all(each.logprob == each.top[0].logprob for each in likely.logprobs),
        "logit bias": short.token_ids == [end],
        "minimum length": len(longer.token_ids) >= 5 and end not in longer.token_ids[:4],
    }


def prompt(length: int, seed: int) -> list[int]:
    """Random tokens, the same in every mode."""
    rng = random.Random(1000 * length + seed)
    return [rng.randrange(100, 150_000) for _ in range(length)]


async def compare(layers: int | None, out: Path) -> int:
    """Both modes, the table, the verdict as an exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        model = model_folder(layers, Path(scratch))
        disaggregated = await run("disagg", model, out)
        aggregated = await run("agg", model, out)
    rows: list[dict[str, Any]] = []
    print(f"\n{disaggregated.versions}")
    print(f"{'input tokens':>12}  {'equal':>5}  {'TTFT aggregated':>15}  {'TTFT disaggregated':>18}")
    for length in INPUT_TOKENS:
        equal = aggregated.tokens[length] == disaggregated.tokens[length]
        ttft = aggregated.first_token[length] * 1e3, disaggregated.first_token[length] * 1e3
        print(f"{length:>12}  {'yes' if equal else 'NO':>5}  {ttft[0]:>12.1f} ms  {ttft[1]:>15.1f} ms")
        rows.append({"input_tokens": length, "equal": equal, "ttft_agg_ms": ttft[0], "ttft_disagg_ms": ttft[1]})
    for name, came in disaggregated.features.items():
        print(f"{name}: {'yes' if came and aggregated.features[name] else 'NO'}")
    report = {"rows": rows, "runs": [asdict(aggregated), asdict(disaggregated)]}
    (out / "smoke.json").write_text(json.dumps(report, indent=1))
    features_came = all([*disaggregated.features.values(), *aggregated.features.values()])
    return 0 if features_came and all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int)
    parsed = parser.parse_args()
    sys.exit(asyncio.run(compare(parsed.layers, parsed.out.resolve())))
