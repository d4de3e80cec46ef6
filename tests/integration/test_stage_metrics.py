"""Every stage of a request is measured, by model, and so is the time between its tokens."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvbaton.client import ChatMessage, SamplingParams
from kvbaton.errors import RequestError
from kvbaton.v1 import generate_pb2
from services.requests import Role
from tests.support.cluster import FakeCluster, HostedWorker
from tests.support.waiting import eventually


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """Metrics are the process's: every test has its own label."""
    return f"model-{request.node.name}-{time.time_ns()}"


async def pair(cluster: FakeCluster, model: str) -> tuple[HostedWorker, HostedWorker]:
    prefill = await cluster.start_worker(Role.PREFILL, served_model_name=model)
    decode = await cluster.start_worker(Role.DECODE, served_model_name=model)
    await cluster.routable(2)
    return prefill, decode


class Page:
    """What /metrics says of one model."""

    def __init__(self, text: str, model: str) -> None:
        self._samples = [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels.get("model") == model
        ]

    def value(self, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == f"kvbaton_{name}" and labels.items() <= sample.labels.items()
        )


async def page(cluster: FakeCluster, model: str) -> Page:
    await eventually(lambda: cluster.frontend.generation.live_requests == 0)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{cluster.frontend.http_port}") as http:
        return Page((await http.get("/metrics")).text, model)


async def test_every_stage_has_its_seconds(cluster: FakeCluster, model: str) -> None:
    prefill, decode = await pair(cluster, model)
    prefill.engine.behaviour.prefill_seconds = 0.2
    decode.engine.behaviour.token_seconds = 0.02
    params = SamplingParams(max_new_tokens=10, temperature=0)
    await cluster.client.generate(text="abc", sampling=params)
    await cluster.client.generate(chat=[ChatMessage(role="user", content="abc")], sampling=params)
    answer = await cluster.client.generate(token_ids=[5, 6], sampling=params)
    told = await page(cluster, model)
    counts = {
        phase: told.value("phase_seconds_count", phase=phase)
        for phase in ("tokenization", "queue", "routing", "prefill", "transfer", "decode")
    }
    assert counts == {"tokenization": 2, "queue": 3, "routing": 3, "prefill": 3, "transfer": 3, "decode": 3}
    assert told.value("phase_seconds_sum", phase="prefill") >= 0.6
    assert told.value("phase_seconds_sum", phase="decode") >= 3 * 9 * 0.02
    parts = told.value("phase_seconds_sum", phase="tokenization") + told.value("phase_seconds_sum", phase="routing")
    assert 0 < parts <= told.value("phase_seconds_sum", phase="queue")
    assert told.value("request_duration_seconds_count", outcome="finished") == 3
    assert told.value("request_duration_seconds_sum") >= 3 * (0.2 + 9 * 0.02)
    assert told.value("time_to_first_token_seconds_count") == 3
    timings = answer.finished.timings
    assert timings.HasField("routing")
    assert not timings.HasField("tokenization"), "the prompt came as tokens"


async def test_the_gaps_between_tokens_are_those_that_the_client_sees(cluster: FakeCluster, model: str) -> None:
    _, decode = await pair(cluster, model)
    decode.engine.behaviour.token_seconds = 0.03
    params = SamplingParams(max_new_tokens=20, temperature=0)
    stream = cluster.client.stream(token_ids=[5, 6], sampling=params)
    arrivals = [(time.monotonic(), len(chunk.token_ids)) async for chunk in stream]
    told = await page(cluster, model)
    behind_the_first = sum(tokens for _, tokens in arrivals[1:])
    assert told.value("inter_token_latency_seconds_count") == behind_the_first > 15
    seen = arrivals[-1][0] - arrivals[0][0]
    assert told.value("inter_token_latency_seconds_sum") == pytest.approx(seen, rel=0.2)
    assert told.value("inter_token_latency_seconds_bucket", le="0.02") <= 2


async def test_gaps_are_counted_while_the_answer_streams(cluster: FakeCluster, model: str) -> None:
    _, decode = await pair(cluster, model)
    decode.engine.behaviour.token_seconds = 0.02
    running = asyncio.create_task(
        cluster.client.generate(
            token_ids=[5], sampling=SamplingParams(max_new_tokens=200, temperature=0), request_id="mine"
        )
    )

    async def counted() -> bool:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{cluster.frontend.http_port}") as http:
            told = Page((await http.get("/metrics")).text, model)
        return told.value("inter_token_latency_seconds_count") > 3

    await eventually(counted)
    await cluster.client.abort("mine")
    with pytest.raises(RequestError):
        await running
    told = await page(cluster, model)
    assert told.value("request_duration_seconds_count", outcome="CANCELLED") == 1
    assert told.value("requests_total", outcome="CANCELLED") == 1
    assert told.value("phase_seconds_count") == 0, "phases are of finished requests"


async def test_a_request_of_several_choices_is_one_with_all_their_tokens(cluster: FakeCluster, model: str) -> None:
    await pair(cluster, model)
    request = generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=[5, 6, 7]),
        sampling=generate_pb2.SamplingParams(max_new_tokens=4, temperature=0),
        n=3,
    )
    live = await cluster.frontend.generation.submit(request)
    assert sum([len(output.token_ids) async for output in live.outputs()]) == 12
    told = await page(cluster, model)
    assert told.value("requests_total", outcome="finished") == 1
    assert told.value("prompt_tokens_total") == 3
    assert told.value("completion_tokens_total") == 12
    assert told.value("time_to_first_token_seconds_count") == 1
    assert told.value("request_duration_seconds_count") == 1
    assert told.value("phase_seconds_count", phase="prefill") == 3, "each choice goes through the engines"


async def test_text_calls_are_counted_by_outcome(cluster: FakeCluster, model: str) -> None:
    await pair(cluster, model)

    async def counts() -> dict[str, float]:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{cluster.frontend.http_port}") as http:
            families = text_string_to_metric_families((await http.get("/metrics")).text)
        return {
            f"{sample.labels['call']} {sample.labels['outcome']}": sample.value
            for family in families
            for sample in family.samples
            if sample.name == "kvbaton_text_requests_total"
        }

    before = await counts()
    await cluster.client.tokenize(text="abc")
    await cluster.client.detokenize([1, 2])
    with pytest.raises(RequestError):
        await cluster.client.tokenize(text="")
    after = await counts()
    for name in ("Tokenize finished", "Detokenize finished", "Tokenize INVALID_ARGUMENT"):
        assert after[name] - before.get(name, 0) == 1
