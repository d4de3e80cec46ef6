"""One request, several answers: each has rooms, ids and a seed of its own, and they live and die together."""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvbaton.client import Client
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import generate_pb2, generate_pb2_grpc
from services.frontend.request.choices import choice_seed
from services.requests import Role, Sampling
from services.worker.engines.simulated.oracle import expected_tokens as simulated_tokens
from tests.support.cluster import FakeCluster
from tests.support.fake_engine import Behaviour, expected_tokens
from tests.support.processes import Processes, all_routable
from tests.support.traffic import fresh_prompt
from tests.support.waiting import eventually

PROMPT = [5, 6, 7]
# Four of these are more than the fake engine's prefill batch of 512 tokens.
LONG_PROMPT = [index % 200 + 1 for index in range(200)]


@pytest.fixture(params=["streams", "session"])
def link(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def cluster_with(etcd_endpoint: str, model_folder: Path, **frontend: object) -> AsyncGenerator[FakeCluster]:
    namespace = f"t-{uuid.uuid4().hex[:12]}"
    async with FakeCluster(
        etcd_endpoint, namespace, model_folder, link="session", heartbeat=2.0, **frontend
    ) as cluster:
        yield cluster


def asking(n: int, prompt: list[int] | None = None, tokens: int = 8, **sampling: Any) -> generate_pb2.GenerateRequest:
    params: dict[str, Any] = {"max_new_tokens": tokens, "temperature": 0} | sampling
    return generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=prompt or PROMPT), sampling=generate_pb2.SamplingParams(**params), n=n
    )


class Choices:
    """What came of each choice, and in which messages."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.texts: dict[int, str] = defaultdict(str)
        self.finished: dict[int, generate_pb2.Finished] = {}

    def add(self, response: generate_pb2.GenerateResponse) -> None:
        assert response.index not in self.finished, "nothing comes behind a choice's end"
        self.tokens[response.index] += response.token_ids
        self.texts[response.index] += response.text
        if response.HasField("finished"):
            self.finished[response.index] = response.finished


async def ask(port: int, request: generate_pb2.GenerateRequest) -> Choices:
    """Raises RequestError."""
    choices = Choices()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            async for response in generate_pb2_grpc.GenerateServiceStub(channel).Generate(request, timeout=30):
                choices.add(response)
        except grpc.aio.AioRpcError as error:
            raise RequestError.from_rpc_error(error) from error
    return choices


async def failure(port: int, request: generate_pb2.GenerateRequest) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await ask(port, request)
    return caught.value


async def nothing_left(cluster: FakeCluster) -> None:
    await eventually(lambda: not any(worker.engine.live for worker in cluster.workers), within=5)
    await eventually(lambda: cluster.frontend.generation.live_requests == 0)


async def test_each_choice_is_a_request_of_its_own(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    choices = await ask(cluster.frontend.grpc_port, asking(5, temperature=0.7, seed=11))
    assert sorted(choices.finished) == [0, 1, 2, 3, 4]
    assert all(choices.tokens[index] == expected_tokens(PROMPT, 8) for index in range(5))
    for engine in (prefill.engine, decode.engine):
        assert sorted(str(each.sampling.seed) for each in engine.seen) == sorted(
            str(choice_seed(11, choice)) for choice in range(5)
        )
        assert len({each.engine_id for each in engine.seen}) == 5
        assert len({each.room.room for each in engine.seen if each.room is not None}) == 5
    by_room = [{each.room: each.sampling.seed for each in engine.seen} for engine in (prefill.engine, decode.engine)]
    assert by_room[0] == by_room[1], "both legs of a choice carry its seed"
    assert len({finished.request_id for finished in choices.finished.values()}) == 1


async def test_the_usage_of_each_choice_lets_the_client_count_the_whole(cluster: FakeCluster) -> None:
    await cluster.start_pair()
    choices = await ask(cluster.frontend.grpc_port, asking(3))
    usages = [choices.finished[index].usage for index in range(3)]
    assert [usage.prompt_tokens for usage in usages] == [3, 3, 3]
    assert [usage.completion_tokens for usage in usages] == [8, 8, 8]
    assert all(finished.decode_worker and finished.prefill_worker for finished in choices.finished.values())


async def test_choices_of_one_text_are_detokenized_and_stopped_by_themselves(cluster: FakeCluster) -> None:
    _, decode = await cluster.start_pair()
    decode.engine.behaviour.token_seconds = 0.01
    whole = await cluster.client.generate(
        text="abc", sampling=generate_pb2.SamplingParams(max_new_tokens=20, temperature=0)
    )
    stop = whole.text[9:14]
    request = asking(3, tokens=40, stop=[stop])
    request.text = "abc"
    choices = await ask(cluster.frontend.grpc_port, request)
    assert [choices.texts[index] for index in range(3)] == [whole.text[: whole.text.index(stop)]] * 3
    assert {finished.matched_stop for finished in choices.finished.values()} == {stop}
    await nothing_left(cluster)


@pytest.mark.parametrize("n", [0, 129])
async def test_too_few_and_too_many_are_refused_by_name(cluster: FakeCluster, n: int) -> None:
    prefill, decode = await cluster.start_pair()
    error = await failure(cluster.frontend.grpc_port, asking(n))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "n")
    for worker in (prefill, decode):
        error = await failure(worker.config.port, asking(2))
        assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "n")
    assert prefill.engine.seen == decode.engine.seen == []


async def test_an_abort_by_the_clients_id_ends_every_choice(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    prefill.engine.behaviour.hang = decode.engine.behaviour.hang = True
    request = asking(4)
    request.request_id = "mine"
    running = asyncio.create_task(failure(cluster.frontend.grpc_port, request))
    await eventually(lambda: len(prefill.engine.live) == len(decode.engine.live) == 4)
    assert cluster.frontend.generation.live_requests == 4
    again = await failure(cluster.frontend.grpc_port, request)
    assert again.code is grpc.StatusCode.ALREADY_EXISTS
    assert await cluster.client.abort("mine")
    error = await running
    assert (error.code, error.request_id) == (grpc.StatusCode.CANCELLED, "mine")
    await nothing_left(cluster)


async def test_an_id_is_taken_until_the_last_choice_has_ended(cluster: FakeCluster) -> None:
    _, decode = await cluster.start_pair()
    decode.engine.behaviour.token_seconds = 0.05
    request = asking(2, tokens=30)
    request.request_id = "mine"
    running = asyncio.create_task(ask(cluster.frontend.grpc_port, request))
    await eventually(lambda: len(decode.engine.live) == 2)
    assert (await failure(cluster.frontend.grpc_port, request)).code is grpc.StatusCode.ALREADY_EXISTS
    assert len((await running).finished) == 2


async def test_a_client_that_leaves_ends_every_choice(cluster: FakeCluster) -> None:
    _, decode = await cluster.start_pair()
    decode.engine.behaviour.token_seconds = 0.02
    async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.frontend.grpc_port}") as channel:
        call = generate_pb2_grpc.GenerateServiceStub(channel).Generate(asking(4, tokens=200))
        await anext(aiter(call))
        await eventually(lambda: len(decode.engine.live) == 4)
        call.cancel()
        await nothing_left(cluster)


async def test_a_choice_that_fails_ends_the_others_with_its_error(cluster: FakeCluster) -> None:
    _, decode = await cluster.start_pair()
    decode.engine.behaviour.token_seconds = 0.02
    running = asyncio.create_task(failure(cluster.frontend.grpc_port, asking(3, tokens=200)))
    await eventually(lambda: len(decode.engine.live) == 3)
    await asyncio.sleep(0.2)  # all of them decode
    await decode.engine.abort(next(iter(decode.engine.live)))
    error = await running
    assert (error.code, error.reason, error.leg) == (grpc.StatusCode.UNAVAILABLE, Reason.ENGINE_ABORTED, "decode")
    await nothing_left(cluster)


async def test_a_shutdown_ends_every_choice_with_one_error(cluster: FakeCluster) -> None:
    prefill, _ = await cluster.start_pair()
    prefill.engine.behaviour.hang = True
    running = asyncio.create_task(failure(cluster.frontend.grpc_port, asking(3)))
    await eventually(lambda: len(prefill.engine.live) == 3)
    cluster.frontend.generation.shut_down()
    assert (await running).reason is Reason.SHUTTING_DOWN
    await nothing_left(cluster)


async def test_n_counts_as_n_live_requests_and_none_is_let_in_alone(etcd_endpoint: str, model_folder: Path) -> None:
    async with cluster_with(etcd_endpoint, model_folder, max_live_requests=4) as cluster:
        prefill, decode = await cluster.start_pair()
        prefill.engine.behaviour.hang = True
        port = cluster.frontend.grpc_port
        running = asyncio.create_task(failure(port, asking(3)))
        await eventually(lambda: len(prefill.engine.live) == 3)
        error = await failure(port, asking(2))
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.TOO_MANY_REQUESTS)
        assert len(decode.engine.live) == 3
        single = asyncio.create_task(failure(port, asking(1)))
        await eventually(lambda: len(prefill.engine.live) == 4)
        error = await failure(port, asking(5))
        assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "n"), "to come again would not help"
        cluster.frontend.generation.shut_down()
        await asyncio.gather(running, single)


async def test_n_counts_as_n_in_the_queue_and_enters_whole_or_not(etcd_endpoint: str, model_folder: Path) -> None:
    async with cluster_with(etcd_endpoint, model_folder, max_queued_requests=3) as cluster:
        prefill = await cluster.start_worker(Role.PREFILL)
        decode = await cluster.start_worker(Role.DECODE, window=1)
        await cluster.routable(2)
        prefill.engine.behaviour.hang = True
        port = cluster.frontend.grpc_port
        first = asyncio.create_task(failure(port, asking(1)))
        await eventually(lambda: len(decode.engine.live) == 1)
        second = asyncio.create_task(failure(port, asking(2)))
        await eventually(lambda: cluster.frontend.generation.live_requests == 3)
        error = await failure(port, asking(2))
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUEUE_FULL)
        third = asyncio.create_task(failure(port, asking(1)))
        await eventually(lambda: cluster.frontend.generation.live_requests == 4)
        assert (await failure(port, asking(1))).reason is Reason.QUEUE_FULL
        assert (await failure(port, asking(4))).field == "n"
        cluster.frontend.generation.shut_down()
        await asyncio.gather(first, second, third)
        await nothing_left(cluster)


async def test_a_window_smaller_than_n_answers_all_in_turn(cluster: FakeCluster) -> None:
    await cluster.start_worker(Role.PREFILL)
    decode = await cluster.start_worker(Role.DECODE, Behaviour(token_seconds=0.002), window=2)
    await cluster.routable(2)
    choices = await ask(cluster.frontend.grpc_port, asking(7))
    assert all(choices.tokens[index] == expected_tokens(PROMPT, 8) for index in range(7))
    assert len(decode.engine.seen) == 7


async def test_one_bound_on_unread_bytes_holds_for_all_choices(etcd_endpoint: str, model_folder: Path) -> None:
    async with cluster_with(etcd_endpoint, model_folder, max_buffered_bytes=4000) as cluster:
        _, decode = await cluster.start_pair()
        decode.engine.behaviour.token_seconds = 0.02
        # An output of one token counts 132 bytes: 20 of them fit, 4 times 20 are too much.
        alone = await cluster.frontend.generation.submit(asking(1, tokens=20))
        together = await cluster.frontend.generation.submit(asking(4, tokens=20))
        await nothing_left(cluster)
        assert sum([len(output.token_ids) async for output in alone.outputs()]) == 20
        with pytest.raises(RequestError) as caught:
            async for _ in together.outputs():
                pass
        assert caught.value.reason is Reason.CLIENT_TOO_SLOW


async def test_a_long_prompt_is_computed_once_and_the_others_follow_to_the_same_cache(cluster: FakeCluster) -> None:
    prefills = [await cluster.start_worker(Role.PREFILL, Behaviour(prefill_seconds=0.3)) for _ in range(2)]
    decodes = [await cluster.start_worker(Role.DECODE) for _ in range(2)]
    await cluster.routable(4)
    running = asyncio.create_task(ask(cluster.frontend.grpc_port, asking(4, LONG_PROMPT, temperature=0.5, seed=3)))
    await eventually(lambda: any(worker.engine.live for worker in decodes))
    await asyncio.sleep(0.1)
    assert sum(len(worker.engine.seen) for worker in prefills) == 1, "the others wait for it"
    choices = await running
    assert all(choices.tokens[index] == expected_tokens(LONG_PROMPT, 8) for index in range(4))
    assert sorted(len(worker.engine.seen) for worker in prefills) == [0, 4]
    first = next(worker.engine.seen[0] for worker in prefills if worker.engine.seen)
    assert first.sampling.seed == 3, "choice 0 goes ahead"


async def test_choices_that_wait_for_the_first_are_ended_with_it(cluster: FakeCluster) -> None:
    prefill, decode = await cluster.start_pair()
    prefill.engine.behaviour.hang = True
    request = asking(4, LONG_PROMPT)
    request.request_id = "mine"
    running = asyncio.create_task(failure(cluster.frontend.grpc_port, request))
    await eventually(lambda: prefill.engine.live and decode.engine.live)
    assert cluster.frontend.generation.live_requests == 4
    assert await cluster.client.abort("mine")
    assert (await running).code is grpc.StatusCode.CANCELLED
    await nothing_left(cluster)
    assert len(prefill.engine.seen) == len(decode.engine.seen) == 1
    prefill.engine.behaviour.hang = False
    assert len((await ask(cluster.frontend.grpc_port, request)).finished) == 4


async def test_choices_that_wait_follow_the_first_through_its_retry(cluster: FakeCluster) -> None:
    bad = await cluster.start_worker(Role.PREFILL, Behaviour(abort_message="no"))
    good = await cluster.start_worker(Role.PREFILL)
    await cluster.start_worker(Role.DECODE)
    await cluster.routable(3)
    for _ in range(2):  # whichever turn it is, one of them begins with the bad one
        choices = await ask(cluster.frontend.grpc_port, asking(4, LONG_PROMPT))
        assert all(choices.tokens[index] == expected_tokens(LONG_PROMPT, 8) for index in range(4))
    assert len(good.engine.seen) == 8
    assert 1 <= len(bad.engine.seen) <= 2, "those that waited go where the first one has succeeded"


async def test_real_processes_answer_every_choice_as_the_oracle_does(etcd_endpoint: str, tmp_path: Path) -> None:
    processes = Processes(etcd_endpoint, tmp_path)
    try:
        processes.frontend()
        # A second and a half for the prompt.
        options = "chunk_tokens=1024,prefill_token=0.00025"
        processes.worker("prefill", "prefill", sim=options)
        processes.worker("decode", "decode", sim=options)
        async with Client(processes.target, timeout=60) as client:
            await all_routable(client, 2)
            await client.generate(
                token_ids=[1, 2, 3], sampling=generate_pb2.SamplingParams(max_new_tokens=2, temperature=0)
            )
            prompt = fresh_prompt(6000)
            choices = await ask(processes.grpc_port, asking(8, prompt, 20, temperature=0.7, seed=5))
            alone = await ask(processes.grpc_port, asking(1, prompt, 20, temperature=0.7, seed=5))
        for choice in range(8):
            sampling = Sampling(max_new_tokens=20, temperature=0.7, seed=choice_seed(5, choice))
            assert choices.tokens[choice] == simulated_tokens(prompt, sampling)
        assert choices.tokens[0] == alone.tokens[0]
        assert len({tuple(tokens) for tokens in choices.tokens.values()}) == 8
        cached = [choices.finished[choice].usage.cached_prompt_tokens for choice in range(8)]
        assert cached[0] == 0
        assert all(tokens > 5900 for tokens in cached[1:]), cached
    finally:
        await asyncio.to_thread(processes.stop)


@pytest.mark.parametrize("n", [1, 2])
async def test_a_shutdown_is_no_reason_to_try_other_workers(cluster: FakeCluster, n: int) -> None:
    prefills = [await cluster.start_worker(Role.PREFILL, Behaviour(hang=True)) for _ in range(2)]
    for _ in range(2):
        await cluster.start_worker(Role.DECODE)
    await cluster.routable(4)
    running = asyncio.create_task(failure(cluster.frontend.grpc_port, asking(n)))
    await eventually(lambda: sum(len(each.engine.live) for each in prefills) == n)
    cluster.frontend.generation.shut_down()
    async with asyncio.timeout(4):
        error = await running
    assert error.reason is Reason.SHUTTING_DOWN
    await nothing_left(cluster)
    assert sum(len(each.engine.seen) for each in prefills) == n, "one attempt each"


async def test_the_siblings_of_a_choice_that_failed_for_good_are_not_tried_again(cluster: FakeCluster) -> None:
    prefills = [await cluster.start_worker(Role.PREFILL, Behaviour(hang=True)) for _ in range(2)]
    for _ in range(2):
        await cluster.start_worker(Role.DECODE)
    await cluster.routable(4)
    live: Any = await cluster.frontend.generation.submit(asking(3))
    await eventually(lambda: sum(len(each.engine.live) for each in prefills) == 3)
    # An error that a first attempt would be tried again after.
    live.choice_failed(RequestError(grpc.StatusCode.UNAVAILABLE, Reason.ENGINE_ABORTED, "aborted"))
    await nothing_left(cluster)
    assert sum(len(each.engine.seen) for each in prefills) == 3
