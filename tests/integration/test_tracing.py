"""One trace through client, frontend, both legs and their engines, seen by an OTLP receiver."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import httpx
import pytest
import pytest_asyncio

from kvbaton.client import Client, SamplingParams
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import generate_pb2, session_pb2, session_pb2_grpc
from services.requests import Role
from services.telemetry import tracing
from tests.support.cluster import FakeCluster, HostedWorker
from tests.support.fake_engine import Behaviour
from tests.support.processes import Processes, all_routable
from tests.support.spans import ReceivedSpan, SpanReceiver
from tests.support.waiting import eventually

TRACE_ID = "a" * 32
CLIENT = {"traceparent": f"00-{TRACE_ID}-{'b' * 16}-01", "tracestate": "vendor=1"}
GREEDY = SamplingParams(max_new_tokens=5, temperature=0)


@pytest.fixture(params=["streams", "session"])
def link(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest_asyncio.fixture
async def receiver() -> AsyncIterator[SpanReceiver]:
    async with SpanReceiver() as receiver:
        yield receiver


@pytest_asyncio.fixture
async def spans(receiver: SpanReceiver, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SpanReceiver]:
    """The test's own process exports spans."""
    for name, value in receiver.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracing, "_tracer", tracing._tracer)
    flush = tracing.configure_tracing(enabled=True, service="test")
    yield receiver
    await asyncio.to_thread(flush)


async def ended(receiver: SpanReceiver, requests: int = 1) -> list[ReceivedSpan]:
    """The requests' spans, once they are there."""
    await eventually(lambda: len(receiver.named("kvbaton.request")) >= requests, what="the requests' spans")
    return receiver.named("kvbaton.request")


# In one process


async def test_a_disaggregated_request_is_one_trace_down_to_the_engines(
    cluster: FakeCluster, spans: SpanReceiver
) -> None:
    prefill, decode = await cluster.start_pair()
    answer = await cluster.client.generate(token_ids=[1, 2, 3], sampling=GREEDY, trace_headers=CLIENT, request_id="r1")
    (request,) = await ended(spans)
    await eventually(lambda: len(spans.named("kvbaton.leg")) == 2, what="the legs' spans")
    (attempt,) = spans.named("kvbaton.attempt")
    legs = {leg.attributes["kvbaton.role"]: leg for leg in spans.named("kvbaton.leg")}

    assert {span.trace_id for span in spans.spans} == {TRACE_ID}
    assert request.parent_id == "b" * 16
    assert attempt.parent_id == request.span_id
    assert {leg.parent_id for leg in legs.values()} == {attempt.span_id}
    assert (request.kind, attempt.kind, legs["decode"].kind) == ("SERVER", "CLIENT", "SERVER")
    for worker, leg in ((prefill, legs["prefill"]), (decode, legs["decode"])):
        (seen,) = worker.engine.seen
        assert seen.trace_headers == {"traceparent": leg.traceparent, "tracestate": "vendor=1"}

    told = request.attributes
    assert (told["kvbaton.request_id"], told["gen_ai.request.model"]) == ("r1", "fake-model")
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (3, 5)
    assert (told["kvbaton.outcome"], told["gen_ai.response.finish_reasons"]) == ("finished", ["length"])
    workers = (answer.finished.prefill_worker, answer.finished.decode_worker)
    assert (told["kvbaton.prefill.worker"], told["kvbaton.decode.worker"]) == workers
    assert {name for name in told if name.endswith("_s")} == {
        f"kvbaton.{phase}_s" for phase in ("queue", "routing", "prefill", "transfer", "decode")
    }
    assert {attempt.attributes["kvbaton.room"]} == {leg.attributes["kvbaton.room"] for leg in legs.values()}
    assert legs["decode"].events == ["accepted", "first token"]
    assert not any(span.failed for span in spans.spans)


async def test_an_attempt_that_failed_stands_beside_the_one_that_answered(
    cluster: FakeCluster, spans: SpanReceiver
) -> None:
    bad = await cluster.start_worker(Role.AGGREGATED, Behaviour(abort_message="out of memory"))
    await cluster.routable(1)
    asking = asyncio.create_task(cluster.client.generate(token_ids=[1], sampling=GREEDY))
    await eventually(lambda: bad.engine.seen, what="the first attempt")
    await cluster.start_worker(Role.AGGREGATED)
    await cluster.routable(2)
    with pytest.raises(RequestError):
        await asking  # nobody was left to try when it failed
    await asyncio.gather(*(cluster.client.generate(token_ids=[1], sampling=GREEDY) for _ in range(4)))
    requests = await ended(spans, 5)
    refused = next(request for request in requests if request.failed)
    assert "out of memory" in refused.error
    assert refused.attributes["error.type"] == Reason.ENGINE_ABORTED
    repeated = [
        [attempt for attempt in spans.named("kvbaton.attempt") if attempt.parent_id == request.span_id]
        for request in requests
        if not request.failed
    ]
    first, second = next(attempts for attempts in repeated if len(attempts) == 2)
    assert sorted((first.failed, second.failed)) == [False, True]


async def test_a_refused_request_says_why(cluster: FakeCluster, spans: SpanReceiver) -> None:
    await cluster.start_pair()
    with pytest.raises(RequestError):
        await cluster.client.generate(token_ids=[1], model="nobody's", trace_headers=CLIENT)
    (request,) = await ended(spans)
    assert (request.failed, request.attributes["error.type"]) == (True, Reason.MODEL_NOT_FOUND)
    assert request.attributes["gen_ai.request.model"] == "", "what clients make up is no label"


async def test_a_cancelled_request_is_no_error(cluster: FakeCluster, spans: SpanReceiver) -> None:
    worker = await cluster.start_worker(Role.AGGREGATED, Behaviour(hang=True))
    await cluster.routable(1)
    asking = asyncio.create_task(cluster.client.generate(token_ids=[1], sampling=GREEDY))
    await eventually(lambda: worker.engine.seen, what="the leg")
    asking.cancel()
    (request,) = await ended(spans)
    await eventually(lambda: spans.named("kvbaton.leg"), what="the leg's span")
    (leg,) = spans.named("kvbaton.leg")
    for span in (request, leg):
        assert (span.failed, span.attributes["kvbaton.outcome"]) == (False, "CANCELLED")


async def test_probes_make_no_spans(cluster: FakeCluster, spans: SpanReceiver) -> None:
    await cluster.start_pair()
    await cluster.client.probe()
    await cluster.client.generate(token_ids=[1], sampling=GREEDY, trace_headers=CLIENT)
    await ended(spans)
    await eventually(lambda: len(spans.named("kvbaton.leg")) == 2, what="the legs' spans")
    assert {span.trace_id for span in spans.spans} == {TRACE_ID}


async def test_without_export_the_engines_get_the_clients_context(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    await cluster.client.generate(token_ids=[1], sampling=GREEDY, trace_headers=CLIENT)
    await cluster.client.generate(token_ids=[1], sampling=GREEDY)
    for worker in (prefill, decode):
        assert [request.trace_headers for request in worker.engine.seen] == [CLIENT, {}]


async def test_a_leg_with_other_headers_is_refused_alone(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.PREFILL)
    await cluster.routable(1)
    errors: dict[int, bytes] = {}
    async with grpc.aio.insecure_channel(worker.endpoint) as channel:
        call = session_pb2_grpc.WorkerSessionServiceStub(channel).Connect()
        await call.write(_opening(worker))
        for leg, name in ((1, "authorization"), (2, "traceparent")):
            submit = session_pb2.SubmitLeg(leg=leg, request=generate_pb2.GenerateRequest(), trace_headers={name: "x"})
            await call.write(session_pb2.ConnectRequest(submits=[submit]))
        async with asyncio.timeout(10):
            while len(errors) < 2:
                response = await call.read()
                assert isinstance(response, session_pb2.ConnectResponse)
                errors |= {update.leg: update.error for update in response.updates if update.error}
    assert b"'authorization' is not one of traceparent, tracestate" in errors[1]
    assert b"token_ids" in errors[2]


def _opening(worker: HostedWorker) -> session_pb2.ConnectRequest:
    return session_pb2.ConnectRequest(open=session_pb2.OpenSession(incarnation=worker.host.incarnation))


# As processes


async def test_processes_tell_one_trace_under_their_own_names_and_log_its_id(
    etcd_endpoint: str, tmp_path: Path, link: str, receiver: SpanReceiver
) -> None:
    processes = Processes(etcd_endpoint, tmp_path, receiver.environment)
    processes.frontend("--enable-otel", "--link", link, "--log-format", "json")
    processes.worker("prefill", "prefill", "--enable-otel")
    processes.worker("decode", "decode", "--enable-otel")
    try:
        async with Client(processes.target, timeout=20) as client:
            await all_routable(client, 2)
            await client.probe()  # proves the pair too
        async with httpx.AsyncClient(trust_env=False) as http:
            body = {"model": "no-model", "prompt": [1, 2, 3], "max_tokens": 4}
            url = f"http://127.0.0.1:{processes.http_port}/v1/completions"
            (await http.post(url, json=body, headers=CLIENT)).raise_for_status()
        await eventually(lambda: len(receiver.spans) >= 4, what="four spans")
    finally:
        await asyncio.to_thread(processes.stop)
    services = sorted((span.service, span.name) for span in receiver.spans)
    assert services == [
        ("kvbaton-frontend", "kvbaton.attempt"),
        ("kvbaton-frontend", "kvbaton.request"),
        ("kvbaton-worker-decode", "kvbaton.leg"),
        ("kvbaton-worker-prefill", "kvbaton.leg"),
    ]
    assert {span.trace_id for span in receiver.spans} == {TRACE_ID}
    (line,) = [line for line in processes.log("frontend").splitlines() if TRACE_ID in line]
    assert '"event": "request ended"' in line


async def test_what_has_not_been_sent_is_flushed_when_a_process_ends(
    etcd_endpoint: str, tmp_path: Path, receiver: SpanReceiver
) -> None:
    never = {"OTEL_BSP_SCHEDULE_DELAY": "600000"}
    processes = Processes(etcd_endpoint, tmp_path, receiver.environment | never)
    processes.frontend("--enable-otel")
    processes.worker("worker", "decode", "--disaggregation-mode", "null", "--enable-otel")
    try:
        async with Client(processes.target, timeout=20) as client:
            await all_routable(client, 1)
            await client.generate(token_ids=[1], sampling=GREEDY, trace_headers=CLIENT)
        assert receiver.spans == []
    finally:
        await asyncio.to_thread(processes.stop)
    services = {(span.service, span.name) for span in receiver.spans}
    assert services >= {("kvbaton-frontend", "kvbaton.request"), ("kvbaton-worker", "kvbaton.leg")}


async def test_a_protocol_that_nobody_speaks_ends_a_process_with_the_variables_name(
    etcd_endpoint: str, tmp_path: Path
) -> None:
    processes = Processes(etcd_endpoint, tmp_path, {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"})
    processes.frontend("--enable-otel")
    processes.worker("decode", "decode", "--enable-otel")
    try:
        for name in ("frontend", "decode"):
            assert await asyncio.to_thread(processes.processes[name].wait, 30) == 1
            assert "OTEL_EXPORTER_OTLP_PROTOCOL: 'http/json'" in processes.log(name)
    finally:
        await asyncio.to_thread(processes.stop)
