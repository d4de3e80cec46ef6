"""The real thing, once per session: SGLang aggregated, then embedding, then two prefill workers and a decode worker
behind the kv-aware policy, one of which makes room for a second decode worker before workers are killed, then a prefill
and a decode worker with NIXL between them.

The aggregated worker answers what the pair is compared with, the embedding worker embeds the same prompts, and all are
gone before the pair starts: two engines at a time is what two cores carry, three where most of them idle.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
import pytest_asyncio

from benchmarks.gpu.transfers import NixlTelemetry
from kvbaton.client import Client, Embeddings, SamplingParams
from kvbaton.errors import RequestError
from kvbaton.v1 import generate_pb2, generate_pb2_grpc, health_pb2
from services.models.resolve import resolve_model_path
from services.tools.cluster import LocalCluster
from services.tools.options import ClusterOptions
from tests.e2e.failover import Failover, fail_over
from tests.e2e.lost_prefill import CHUNK, LostPrefill, ask_undisturbed, lose_prefill
from tests.e2e.reference import NEW_TOKENS, PROMPT_LENGTHS, Reference, make_prompts
from tests.e2e.sampling_cases import Given, ask_all_cases
from tests.e2e.telemetry import sample
from tests.support.etcd import etcd_endpoint
from tests.support.kv_view import KvView
from tests.support.ports import free_port
from tests.support.processes import Processes, all_routable
from tests.support.waiting import eventually

__all__ = ["etcd_endpoint"]

# Small chunks, so that the longer prompts are prefilled in several.
NATIVE_ARGS = ("--chunked-prefill-size", "128")
AT_ONCE = 6
# Tokens. SGLang sets 512 aside for each request that runs.
SMALL_POOL = 4096
TEXTS = ("The capital of France is Paris.", "Paris is the capital of France.", "Rust never sleeps: 橋は閉鎖された。 🐶")


@dataclass(frozen=True)
class Answers:
    """Greedy tokens by prompt length, sent one at a time and six at once."""

    alone: dict[int, list[int]]
    at_once: dict[int, list[int]]


@dataclass(frozen=True)
class Aggregated:
    """What the aggregated worker answered, and what it told of itself: pages to a subscriber who followed from the
    beginning and to one who came at the end, and its page of metrics. `sampled` is what grammars and the like gave."""

    answers: Answers
    sampled: dict[str, Given]
    followed: KvView
    at_the_end: KvView
    metrics: str


@dataclass(frozen=True)
class Embedded:
    """What the embedding worker made of the prompts, one at a time and in one request, of texts, and of what it must
    refuse; and its status at the end."""

    alone: dict[int, list[float]]
    together: dict[int, list[float]]
    texts: Embeddings
    generation: RequestError
    dimensions: RequestError
    status: health_pb2.StatusResponse


@dataclass(frozen=True)
class Routed:
    """How requests ended that share a long prefix: the first one, later ones, and one that named the other worker."""

    first: generate_pb2.Finished
    later: list[generate_pb2.Finished]
    elsewhere: generate_pb2.Finished


@dataclass(frozen=True)
class Pair:
    """The disaggregated cluster, and what prefill's NIXL tells of itself."""

    cluster: LocalCluster
    nixl: NixlTelemetry

    def client(self) -> Client:
        """Of the frontend."""
        return Client(self.cluster.grpc_endpoint, timeout=180.0)


@pytest.fixture(scope="session")
def model_path() -> Path:
    return resolve_model_path("smollm2").path


@pytest.fixture(scope="session")
def prompts(model_path: Path) -> dict[int, list[int]]:
    return make_prompts(model_path)


@pytest.fixture(scope="session")
def reference(model_path: Path, prompts: dict[int, list[int]]) -> Reference:
    """transformers on the same weights in float32."""
    return Reference.compute(model_path, prompts)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def aggregated(prompts: dict[int, list[int]], tmp_path_factory: pytest.TempPathFactory) -> Aggregated:
    options = ClusterOptions(
        mode="agg",
        device="cpu",
        grpc_port=0,
        http_port=0,
        state_dir=tmp_path_factory.mktemp("agg"),
        native_args=NATIVE_ARGS,
        env={"aggregated": {"KVBATON_ENABLE_METRICS": "true"}},
    )
    async with LocalCluster(options) as cluster, Client(cluster.grpc_endpoint, timeout=180.0) as client:
        (record,) = cluster.workers.values()
        async with KvView(record.grpc_endpoint) as followed:
            answers = await ask_all(client, prompts)
            async with KvView(record.grpc_endpoint) as at_the_end, httpx.AsyncClient() as http:
                await eventually(lambda: at_the_end.exact and at_the_end.sequence == followed.sequence)
                page = await http.get(f"http://{record.system_endpoint}/metrics", timeout=60.0)
        sampled = await ask_all_cases(cluster.grpc_endpoint)
    return Aggregated(answers, sampled, followed, at_the_end, page.text)


@pytest.fixture(scope="session")
def aggregated_answers(aggregated: Aggregated) -> Answers:
    return aggregated.answers


@pytest.fixture(scope="session")
def sampled_aggregated(aggregated: Aggregated) -> dict[str, Given]:
    return aggregated.sampled


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def embedded(
    etcd_endpoint: str, model_path: Path, prompts: dict[int, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Embedded:
    processes = Processes(etcd_endpoint, tmp_path_factory.mktemp("embedding"))
    try:
        processes.frontend()
        processes.worker("embedding", "decode", "--embedding-worker", sglang=model_path)
        async with (
            Client(processes.target, timeout=180.0) as client,
            Client(processes.grpc_endpoints["embedding"]) as worker,
        ):
            await all_routable(client, 1, within=180)
            alone = {length: (await client.embed([prompt])).vectors[0] for length, prompt in prompts.items()}
            together = await client.embed(prompts.values())
            texts = await client.embed(TEXTS)
            with pytest.raises(RequestError) as generation:
                await worker.generate(token_ids=[1])
            with pytest.raises(RequestError) as dimensions:
                await client.embed([[1]], dimensions=64)
            with pytest.raises(RequestError):
                await client.embed([prompts[900]] * 4, timeout=0.3)
            await eventually(no_live_requests_on(worker), what="a call that was given up is aborted in the engine")
            await client.probe()
            await worker.probe()
            await eventually(no_live_requests_on(worker), what="the engine says that the probes have ended")
            status = await worker.status()
    finally:
        await asyncio.to_thread(processes.stop)
    return Embedded(
        alone,
        dict(zip(prompts, together.vectors, strict=True)),
        texts,
        generation.value,
        dimensions.value,
        status,
    )


@dataclass(frozen=True)
class Failures:
    """Of one cluster: routed by prefix, then with a decode worker killed, then the prefill worker."""

    routed: Routed
    failover: Failover
    lost_prefill: LostPrefill


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def failures(
    etcd_endpoint: str, model_path: Path, prompts: dict[int, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Failures:
    processes = Processes(etcd_endpoint, tmp_path_factory.mktemp("routing"))
    prefix = prompts[900]
    nixl = NixlTelemetry(free_port())
    try:
        # Requests wait for the workers that are started again.
        patience = ("--ready-queue-timeout", "240", "--queue-timeout", "240")
        processes.frontend("--prefill-policy", "kv-aware", "--kv-aware-temperature", "0", *patience)
        for name, command, *flags in (
            ("prefill-0", "prefill", "--chunked-prefill-size", str(CHUNK)),
            ("prefill-1", "prefill"),
            ("decode", "decode"),
        ):
            environment = nixl.env if name == "prefill-0" else {}
            processes.worker(name, command, "--instance-id", name, *flags, sglang=model_path, environment=environment)
        async with Client(processes.target, timeout=180.0) as client:
            await all_routable(client, 3, within=400)
            metrics = f"http://127.0.0.1:{processes.http_port}/metrics"

            async def prefix_is_known() -> bool:
                return await sample(metrics, "kvbaton_kv_index_pages") >= len(prefix) // 16

            first = await ended(processes.target, [*prefix, 1])
            await eventually(prefix_is_known, within=30, what="the prefix in the index")
            later = [await ended(processes.target, [*prefix, 2, number]) for number in range(4)]
            (other,) = {"prefill-0", "prefill-1"} - {first.prefill_worker}
            elsewhere = await ended(processes.target, [*prefix, 3], prefill_worker=other)
            undisturbed = await ask_undisturbed(client, prefill="prefill-1")
            # From here on a prefill and two decode workers.
            processes.signal("prefill-1", signal.SIGTERM)
            await asyncio.to_thread(processes.processes["prefill-1"].wait, 120)
            await all_routable(client, 2)
            processes.worker("decode-1", "decode", "--max-total-tokens", str(SMALL_POOL), sglang=model_path)
            await all_routable(client, 3, within=400)
            failover = await fail_over(processes, client, prompts[33], doomed="decode")
            lost_prefill = await lose_prefill(processes, client, "prefill-0", "decode-1", nixl.page, undisturbed)
    finally:
        await asyncio.to_thread(processes.stop)
    return Failures(Routed(first, later, elsewhere), failover, lost_prefill)


@pytest.fixture(scope="session")
def routed(failures: Failures) -> Routed:
    return failures.routed


@pytest.fixture(scope="session")
def failover(failures: Failures) -> Failover:
    return failures.failover


@pytest.fixture(scope="session")
def lost_prefill(failures: Failures) -> LostPrefill:
    return failures.lost_prefill


async def ended(target: str, token_ids: list[int], *, prefill_worker: str = "") -> generate_pb2.Finished:
    """How a request of four tokens ended."""
    request = generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=token_ids),
        sampling=generate_pb2.SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True),
        prefill_worker=prefill_worker,
    )
    async with grpc.aio.insecure_channel(target) as channel:
        stream = generate_pb2_grpc.GenerateServiceStub(channel).Generate(request, timeout=180)
        return [response.finished async for response in stream][-1]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def pair(
    aggregated_answers: Answers,
    embedded: Embedded,
    routed: Routed,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Pair]:
    nixl = NixlTelemetry(free_port())
    options = ClusterOptions(
        mode="disagg",
        device="cpu",
        grpc_port=0,
        http_port=0,
        state_dir=tmp_path_factory.mktemp("disagg"),
        native_args=NATIVE_ARGS,
        env={"prefill": nixl.env},
    )
    cluster = LocalCluster(options)
    async with cluster:
        yield Pair(cluster, nixl)
    assert cluster.leftovers() == [], "no process and no port is left behind"


def no_live_requests_on(worker: Client) -> Callable[[], Awaitable[bool]]:
    """For `eventually`."""

    async def none() -> bool:
        load = (await worker.status()).load
        return not load.live_requests and not load.used_tokens

    return none


async def ask_all(client: Client, prompts: dict[int, list[int]]) -> Answers:
    """Every prompt alone, then all of them with six in flight."""
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    alone = {
        length: (await client.generate(token_ids=prompts[length], sampling=sampling)).token_ids
        for length in PROMPT_LENGTHS
    }
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(length: int) -> list[int]:
        async with slots:
            return (await client.generate(token_ids=prompts[length], sampling=sampling)).token_ids

    together = await asyncio.gather(*(one(length) for length in PROMPT_LENGTHS))
    return Answers(alone, dict(zip(PROMPT_LENGTHS, together, strict=True)))
