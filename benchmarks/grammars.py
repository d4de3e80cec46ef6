"""What a JSON schema adds to the time to the first token, on an aggregated CPU worker.

python -m benchmarks.grammars
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time

import grpc

from kvbaton.v1 import generate_pb2, generate_pb2_grpc
from services.tools.cluster import LocalCluster
from services.tools.options import ClusterOptions

_ROUNDS = 30


def schema(number: int) -> str:
    """An ordinary one that no other number has."""
    properties = {
        f"name{number}": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
    }
    return json.dumps({"type": "object", "properties": properties, "required": [f"name{number}", "age"]})


async def first_token(stub: generate_pb2_grpc.GenerateServiceAsyncStub, json_schema: str | None = None) -> float:
    """Seconds until it came."""
    sampling = generate_pb2.SamplingParams(temperature=0, max_new_tokens=2, json_schema=json_schema)
    started, seconds = time.perf_counter(), 0.0
    async for response in stub.Generate(generate_pb2.GenerateRequest(text="As JSON: ", sampling=sampling), timeout=120):
        if response.token_ids and not seconds:
            seconds = time.perf_counter() - started
    return seconds


async def main() -> None:
    """Prints medians and the best of each kind, in milliseconds."""
    taken: dict[str, list[float]] = {"no grammar": [], "first use of a schema": [], "second use": []}
    options = ClusterOptions(mode="agg", device="cpu", grpc_port=0, http_port=0)
    async with LocalCluster(options) as cluster, grpc.aio.insecure_channel(cluster.grpc_endpoint) as channel:
        stub: generate_pb2_grpc.GenerateServiceAsyncStub = generate_pb2_grpc.GenerateServiceStub(channel)
        await first_token(stub)
        print(f"the first schema of all: {1e3 * await first_token(stub, schema(0)):.0f} ms")
        for number in range(1, _ROUNDS + 1):
            taken["no grammar"].append(await first_token(stub))
            taken["first use of a schema"].append(await first_token(stub, schema(number)))
            taken["second use"].append(await first_token(stub, schema(number)))
    for name, seconds in taken.items():
        print(f"{name}: median {1e3 * statistics.median(seconds):.0f} ms, best {1e3 * min(seconds):.0f} ms")


if __name__ == "__main__":
    asyncio.run(main())
