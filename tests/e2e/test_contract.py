"""Everything typed: grpcurl, health, refusals that reach no engine, two hand-made legs, NIXL's own bytes."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvbaton.client import SamplingParams
from kvbaton.errors import RequestError
from kvbaton.v1 import generate_pb2, generate_pb2_grpc
from tests.e2e.conftest import Pair
from tests.e2e.telemetry import sample, settled
from tests.support.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]


async def grpcurl(*arguments: str) -> str:
    binary = shutil.which("grpcurl", path=str(Path(sys.executable).parent)) or shutil.which("grpcurl")
    assert binary is not None, "grpcurl is not installed"
    process = await asyncio.create_subprocess_exec(
        binary, "-plaintext", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, error = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, error.decode()
    return out.decode()


def messages(output: str) -> list[dict[str, Any]]:
    """grpcurl prints the messages of a stream one after the other."""
    decoder, found, rest = json.JSONDecoder(), [], output.strip()
    while rest:
        message, end = decoder.raw_decode(rest)
        found.append(message)
        rest = rest[end:].lstrip()
    return found


async def test_grpcurl_lists_and_generates(pair: Pair) -> None:
    listed = (await grpcurl(pair.cluster.grpc_endpoint, "list")).split()
    assert {"kvbaton.v1.GenerateService", "kvbaton.v1.HealthService", "kvbaton.v1.ModelService"} <= set(listed)
    request = json.dumps({"text": "The capital of France is", "sampling": {"max_new_tokens": 4, "temperature": 0}})
    answer = messages(await grpcurl("-d", request, pair.cluster.grpc_endpoint, "kvbaton.v1.GenerateService/Generate"))
    assert "".join(message.get("text", "") for message in answer).startswith(" Paris")
    assert answer[-1]["finished"]["reason"] == "FINISH_REASON_LENGTH"


async def test_two_grpcurl_calls_with_one_room_make_decode_answer(pair: Pair) -> None:
    cluster = pair.cluster
    bootstrap = cluster.workers["prefill"].bootstrap
    request = json.dumps(
        {
            "token_ids": {"ids": [504, 3575, 282, 4649, 314]},
            "sampling": {"max_new_tokens": 6, "temperature": 0},
            "bootstrap": {"host": bootstrap.host, "port": bootstrap.port, "room": 4711},
        }
    )
    method = "kvbaton.v1.GenerateService/Generate"
    prefill, decode = await asyncio.gather(
        grpcurl("-d", request, cluster.endpoint("prefill"), method),
        grpcurl("-d", request, cluster.endpoint("decode"), method),
    )
    first = [token for message in messages(prefill) for token in message.get("token_ids", [])]
    tokens = [token for message in messages(decode) for token in message.get("token_ids", [])]
    assert len(first) == 1
    assert len(tokens) == 6
    assert tokens[0] == first[0]


async def test_grpc_health_says_serving(pair: Pair) -> None:
    for endpoint in (pair.cluster.grpc_endpoint, pair.cluster.endpoint("prefill"), pair.cluster.endpoint("decode")):
        for body in ("{}", '{"service": "kvbaton.v1.GenerateService"}'):
            reply = json.loads(await grpcurl("-d", body, endpoint, "grpc.health.v1.Health/Check"))
            assert reply["status"] == "SERVING", (endpoint, body)


BAD_REQUESTS: list[tuple[dict[str, Any], grpc.StatusCode, str]] = [
    ({"token_ids": {"ids": []}}, grpc.StatusCode.INVALID_ARGUMENT, "token_ids"),
    ({"text": ""}, grpc.StatusCode.INVALID_ARGUMENT, "text"),
    ({}, grpc.StatusCode.INVALID_ARGUMENT, "input"),
    ({"token_ids": {"ids": [49152]}}, grpc.StatusCode.INVALID_ARGUMENT, "token_ids"),
    ({"token_ids": {"ids": [5] * 8192}}, grpc.StatusCode.INVALID_ARGUMENT, "token_ids"),
    ({"text": "x", "sampling": {"temperature": -1}}, grpc.StatusCode.INVALID_ARGUMENT, "sampling.temperature"),
    ({"text": "x", "sampling": {"top_p": 0}}, grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p"),
    ({"text": "x", "sampling": {"max_new_tokens": 0}}, grpc.StatusCode.INVALID_ARGUMENT, "sampling.max_new_tokens"),
    ({"text": "x", "model": "unknown"}, grpc.StatusCode.NOT_FOUND, "model"),
]


async def test_bad_input_names_its_field_and_reaches_no_engine(pair: Pair) -> None:
    before = await legs(pair)
    async with grpc.aio.insecure_channel(pair.cluster.grpc_endpoint) as channel:
        for request, code, field in BAD_REQUESTS:
            error = await refused(channel, request)
            assert (error.code, error.field) == (code, field), request
    for worker in ("prefill", "decode"):
        async with grpc.aio.insecure_channel(pair.cluster.endpoint(worker)) as channel:
            token_ids = {"ids": [5]}
            without = await refused(channel, {"token_ids": token_ids})
            assert (without.code, without.field) == (grpc.StatusCode.INVALID_ARGUMENT, "bootstrap")
            room = await refused(channel, {"token_ids": token_ids, "bootstrap": {"host": "h", "port": 1, "room": 0}})
            assert (room.code, room.field) == (grpc.StatusCode.INVALID_ARGUMENT, "bootstrap.room")
    assert await legs(pair) == before


async def legs(pair: Pair) -> float:
    counts = [
        await sample(f"{pair.cluster.system_url(worker)}/metrics", "kvbaton_worker_legs_total")
        for worker in ("prefill", "decode")
    ]
    return sum(counts)


async def refused(channel: grpc.aio.Channel, request: dict[str, Any]) -> RequestError:
    stub = generate_pb2_grpc.GenerateServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(generate_pb2.GenerateRequest(**request), timeout=30):
            pass
    return RequestError.from_rpc_error(caught.value)


async def test_a_live_request_id_is_refused(pair: Pair) -> None:
    async with pair.client() as client:
        sampling = SamplingParams(max_new_tokens=64, temperature=0, ignore_eos=True)
        stream = client.stream(text="One, two,", sampling=sampling, request_id="twice")
        await anext(stream)
        with pytest.raises(RequestError) as caught:
            await client.generate(text="x", sampling=sampling, request_id="twice")
        assert (caught.value.code, caught.value.field) == (grpc.StatusCode.ALREADY_EXISTS, "request_id")
        await stream.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize("length", [40, 320])
async def test_prefill_writes_the_prompts_kv_cache_through_nixl(pair: Pair, length: int) -> None:
    """NIXL's own counter, on the sender's side: every byte of the prompt's KV cache leaves prefill."""
    url = pair.nixl.page
    per_token = pair.cluster.workers["prefill"].runtime.kv_bytes_per_token
    assert per_token == 46_080, "30 layers x 3 KV heads x 64 dimensions x K and V x 4 bytes"
    before = await settled(url, "agent_tx_bytes_total")
    async with pair.client() as client:
        # A prompt that no cache holds: distinct tokens.
        await client.generate(
            token_ids=range(1000 + length, 1000 + 2 * length), sampling=SamplingParams(max_new_tokens=2, temperature=0)
        )

    async def moved() -> float:
        bytes_ = await sample(url, "agent_tx_bytes_total") - before
        return bytes_ if bytes_ >= length * per_token else 0

    sent = await eventually(moved, within=15, what=f"{length * per_token} bytes of KV cache")
    print(f"{length} tokens: {sent:.0f} bytes, {sent / length:.0f} a token")
    assert sent < (length + 16) * per_token + 100_000, "and nothing else"
