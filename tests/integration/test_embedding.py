"""Embeddings through the frontend: each input gets its vector, each refusal names its field, each worker its share."""

from __future__ import annotations

import asyncio
import base64
import uuid
from array import array
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import openai
import pytest
import pytest_asyncio

from kvbaton.client import Client, SamplingParams
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import health_pb2, health_pb2_grpc, worker_pb2
from services.frontend.link.session import SessionLink
from services.requests import Role
from tests.support.cluster import MODEL, FakeCluster
from tests.support.fake_engine import CONTEXT, DIMENSION, VOCABULARY, Behaviour, expected_vector
from tests.support.waiting import eventually

Code = grpc.StatusCode
PROMPT = [5, 6, 7]
TEXT = "Baton"
# In tokens; see FakeEngine.
LONGEST = CONTEXT - 6


@pytest.fixture(params=["streams", "session"])
def link(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def limits() -> dict[str, object]:
    """Flags of the frontend that a test sets."""
    return {}


@pytest_asyncio.fixture
async def cluster(
    etcd_endpoint: str, model_folder: Path, link: str, limits: dict[str, object]
) -> AsyncIterator[FakeCluster]:
    namespace = f"t-{uuid.uuid4().hex[:12]}"
    async with FakeCluster(etcd_endpoint, namespace, model_folder, link=link, heartbeat=2.0, **limits) as cluster:
        yield cluster


async def failure(call: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await call  # type: ignore[misc]
    return caught.value


async def test_every_input_gets_its_vector(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.EMBEDDING)
    await cluster.routable(1)
    answer = await cluster.client.embed([PROMPT, TEXT, [9]], request_id="mine")
    texts = worker.engine.embedded[-1].inputs
    assert texts[0] == PROMPT
    assert len(texts[1]) == len(TEXT), "one token per byte"
    assert answer.vectors == [expected_vector(each) for each in texts]
    response = answer.response
    assert (response.request_id, response.usage.prompt_tokens) == ("mine", 9)
    assert [each.prompt_tokens for each in response.embeddings] == [3, 5, 1]
    assert response.worker.startswith("embedding-")
    assert response.HasField("timings")


async def test_the_record_says_how_long_vectors_are(cluster: FakeCluster) -> None:
    await cluster.start_worker(Role.EMBEDDING, Behaviour(matryoshka=(2, 4)))
    await cluster.routable(1)
    (known,) = (await cluster.client.status()).workers
    assert known.record.role == worker_pb2.WORKER_ROLE_EMBEDDING
    assert list(known.record.needs) == []
    assert not known.record.HasField("bootstrap")
    embedding = known.record.runtime.embedding
    assert (embedding.dimension, list(embedding.matryoshka_dimensions)) == (DIMENSION, [2, 4])


async def test_shorter_vectors_where_the_model_was_trained_for_them(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.EMBEDDING, Behaviour(matryoshka=(2, 4)))
    await cluster.routable(1)
    assert (await cluster.client.embed([PROMPT], dimensions=4)).vectors == [expected_vector(PROMPT, 4)]
    assert worker.engine.embedded[-1].dimensions == 4
    assert (await cluster.client.embed([PROMPT], dimensions=DIMENSION)).vectors == [expected_vector(PROMPT)]
    error = await failure(cluster.client.embed([PROMPT], dimensions=3))
    assert (error.code, error.field) == (Code.INVALID_ARGUMENT, "dimensions")
    assert "2, 4" in error.message


@pytest.mark.parametrize(
    ("inputs", "arguments", "field", "words"),
    [
        ([], {}, "inputs", "there is none"),
        ([PROMPT, []], {}, "inputs[1].token_ids", "empty"),
        ([PROMPT, ""], {}, "inputs[1].text", "empty"),
        ([PROMPT, [VOCABULARY]], {}, "inputs[1].token_ids", "outside the vocabulary"),
        ([[1] * (LONGEST + 1)], {}, "inputs[0].token_ids", f"takes {LONGEST}"),
        (["x" * (LONGEST + 1)], {"truncate": False}, "inputs[0].text", f"takes {LONGEST}"),
        (["x" * 100_000], {}, "inputs[0].text", "100000 characters"),
        ([[VOCABULARY] * (LONGEST + 1)], {"truncate": True}, "inputs[0].token_ids", "outside the vocabulary"),
        ([PROMPT], {"dimensions": 4}, "dimensions", "matryoshka"),
        ([PROMPT], {"dimensions": DIMENSION + 1}, "dimensions", f"[1, {DIMENSION}]"),
        ([PROMPT], {"dimensions": 0}, "dimensions", f"[1, {DIMENSION}]"),
        ([[1]] * 2049, {}, "inputs", "2049 inputs, at most 2048"),
        ([[1] * LONGEST] * 1201, {}, "inputs", "at most 300000"),
        ([PROMPT], {"request_id": "a b"}, "request_id", "printable"),
    ],
)
async def test_bad_input_costs_no_engine_time(
    cluster: FakeCluster, inputs: list[str | list[int]], arguments: dict[str, object], field: str, words: str
) -> None:
    worker = await cluster.start_worker(Role.EMBEDDING)
    await cluster.routable(1)
    error = await failure(cluster.client.embed(inputs, **arguments))  # type: ignore[arg-type]
    assert (error.code, error.reason, error.field) == (Code.INVALID_ARGUMENT, Reason.INVALID_FIELD, field)
    assert words in error.message
    assert worker.engine.embedded == []


async def test_truncation_cuts_the_end(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.EMBEDDING)
    await cluster.routable(1)
    long = list(range(LONGEST + 5))
    answer = await cluster.client.embed([long, "x" * (LONGEST - 1) + "yz", PROMPT], truncate=True)
    tokens, text, whole = worker.engine.embedded[-1].inputs
    assert tokens == long[:LONGEST]
    assert (len(text), text[-1] != text[0], len(set(text[:-1]))) == (LONGEST, True, 1), "up to the y"
    assert whole == PROMPT
    assert [each.truncated for each in answer.response.embeddings] == [True, True, False]


async def test_a_worker_by_itself_takes_token_ids_only(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.EMBEDDING)
    await cluster.routable(1)
    async with Client(worker.endpoint) as direct:
        assert (await direct.embed([PROMPT], truncate=True)).vectors == [expected_vector(PROMPT)]
        (cut,) = (await direct.embed([[1] * 1000], truncate=True)).response.embeddings
        assert (cut.prompt_tokens, cut.truncated) == (LONGEST, True)
        error = await failure(direct.embed([PROMPT, TEXT]))
        assert (error.code, error.field) == (Code.INVALID_ARGUMENT, "inputs[1].text")
        error = await failure(direct.embed([PROMPT], model="another"))
        assert (error.code, error.field) == (Code.NOT_FOUND, "model")


async def test_each_role_refuses_the_others_requests(cluster: FakeCluster) -> None:
    embedding = await cluster.start_worker(Role.EMBEDDING, served_model_name="e")
    aggregated = await cluster.start_worker(Role.AGGREGATED, served_model_name="g")
    await cluster.routable(2)
    async with Client(embedding.endpoint) as one, Client(aggregated.endpoint) as other:
        refusals = [
            await failure(one.generate(token_ids=PROMPT)),
            await failure(one.generate(text="also with bad fields")),
            await failure(other.embed([PROMPT])),
            await failure(cluster.client.generate(token_ids=PROMPT, model="e")),
            await failure(cluster.client.embed([PROMPT], model="g")),
        ]
    assert {(error.code, error.reason) for error in refusals} == {(Code.FAILED_PRECONDITION, Reason.WRONG_ROLE)}
    assert embedding.engine.seen == aggregated.engine.embedded == []
    assert (await failure(cluster.client.embed([PROMPT], model="none"))).code is Code.NOT_FOUND


async def test_one_name_may_stand_for_both(cluster: FakeCluster) -> None:
    await cluster.start_worker(Role.EMBEDDING)
    await cluster.start_worker(Role.AGGREGATED)
    await cluster.routable(2)
    (info,) = await cluster.client.list_models()
    assert list(info.rpcs) == ["GenerateService/Generate", "EmbedService/Embed"]
    assert info.runtime.embedding.dimension == DIMENSION
    assert (await cluster.client.embed([PROMPT])).vectors == [expected_vector(PROMPT)]
    answer = await cluster.client.generate(token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=2))
    assert len(answer.token_ids) == 2


async def test_a_frontend_with_embedding_workers_alone_serves(cluster: FakeCluster) -> None:
    assert (await failure(cluster.client.embed([PROMPT]))).code is Code.UNAVAILABLE
    worker = await cluster.start_worker(Role.EMBEDDING)
    await cluster.routable(1)
    assert (await cluster.client.status()).state == worker_pb2.WORKER_STATE_SERVING
    await cluster.client.probe()
    assert len(worker.engine.embedded) == 1
    async with grpc.aio.insecure_channel(worker.endpoint) as channel:
        probes = worker.engine.probes
        await health_pb2_grpc.HealthServiceStub(channel).Probe(health_pb2.ProbeRequest(), timeout=5)
        assert worker.engine.probes == probes + 1


async def test_the_idlest_worker_is_next(cluster: FakeCluster) -> None:
    slow = await cluster.start_worker(Role.EMBEDDING, Behaviour(hang=True))
    await cluster.routable(1)
    held = asyncio.create_task(cluster.client.embed([PROMPT]))
    await eventually(lambda: slow.engine.embedded, what="the slow worker has a call")
    others = [await cluster.start_worker(Role.EMBEDDING) for _ in range(2)]
    await cluster.routable(3)
    for _ in range(6):
        await cluster.client.embed([PROMPT])
    assert [len(worker.engine.embedded) for worker in (slow, *others)] == [1, 3, 3]
    held.cancel()


async def test_a_failed_worker_is_replaced_within_the_request(cluster: FakeCluster) -> None:
    workers = [await cluster.start_worker(Role.EMBEDDING) for _ in range(3)]
    await cluster.routable(3)
    for worker in workers[:2]:
        worker.engine.behaviour.embed_fails = "out of memory"
    for _ in range(6):
        assert (await cluster.client.embed([PROMPT])).vectors == [expected_vector(PROMPT)]
    workers[2].engine.behaviour.embed_fails = "out of memory"
    before = sum(len(worker.engine.embedded) for worker in workers)
    error = await failure(cluster.client.embed([PROMPT], request_id="doomed"))
    assert (error.code, error.reason, error.leg) == (Code.UNAVAILABLE, Reason.ENGINE_ABORTED, "embedding")
    assert (error.request_id, error.message) == ("doomed", "out of memory")
    assert sum(len(worker.engine.embedded) for worker in workers) == before + 3, "each once"


async def test_a_worker_that_dies_is_replaced_within_the_request(cluster: FakeCluster) -> None:
    dying = await cluster.start_worker(Role.EMBEDDING, Behaviour(hang=True))
    await cluster.routable(1)
    running = asyncio.create_task(cluster.client.embed([PROMPT]))
    await eventually(lambda: dying.engine.live, what="the call runs")
    await cluster.start_worker(Role.EMBEDDING)
    await cluster.routable(2)
    dying.engine.die("killed")
    assert (await running).vectors == [expected_vector(PROMPT)]


@pytest.mark.parametrize("limits", [{"max_embedding_calls": 2}])
async def test_what_is_too_much_is_refused_at_once(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.EMBEDDING, Behaviour(hang=True))
    await cluster.routable(1)
    held = [asyncio.create_task(cluster.client.embed([PROMPT])) for _ in range(2)]
    await eventually(lambda: len(worker.engine.live) == 2, what="both run")
    error = await failure(cluster.client.embed(["not even tokenized"]))
    assert (error.code, error.reason) == (Code.RESOURCE_EXHAUSTED, Reason.TOO_MANY_REQUESTS)
    assert error.retry_after is not None
    held[0].cancel()
    await eventually(lambda: len(worker.engine.live) == 1, what="a cancelled call is aborted in the engine")
    worker.engine.behaviour.hang = False
    assert (await cluster.client.embed([PROMPT])).vectors == [expected_vector(PROMPT)]
    held[1].cancel()


async def test_a_worker_bounds_all_frontends_together(cluster: FakeCluster) -> None:
    full = await cluster.start_worker(Role.EMBEDDING, Behaviour(hang=True), window=1)
    async with Client(full.endpoint) as direct:
        await cluster.routable(1)
        held = asyncio.create_task(direct.embed([PROMPT]))
        await eventually(lambda: full.engine.live, what="another frontend's call")
        error = await failure(cluster.client.embed([PROMPT]))
        assert (error.code, error.reason) == (Code.RESOURCE_EXHAUSTED, Reason.TOO_MANY_REQUESTS)
        assert (error.retry_after, error.worker) == (1.0, full.host._core.instance_id)
        await cluster.start_worker(Role.EMBEDDING)
        await cluster.routable(2)
        assert (await cluster.client.embed([PROMPT])).vectors == [expected_vector(PROMPT)]
        held.cancel()


@pytest.mark.parametrize("limits", [{"embedding_timeout": 0.3}])
async def test_the_deadline_holds_and_frees_the_engine(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.EMBEDDING, Behaviour(hang=True))
    await cluster.routable(1)
    error = await failure(cluster.client.embed([PROMPT]))
    assert (error.code, error.reason) == (Code.DEADLINE_EXCEEDED, Reason.DEADLINE_TOTAL)
    await eventually(lambda: not worker.engine.live, what="the engine is free")


async def test_a_silent_worker_is_given_up(cluster: FakeCluster, link: str) -> None:
    if link != "session":
        pytest.skip("streams have no heartbeat")
    frozen = await cluster.start_worker(Role.EMBEDDING, Behaviour(hang=True))
    await cluster.routable(1)
    running = asyncio.create_task(cluster.client.embed([PROMPT]))
    await eventually(lambda: frozen.engine.live, what="the call runs")
    await cluster.start_worker(Role.EMBEDDING)
    await cluster.routable(2)
    (seen,) = [w for w in cluster.frontend.workers.all() if w.instance_id == frozen.host._core.instance_id]
    assert isinstance(seen.link, SessionLink)
    seen.link._healthy = False
    seen.link._changed()
    assert (await running).vectors == [expected_vector(PROMPT)]


async def test_live_ids_are_not_shared(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.EMBEDDING, Behaviour(hang=True))
    await cluster.routable(1)
    held = asyncio.create_task(cluster.client.embed([PROMPT], request_id="one"))
    await eventually(lambda: worker.engine.live, what="the call runs")
    assert (await failure(cluster.client.embed([PROMPT], request_id="one"))).code is Code.ALREADY_EXISTS
    assert cluster.frontend.embedding.live_requests == 1
    assert (await cluster.client.status()).load.live_requests == 1
    held.cancel()


async def test_draining_finishes_what_runs(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.EMBEDDING, Behaviour(embed_seconds=0.5))
    await cluster.routable(1)
    running = asyncio.create_task(cluster.client.embed([PROMPT]))
    await eventually(lambda: worker.engine.live, what="the call runs")
    worker.host.stop()
    draining = asyncio.create_task(cluster.frontend.drain())
    await asyncio.sleep(0.05)
    assert (await failure(cluster.client.embed([PROMPT]))).reason is Reason.SHUTTING_DOWN
    assert (await running).vectors == [expected_vector(PROMPT)]
    await draining
    assert await worker.task == 0


async def test_a_second_signal_ends_what_runs(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.EMBEDDING, Behaviour(hang=True))
    await cluster.routable(1)
    running = asyncio.create_task(cluster.client.embed([PROMPT]))
    await eventually(lambda: worker.engine.live, what="the call runs")
    cluster.frontend.shut_down()
    assert (await failure(running)).reason is Reason.SHUTTING_DOWN
    await eventually(lambda: not worker.engine.live, what="the engine is free")


async def test_the_openai_sdk_unmodified(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.EMBEDDING)
    await cluster.routable(1)
    base = f"http://127.0.0.1:{cluster.frontend.http_port}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        answer = await client.embeddings.create(model=MODEL, input=["a", "bc"])
        assert [each.embedding for each in answer.data] == [
            expected_vector(each) for each in worker.engine.embedded[-1].inputs
        ]
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (3, 3)
        with pytest.raises(openai.BadRequestError) as caught:
            await client.embeddings.create(model=MODEL, input=["a", "x" * 300])
        assert caught.value.param == "input[1]"
        with pytest.raises(openai.BadRequestError) as caught:
            await client.embeddings.create(model=MODEL, input="a", dimensions=3)
        assert caught.value.param == "dimensions"
    async with httpx.AsyncClient(base_url=base) as http:
        body = {"model": MODEL, "input": PROMPT, "encoding_format": "base64"}
        (each,) = (await http.post("/embeddings", json=body)).json()["data"]
    assert array("f", base64.b64decode(each["embedding"])).tolist() == expected_vector(PROMPT)


async def test_an_http_client_that_leaves_frees_the_engine(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.EMBEDDING, Behaviour(hang=True))
    await cluster.routable(1)
    async with httpx.AsyncClient() as http:
        url = f"http://127.0.0.1:{cluster.frontend.http_port}/v1/embeddings"
        leaving = asyncio.create_task(http.post(url, json={"model": MODEL, "input": "a"}))
        await eventually(lambda: worker.engine.live, what="the call runs")
        leaving.cancel()
        await eventually(lambda: not worker.engine.live, what="the engine is free")
