"""Requests through the frontend: both legs, every refusal, every way a request can end."""

from __future__ import annotations

import asyncio
from collections import Counter

import grpc
import httpx
import pytest

from kvbaton.client import Bootstrap, ChatMessage, SamplingParams
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import generate_pb2, generate_pb2_grpc, health_pb2, health_pb2_grpc, worker_pb2
from services.config.common import PhaseFlags
from services.requests import Role
from tests.support.cluster import MODEL, FakeCluster
from tests.support.fake_engine import expected_tokens
from tests.support.waiting import eventually

PROMPT = [5, 6, 7]


@pytest.fixture(params=["streams", "session"])
def link(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def greedy(count: int = 8) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, temperature=0)


async def failure(call: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await call  # type: ignore[misc]
    return caught.value


async def test_both_legs_carry_the_same_fresh_room(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    answers = [await cluster.client.generate(token_ids=PROMPT, sampling=greedy()) for _ in range(3)]
    assert all(answer.token_ids == expected_tokens(PROMPT, 8) for answer in answers)
    rooms = [request.room for request in prefill.engine.seen]
    assert rooms == [request.room for request in decode.engine.seen]
    numbers = [room.room for room in rooms if room is not None]
    assert len(set(numbers)) == 3
    assert all(0 < number < 1 << 63 for number in numbers)
    assert rooms[0] is not None
    assert rooms[0].port == prefill.config.disaggregation_bootstrap_port
    finished = answers[0].finished
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (3, 8)
    assert finished.reason == generate_pb2.FINISH_REASON_LENGTH
    assert (finished.prefill_worker, finished.decode_worker) == tuple(
        sorted((w.instance_id for w in (p.record for p in cluster.frontend.workers.all())), reverse=True)
    )


async def test_engine_ids_differ_per_leg_and_never_repeat(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    for _ in range(3):
        await cluster.client.generate(token_ids=PROMPT, sampling=greedy(1))
    ids = [request.engine_id for request in prefill.engine.seen + decode.engine.seen]
    assert len(set(ids)) == 6


async def test_every_pair_takes_its_turn(cluster: FakeCluster) -> None:
    prefills = [await cluster.start_worker(Role.PREFILL) for _ in range(2)]
    decodes = [await cluster.start_worker(Role.DECODE) for _ in range(3)]
    await cluster.routable(5)
    answers = [await cluster.client.generate(token_ids=PROMPT, sampling=greedy(1)) for _ in range(12)]
    pairs = Counter((answer.finished.prefill_worker, answer.finished.decode_worker) for answer in answers)
    assert set(pairs.values()) == {2}
    assert len(pairs) == 6
    assert [len(worker.engine.seen) for worker in (*prefills, *decodes)] == [6, 6, 4, 4, 4]


async def test_one_models_traffic_does_not_shift_anothers_turn(cluster: FakeCluster) -> None:
    workers = [await cluster.start_worker(Role.AGGREGATED, served_model_name=name) for name in ("a", "a", "b", "b")]
    await cluster.routable(4)
    for model in ("a", "b") * 4:
        await cluster.client.generate(token_ids=PROMPT, sampling=greedy(1), model=model)
    assert [len(worker.engine.seen) for worker in workers] == [2, 2, 2, 2]


async def test_prefills_smaller_pool_bounds_the_prompt_and_not_the_answer(cluster: FakeCluster) -> None:
    await cluster.start_worker(Role.PREFILL, pool_tokens=100)
    await cluster.start_worker(Role.DECODE, pool_tokens=200)
    await cluster.routable(2)
    answer = await cluster.client.generate(token_ids=PROMPT, sampling=SamplingParams(temperature=0))
    assert len(answer.token_ids) == 200 - len(PROMPT), "all that decode's pool leaves"
    error = await failure(cluster.client.generate(token_ids=[1] * 100, sampling=greedy(1)))
    assert error.field == "token_ids"


async def test_the_smallest_decode_worker_bounds_every_answer(cluster: FakeCluster) -> None:
    await cluster.start_worker(Role.PREFILL)
    for tokens in (200, 150):
        await cluster.start_worker(Role.DECODE, pool_tokens=tokens)
    await cluster.routable(3)
    for _ in range(2):
        answer = await cluster.client.generate(token_ids=PROMPT, sampling=SamplingParams(temperature=0))
        assert len(answer.token_ids) == 150 - len(PROMPT)
    error = await failure(cluster.client.generate(token_ids=PROMPT, sampling=greedy(180)))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "sampling.max_new_tokens")


async def test_what_clients_call_models_is_no_metric_label(cluster: FakeCluster) -> None:
    await cluster.start_pair()
    for number in range(3):
        await failure(cluster.client.generate(token_ids=PROMPT, sampling=greedy(), model=f"junk-{number}"))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{cluster.frontend.http_port}") as http:
        assert "junk-" not in (await http.get("/metrics")).text


async def test_an_abort_that_overtakes_its_request_still_takes_effect(cluster: FakeCluster) -> None:
    await cluster.start_pair()
    assert not await cluster.client.abort("late")
    error = await failure(cluster.client.generate(token_ids=PROMPT, sampling=greedy(), request_id="late"))
    assert error.code is grpc.StatusCode.CANCELLED


async def test_without_prefill_nothing_runs_elsewhere(cluster: FakeCluster) -> None:
    decode = await cluster.start_worker(Role.DECODE)
    await cluster.routable(1)
    error = await failure(cluster.client.generate(token_ids=PROMPT, sampling=greedy()))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.NO_PREFILL_WORKER)
    assert error.retry_after is not None
    assert decode.engine.seen == []


async def test_unequal_compat_hashes_are_never_paired(cluster: FakeCluster) -> None:
    await cluster.start_worker(Role.PREFILL)
    await cluster.start_worker(Role.DECODE)
    await cluster.routable(2)
    for worker in cluster.frontend.workers.all():
        if worker.role is Role.DECODE:
            record = worker_pb2.WorkerRecord()
            record.CopyFrom(worker.record)
            record.compat_hash = "another"
            worker.update(record)
    error = await failure(cluster.client.generate(token_ids=PROMPT, sampling=greedy()))
    assert error.reason is Reason.NO_COMPATIBLE_PAIR


async def test_a_pair_that_does_not_fit_says_which_field_differs(cluster: FakeCluster) -> None:
    await cluster.start_worker(Role.PREFILL)
    await cluster.start_worker(Role.DECODE, allow_version_skew=True)
    await cluster.routable(2)
    error = await failure(cluster.client.generate(token_ids=PROMPT, sampling=greedy()))
    assert error.reason is Reason.NO_COMPATIBLE_PAIR
    assert "engine_version: decode any (--allow-version-skew), prefill " in str(error)


async def test_text_and_chat_through_the_workers_tokenizer(cluster: FakeCluster) -> None:
    prefill, _ = await cluster.start_pair()
    await cluster.client.generate(text="abc", sampling=greedy(1))
    first = prefill.engine.seen[-1].token_ids
    await cluster.client.generate(chat=[ChatMessage(role="user", content="abc")], sampling=greedy(1))
    second = prefill.engine.seen[-1].token_ids
    assert len(first) == 3
    assert len(second) == len("user:abc;")
    assert second[5:8] == first


async def test_streamed_text_equals_the_decoded_whole(cluster: FakeCluster) -> None:
    await cluster.start_pair()
    chunks = [chunk async for chunk in cluster.client.stream(text="abc", sampling=greedy(40))]
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    (worker, *_) = cluster.frontend.workers.all()
    assert worker.text is not None
    whole = worker.text.tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(chunk.text for chunk in chunks) == whole
    assert [chunk.HasField("finished") for chunk in chunks].count(True) == 1
    assert chunks[-1].HasField("finished")


async def test_a_stop_string_ends_the_answer_and_both_legs(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    decode.engine.behaviour.token_seconds = 0.02
    full = await cluster.client.generate(text="abc", sampling=greedy(20))
    stop = full.text[9:14]
    assert full.text.index(stop) == 9
    params = greedy(200)
    params.stop.append(stop)
    answer = await cluster.client.generate(text="abc", sampling=params)
    assert answer.text == full.text[:9]
    assert answer.finished.matched_stop == stop
    assert answer.finished.reason == generate_pb2.FINISH_REASON_STOP
    assert answer.finished.usage.completion_tokens == len(answer.token_ids) < 20
    await eventually(lambda: not decode.engine.live and not prefill.engine.live)


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        ({"token_ids": {"ids": []}}, grpc.StatusCode.INVALID_ARGUMENT, "token_ids"),
        ({"text": ""}, grpc.StatusCode.INVALID_ARGUMENT, "text"),
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "input"),
        ({"chat": {}}, grpc.StatusCode.INVALID_ARGUMENT, "chat.messages"),
        ({"chat": {"messages": [{"content": "x"}]}}, grpc.StatusCode.INVALID_ARGUMENT, "chat.messages[0].role"),
        ({"token_ids": {"ids": [1, 49152]}}, grpc.StatusCode.INVALID_ARGUMENT, "token_ids"),
        ({"token_ids": {"ids": [1] * 251}}, grpc.StatusCode.INVALID_ARGUMENT, "token_ids"),
        ({"text": "x" * 300}, grpc.StatusCode.INVALID_ARGUMENT, "text"),
        (
            {"token_ids": {"ids": [1]}, "sampling": {"temperature": -1}},
            grpc.StatusCode.INVALID_ARGUMENT,
            "sampling.temperature",
        ),
        ({"token_ids": {"ids": [1]}, "sampling": {"top_p": 0}}, grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p"),
        (
            {"token_ids": {"ids": [1]}, "sampling": {"max_new_tokens": 0}},
            grpc.StatusCode.INVALID_ARGUMENT,
            "sampling.max_new_tokens",
        ),
        (
            {"token_ids": {"ids": [1] * 200}, "sampling": {"max_new_tokens": 57}},
            grpc.StatusCode.INVALID_ARGUMENT,
            "sampling.max_new_tokens",
        ),
        ({"token_ids": {"ids": [1]}, "model": "nope"}, grpc.StatusCode.NOT_FOUND, "model"),
        ({"token_ids": {"ids": [1]}, "request_id": "a b"}, grpc.StatusCode.INVALID_ARGUMENT, "request_id"),
        (
            {"token_ids": {"ids": [1]}, "bootstrap": {"host": "h", "port": 1, "room": 1}},
            grpc.StatusCode.INVALID_ARGUMENT,
            "bootstrap",
        ),
        ({"token_ids": {"ids": [1]}, "dp_rank": 0}, grpc.StatusCode.INVALID_ARGUMENT, "dp_rank"),
    ],
)
async def test_bad_input_names_its_field_and_reaches_no_engine(
    cluster: FakeCluster, request_: dict[str, object], code: grpc.StatusCode, field: str
) -> None:
    prefill, decode = await cluster.start_pair()
    error = await raw_failure(cluster.frontend.grpc_port, generate_pb2.GenerateRequest(**request_))  # type: ignore[arg-type]
    assert (error.code, error.field) == (code, field)
    assert bool(error.request_id) == (field != "request_id")
    assert prefill.engine.seen == decode.engine.seen == []


async def raw_failure(port: int, request: generate_pb2.GenerateRequest) -> RequestError:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in generate_pb2_grpc.GenerateServiceStub(channel).Generate(request, timeout=20):
                pass
    return RequestError.from_rpc_error(caught.value)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"token_ids": {"ids": [1]}}, "bootstrap"),
        ({"token_ids": {"ids": [1]}, "bootstrap": {"host": "h", "port": 1, "room": 0}}, "bootstrap.room"),
        ({"text": "x", "bootstrap": {"host": "h", "port": 1, "room": 1}}, "text"),
        (
            {"token_ids": {"ids": [1]}, "bootstrap": {"host": "h", "port": 1, "room": 1}, "sampling": {"stop": ["x"]}},
            "sampling.stop",
        ),
        ({"token_ids": {"ids": [1]}, "bootstrap": {"host": "h", "port": 1, "room": 1}, "dp_rank": 1}, "dp_rank"),
    ],
)
async def test_bad_legs_are_refused_by_each_worker(
    cluster: FakeCluster, request_: dict[str, object], field: str
) -> None:
    for worker in await cluster.start_pair():
        error = await raw_failure(worker.config.port, generate_pb2.GenerateRequest(**request_))  # type: ignore[arg-type]
        assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        assert worker.engine.seen == []


async def test_both_inputs_are_refused_by_the_client_and_by_http(cluster: FakeCluster) -> None:
    await cluster.start_pair()
    error = await failure(cluster.client.generate(text="x", token_ids=[1]))
    assert error.field == "input"
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{cluster.frontend.http_port}") as http:
        body = {"model": MODEL, "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
        assert (await http.post("/v1/completions", json=body)).status_code == 400


async def test_a_live_request_id_is_refused(cluster: FakeCluster) -> None:
    _, decode = await cluster.start_pair()
    decode.engine.behaviour.token_seconds = 0.05
    running = asyncio.create_task(cluster.client.generate(token_ids=PROMPT, sampling=greedy(40), request_id="mine"))
    await eventually(lambda: decode.engine.live)
    error = await failure(cluster.client.generate(token_ids=PROMPT, sampling=greedy(), request_id="mine"))
    assert (error.code, error.field) == (grpc.StatusCode.ALREADY_EXISTS, "request_id")
    assert (await running).token_ids == expected_tokens(PROMPT, 40), "the first one is untouched"


@pytest.mark.peers(9)
@pytest.mark.parametrize("failing", [Role.PREFILL, Role.DECODE])
async def test_one_legs_failure_is_typed_and_ends_the_other(cluster: FakeCluster, failing: Role) -> None:
    prefill, decode = await cluster.start_pair()
    bad, good = (prefill, decode) if failing is Role.PREFILL else (decode, prefill)
    bad.engine.behaviour.abort_message = "transfer failed"
    good.engine.behaviour.hang = True
    error = await failure(cluster.client.generate(token_ids=PROMPT, sampling=greedy()))
    assert (error.code, error.reason, error.leg) == (grpc.StatusCode.UNAVAILABLE, Reason.ENGINE_ABORTED, failing.value)
    assert "transfer failed" in error.message
    assert error.room
    assert error.worker
    await eventually(lambda: not good.engine.live, within=5)
    await eventually(lambda: cluster.frontend.generation.live_requests == 0)


async def test_prefill_ends_before_decode_is_aborted(cluster: FakeCluster) -> None:
    """NIXL writes are one-sided: decode keeps its pages until nobody can write into them."""
    prefill, decode = await cluster.start_pair()
    prefill.engine.behaviour.hang = decode.engine.behaviour.hang = True
    order: list[str] = []
    for worker in (prefill, decode):
        _record_order(worker.engine, worker.config.role, order)
    running = asyncio.create_task(cluster.client.generate(token_ids=PROMPT, sampling=greedy(), request_id="mine"))
    await eventually(lambda: prefill.engine.live and decode.engine.live)
    assert await cluster.client.abort("mine")
    error = await failure(running)
    assert error.code is grpc.StatusCode.CANCELLED
    await eventually(lambda: not prefill.engine.live and not decode.engine.live)
    assert order == ["prefill", "decode"]


def _record_order(engine: object, role: Role, order: list[str]) -> None:
    original = engine.abort  # type: ignore[attr-defined]

    async def abort(engine_id: str) -> None:
        order.append(role.value)
        await original(engine_id)

    engine.abort = abort  # type: ignore[attr-defined]


@pytest.mark.peers(9)
@pytest.mark.parametrize("tokens", [1, 200])
async def test_a_first_token_that_differs_is_data_loss(cluster: FakeCluster, tokens: int) -> None:
    prefill, _ = await cluster.start_pair()
    prefill.engine.behaviour.wrong_first_token = True
    prefill.engine.behaviour.token_seconds = 0.2  # a short answer is complete before prefill's token comes
    error = await failure(cluster.client.generate(token_ids=PROMPT, sampling=greedy(tokens)))
    assert (error.code, error.reason) == (grpc.StatusCode.DATA_LOSS, Reason.FIRST_TOKEN_MISMATCH)


async def test_tokens_do_not_wait_for_prefills_word_but_the_end_does(cluster: FakeCluster) -> None:
    """SGLang's prefill tells of its token behind its next batch, when a short answer is long complete."""
    prefill, _ = await cluster.start_pair()
    prefill.engine.behaviour.token_seconds = 0.5
    messages = [
        (list(message.token_ids), message.HasField("finished"), bool(prefill.engine.live))
        async for message in cluster.client.stream(token_ids=PROMPT, sampling=greedy(3))
    ]
    assert [token for tokens, _, _ in messages for token in tokens] == expected_tokens(PROMPT, 3)
    assert messages[-1][:2] == ([], True)
    assert all(not finished and prefill_runs for _, finished, prefill_runs in messages[:-1])


async def test_decode_keeps_its_pages_while_prefills_end_is_not_proven(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefill host that doesn't answer may have an engine that still writes."""
    monkeypatch.setattr("services.frontend.link.streams.ABORT_CALL_TIMEOUT", 0.2)
    monkeypatch.setattr("services.frontend.link.proof.CALL_TIMEOUT", 0.2)
    prefill, decode = await cluster.start_pair()
    prefill.engine.behaviour.hang = decode.engine.behaviour.hang = True
    stalled = asyncio.Event()
    abort = prefill.engine.abort

    async def late_abort(engine_id: str) -> None:
        await stalled.wait()
        await abort(engine_id)

    prefill.engine.abort = late_abort  # type: ignore[method-assign]
    running = asyncio.create_task(cluster.client.generate(token_ids=PROMPT, sampling=greedy(), request_id="mine"))
    await eventually(lambda: prefill.engine.live and decode.engine.live)
    try:
        await cluster.client.abort("mine")
        assert (await failure(running)).code is grpc.StatusCode.CANCELLED, "the client doesn't wait for the proof"
        await asyncio.sleep(1.0)
        assert decode.engine.live, "prefill has not let go yet"
    finally:
        stalled.set()
    await eventually(lambda: not prefill.engine.live and not decode.engine.live, within=10)


async def test_a_prefill_that_is_gone_frees_decode_at_once(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    prefill.engine.behaviour.hang = decode.engine.behaviour.hang = True
    running = asyncio.create_task(cluster.client.generate(token_ids=PROMPT, sampling=greedy()))
    await eventually(lambda: prefill.engine.live and decode.engine.live)
    prefill.engine.die("scheduler killed")
    assert (await failure(running)).reason is Reason.ENGINE_DEAD
    await eventually(lambda: not decode.engine.live, within=5)


async def test_usage_tells_the_cached_prompt_tokens_also_at_a_stop_string(cluster: FakeCluster) -> None:
    prefill, _ = await cluster.start_pair()
    prefill.engine.behaviour.cached_tokens = 2
    whole = await cluster.client.generate(text="abc", sampling=greedy(20))
    stop = greedy(20)
    stop.stop.append(whole.text[9:14])
    stopped = await cluster.client.generate(text="abc", sampling=stop)
    assert stopped.finished.matched_stop
    assert whole.finished.usage.cached_prompt_tokens == stopped.finished.usage.cached_prompt_tokens == 2


async def test_a_client_that_leaves_frees_both_workers(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    decode.engine.behaviour.token_seconds = 0.02
    async for _ in cluster.client.stream(token_ids=PROMPT, sampling=greedy(200)):
        break
    await eventually(lambda: not decode.engine.live and not prefill.engine.live, within=5)
    await eventually(lambda: cluster.frontend.generation.live_requests == 0)


async def test_a_client_deadline_frees_both_workers(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    prefill.engine.behaviour.hang = True
    error = await failure(cluster.client.generate(token_ids=PROMPT, sampling=greedy(), timeout=0.5))
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: not decode.engine.live and not prefill.engine.live, within=5)


async def test_nothing_hangs_longer_than_the_frontends_deadlines(etcd_endpoint: str, model_folder: object) -> None:
    async with FakeCluster(
        etcd_endpoint,
        "deadlines",
        model_folder,  # type: ignore[arg-type]
        phases=PhaseFlags(prefill_timeout=1.0, transfer_timeout=1.0),
        token_gap_timeout=0.7,
        total_timeout=3.0,
    ) as cluster:
        prefill, decode = await cluster.start_pair()
        prefill.engine.behaviour.hang = True
        error = await failure(cluster.client.generate(token_ids=PROMPT, sampling=greedy()))
        assert (error.code, error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE_PREFILL)
        prefill.engine.behaviour.hang = False
        decode.engine.behaviour.token_seconds = 0.9
        error = await failure(cluster.client.generate(token_ids=PROMPT, sampling=greedy()))
        assert error.reason is Reason.DEADLINE_TOKEN_GAP
        decode.engine.behaviour.token_seconds = 0.2
        error = await failure(cluster.client.generate(token_ids=PROMPT, sampling=greedy(100)))
        assert error.reason is Reason.DEADLINE_TOTAL
        await eventually(lambda: not decode.engine.live and not prefill.engine.live, within=5)


async def test_a_worker_started_again_at_the_same_address_serves(cluster: FakeCluster) -> None:
    _, decode = await cluster.start_pair()
    decode.host.stop()
    assert await decode.task == 0
    await cluster.routable(1)
    await cluster.start_worker(Role.DECODE, port=decode.config.port)
    await cluster.routable(2)
    answer = await cluster.client.generate(token_ids=PROMPT, sampling=greedy())
    assert answer.token_ids == expected_tokens(PROMPT, 8)


async def test_requests_in_flight_survive_their_workers_drain(cluster: FakeCluster) -> None:
    _, decode = await cluster.start_pair()
    decode.engine.behaviour.token_seconds = 0.05
    running = [
        asyncio.create_task(cluster.client.generate(token_ids=[n, n + 1], sampling=greedy(20))) for n in range(1, 9)
    ]
    await eventually(lambda: len(decode.engine.live) == 8)
    decode.host.stop()
    answers = await asyncio.gather(*running)
    assert [answer.token_ids for answer in answers] == [expected_tokens([n, n + 1], 20) for n in range(1, 9)]
    assert await decode.task == 0


async def test_two_hundred_requests_a_third_cancelled_leave_nothing(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    decode.engine.behaviour.token_seconds = prefill.engine.behaviour.prefill_seconds = 0.01
    await cluster.client.generate(token_ids=PROMPT, sampling=greedy())
    tasks_before = len(asyncio.all_tasks())

    async def one(number: int) -> None:
        prompt = [number, number + 1]
        running = asyncio.create_task(cluster.client.generate(token_ids=prompt, sampling=greedy(20)))
        if number % 3 == 0:
            await asyncio.sleep(0.002 * (number % 50))
            running.cancel()
            await asyncio.wait({running})
        else:
            assert (await running).token_ids == expected_tokens(prompt, 20)

    await asyncio.gather(*(one(number) for number in range(200)))
    await eventually(lambda: not decode.engine.live and not prefill.engine.live, within=10)
    await eventually(lambda: cluster.frontend.generation.live_requests == 0)
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks_before, within=10, what="tasks back at the baseline")


async def test_status_tells_every_worker_and_why_it_is_not_routable(cluster: FakeCluster) -> None:
    worker = await cluster.start_worker(Role.PREFILL)
    await cluster.routable(1)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.frontend.grpc_port}") as channel:
        status = await health_pb2_grpc.HealthServiceStub(channel).Status(health_pb2.StatusRequest())
    (known,) = status.workers
    assert known.routable
    assert known.registered
    assert known.record.role == worker_pb2.WORKER_ROLE_PREFILL
    assert status.state == worker_pb2.WORKER_STATE_STARTING, "prefill alone serves no model"
    assert await cluster.client.list_models() == []
    worker.host.stop()


async def test_probe_goes_through_a_pair(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    assert await cluster.client.probe() >= 0
    assert len(prefill.engine.seen) == len(decode.engine.seen) == 1


async def test_a_draining_frontend_finishes_and_takes_nothing_new(cluster: FakeCluster) -> None:
    _, decode = await cluster.start_pair()
    decode.engine.behaviour.token_seconds = 0.05
    running = asyncio.create_task(cluster.client.generate(token_ids=PROMPT, sampling=greedy(20)))
    await eventually(lambda: decode.engine.live)
    draining = asyncio.create_task(cluster.frontend.drain())
    await eventually(lambda: cluster.frontend.generation.draining)
    error = await failure(cluster.client.generate(token_ids=PROMPT, sampling=greedy()))
    assert error.reason is Reason.SHUTTING_DOWN
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{cluster.frontend.http_port}") as http:
        assert (await http.get("/health")).status_code == 503
    assert (await running).token_ids == expected_tokens(PROMPT, 20)
    await draining


async def test_a_leg_sent_by_hand_to_both_workers(cluster: FakeCluster) -> None:
    """What two grpcurl calls with the same room do."""
    from kvbaton.client import Client

    prefill, decode = await cluster.start_pair()
    room = Bootstrap(host="127.0.0.1", port=prefill.config.disaggregation_bootstrap_port, room=77)
    async with Client(prefill.endpoint) as to_prefill, Client(decode.endpoint) as to_decode:
        first, answer = await asyncio.gather(
            to_prefill.generate(token_ids=PROMPT, sampling=greedy(), bootstrap=room),
            to_decode.generate(token_ids=PROMPT, sampling=greedy(), bootstrap=room),
        )
    assert first.token_ids == expected_tokens(PROMPT, 1)
    assert answer.token_ids == expected_tokens(PROMPT, 8)


async def test_a_shutdown_ends_live_requests_with_a_typed_error(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    prefill.engine.behaviour.hang = True
    running = asyncio.create_task(cluster.client.generate(token_ids=PROMPT, sampling=greedy()))
    await eventually(lambda: prefill.engine.live)
    cluster.frontend.generation.shut_down()
    error = await failure(running)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.SHUTTING_DOWN)
    await eventually(lambda: not prefill.engine.live and not decode.engine.live, within=5)
