"""A worker fails behind the first token: the answer goes on elsewhere as if nothing had happened, or says why not.

Decode workers are slow until one of them has failed, so that it always fails in the middle of an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from prometheus_client import REGISTRY
from tokenizers import Tokenizer

from kvbaton.client import Answer, Client, SamplingParams
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import generate_pb2
from services.requests import Role, Sampling
from services.worker.engines.simulated import SimulatedEngine, SimulatedOptions
from services.worker.engines.simulated.oracle import (
    TokenModel,
    expected_answer,
    expected_logprobs,
    expected_tokens,
)
from tests.support.cluster import MODEL, FakeCluster, HostedWorker
from tests.support.fake_engine import Behaviour
from tests.support.simulated_engines import do
from tests.support.waiting import eventually

PROMPT = list(range(40, 80))
LENGTH = 60
GREEDY = SamplingParams(max_new_tokens=LENGTH, temperature=0)
ORACLE = expected_tokens(PROMPT, Sampling(max_new_tokens=LENGTH, temperature=0.0))
# An answer takes seconds; behind a failure it takes nothing.
STEP_SECONDS = 0.05
FAST = 0.001
# Where a worker fails, in tokens that the client has.
FAILS_AT = 4


class Workers:
    """The workers of one test, simulated."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        self.prefills: list[HostedWorker] = []
        self.decodes: list[HostedWorker] = []
        """Those that stream: decode workers, or aggregated ones."""

    async def start(self, role: Role, count: int = 1, *, host: dict[str, Any] | None = None, **options: Any) -> None:
        options.setdefault("decode_step", STEP_SECONDS)
        simulated = SimulatedOptions(**options)
        for _ in range(count):
            worker = await self.cluster.start_worker(role, simulated=simulated, **(host or {}))
            (self.prefills if role is Role.PREFILL else self.decodes).append(worker)

    async def disaggregated(self, decodes: int = 2, **options: Any) -> None:
        """One prefill worker and so many decode workers, routable."""
        await self.start(Role.PREFILL, **options)
        await self.start(Role.DECODE, decodes, **options)
        await self.cluster.routable(1 + decodes)

    @property
    def busy(self) -> list[HostedWorker]:
        """Decode workers that run something."""
        return [worker for worker in self.decodes if _live(worker)]

    def fail(self, worker: HostedWorker, *, last: bool = True) -> None:
        """Its engine is gone; if that is the last failure, the others are fast from now on."""
        for other in self.decodes:
            if last and other is not worker:
                do(_engine(other), "slow", factor=FAST)
        do(_engine(worker), "crash", how="scheduler")

    async def interrupted(self, *at: int, into: Answer | None = None, **request: Any) -> Answer:
        """The answer to a request whose decode worker fails whenever the client has so many tokens."""
        answer, failures = into or Answer(), list(at or (FAILS_AT,))
        request = {"token_ids": PROMPT, "sampling": GREEDY, **request}
        async for chunk in self.cluster.client.stream(**request):
            answer.add(chunk)
            if failures and len(answer.token_ids) >= failures[0]:
                failures.pop(0)
                (victim,) = self.busy
                self.fail(victim, last=not failures)
        assert not failures, "the worker was to fail in the middle"
        return answer

    async def all_let_go(self) -> None:
        """No worker that lives runs anything."""
        alive = [worker for worker in (*self.prefills, *self.decodes) if not worker.task.done()]
        await eventually(lambda: not any(map(_live, alive)), what="legs are gone")


def _engine(worker: HostedWorker) -> SimulatedEngine:
    assert worker.simulator is not None
    return worker.simulator


def _live(worker: HostedWorker) -> int:
    engine = _engine(worker)
    return 0 if engine.scheduler.cause else sum(len(rank.live) for rank in engine.scheduler.ranks)


def counted(outcome: str) -> float:
    return REGISTRY.get_sample_value("kvbaton_migrations_total", {"model": MODEL, "outcome": outcome}) or 0.0


def queued() -> float:
    return REGISTRY.get_sample_value("kvbaton_queued_requests", {"model": MODEL}) or 0.0


@pytest_asyncio.fixture
async def workers(cluster: FakeCluster) -> AsyncIterator[Workers]:
    yield Workers(cluster)


@contextlib.asynccontextmanager
async def limited(etcd_endpoint: str, model_folder: Path, **frontend: Any) -> AsyncGenerator[Workers]:
    """Workers behind a frontend of its own."""
    namespace = f"t-{uuid.uuid4().hex[:12]}"
    async with FakeCluster(etcd_endpoint, namespace, model_folder, link="session", heartbeat=2.0, **frontend) as made:
        yield Workers(made)


@pytest.mark.parametrize("link", ["streams", "session"])
async def test_a_greedy_answer_goes_on_without_a_repeated_or_missing_token(workers: Workers) -> None:
    before = counted("continued")
    await workers.disaggregated()
    answer = await workers.interrupted()
    assert answer.token_ids == ORACLE
    finished = answer.finished
    assert finished.reason == generate_pb2.FINISH_REASON_LENGTH
    assert finished.migrations == 1
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (len(PROMPT), LENGTH)
    (survivor,) = [worker for worker in workers.decodes if not _engine(worker).scheduler.cause]
    assert finished.decode_worker == survivor.instance_id
    assert counted("continued") == before + 1
    await workers.all_let_go()


async def test_an_answer_that_nothing_happens_to_has_not_migrated(workers: Workers) -> None:
    await workers.disaggregated(decodes=1, decode_step=0.0002)
    answer = await workers.cluster.client.generate(token_ids=PROMPT, sampling=GREEDY)
    assert (answer.token_ids, answer.finished.migrations) == (ORACLE, 0)


async def test_an_aggregated_workers_answer_migrates_too(workers: Workers) -> None:
    await workers.start(Role.AGGREGATED, 2)
    await workers.cluster.routable(2)
    answer = await workers.interrupted()
    assert (answer.token_ids, answer.finished.migrations) == (ORACLE, 1)


async def test_it_migrates_as_often_as_it_has_to(workers: Workers) -> None:
    await workers.disaggregated(decodes=3)
    answer = await workers.interrupted(FAILS_AT, 2 * FAILS_AT)
    assert (answer.token_ids, answer.finished.migrations) == (ORACLE, 2)


async def test_phases_are_the_first_workers_and_the_usage_is_the_clients(workers: Workers) -> None:
    await workers.disaggregated()
    await workers.cluster.client.generate(token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=1, temperature=0))
    answer = await workers.interrupted()
    finished = answer.finished
    # What the client's own prompt found in prefill's cache, not what the replay did.
    assert 0 < finished.usage.cached_prompt_tokens <= len(PROMPT)
    timings = finished.timings
    assert timings.decode.ToNanoseconds() >= (FAILS_AT - 2) * STEP_SECONDS * 1e9
    assert all(phase.ToNanoseconds() > 0 for phase in (timings.queue, timings.prefill, timings.transfer))


async def test_seeded_sampling_and_biases_go_on_as_they_would_have(workers: Workers) -> None:
    await workers.disaggregated()
    sampling = SamplingParams(max_new_tokens=LENGTH, temperature=0.8, top_p=0.9, seed=7, logit_bias={5: -100.0})
    expected = Sampling(max_new_tokens=LENGTH, temperature=0.8, top_p=0.9, seed=7, logit_bias=((5, -100.0),))
    answer = await workers.interrupted(sampling=sampling)
    assert (answer.token_ids, answer.finished.migrations) == (expected_tokens(PROMPT, expected), 1)


async def test_each_token_has_its_log_probability_once(workers: Workers) -> None:
    await workers.disaggregated()
    answer = await workers.interrupted(logprobs=2)
    assert answer.token_ids == ORACLE
    assert [each.token_id for each in answer.logprobs] == ORACLE
    expected = expected_logprobs(PROMPT, Sampling(max_new_tokens=LENGTH, temperature=0.0), 2)
    assert [each.logprob for each in answer.logprobs] == pytest.approx([each.logprob for each in expected])
    assert all(len(each.top) == 2 for each in answer.logprobs)


async def test_the_least_length_counts_the_tokens_of_both(workers: Workers) -> None:
    """Every second token would be the end: only the minimum keeps the answer going, on both sides of the failure."""
    model = TokenModel(eos_rate=0.5)
    await workers.disaggregated(eos_rate=0.5)
    sampling = SamplingParams(max_new_tokens=LENGTH, temperature=0, min_new_tokens=20)
    expected = expected_answer(
        PROMPT, Sampling(max_new_tokens=LENGTH, temperature=0.0, min_new_tokens=20), model
    ).token_ids
    assert 20 <= len(expected) < LENGTH
    answer = await workers.interrupted(sampling=sampling)
    assert answer.token_ids == expected
    assert answer.finished.reason == generate_pb2.FINISH_REASON_STOP
    assert answer.finished.usage.completion_tokens == len(expected)


async def test_a_stop_string_may_begin_before_and_end_behind(workers: Workers, model_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    before, behind = "one two ENO", "UGH three four five six seven eight nine ten"
    await workers.disaggregated(vocab_size=1200)
    tokens: list[int] = tokenizer.encode(before + behind).ids
    for worker in (*workers.prefills, *workers.decodes):
        do(_engine(worker), "script", prompt=PROMPT, tokens=tokens)
    sampling = SamplingParams(max_new_tokens=len(tokens), temperature=0, stop=["ENOUGH"])
    answer = await workers.interrupted(len(before), sampling=sampling)
    assert answer.text == "one two "
    assert answer.finished.matched_stop == "ENOUGH"
    assert answer.finished.migrations == 1
    assert answer.finished.usage.completion_tokens == len("one two ENOUGH")


async def test_text_that_was_held_back_for_a_stop_string_is_not_lost(workers: Workers, model_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    text = "one two ENO" + "rmous three four five six"
    await workers.disaggregated(vocab_size=1200)
    tokens: list[int] = tokenizer.encode(text).ids
    for worker in (*workers.prefills, *workers.decodes):
        do(_engine(worker), "script", prompt=PROMPT, tokens=tokens)
    sampling = SamplingParams(max_new_tokens=len(tokens), temperature=0, stop=["ENOUGH"])
    answer = await workers.interrupted(len("one two ENO"), sampling=sampling)
    assert (answer.text, answer.token_ids) == (text, tokens)


INEXACT = [
    (SamplingParams(max_new_tokens=LENGTH, temperature=0, frequency_penalty=0.5), "sampling.frequency_penalty"),
    (SamplingParams(max_new_tokens=LENGTH, temperature=0, presence_penalty=-0.5), "sampling.presence_penalty"),
    (SamplingParams(max_new_tokens=LENGTH, temperature=0, repetition_penalty=1.1), "sampling.repetition_penalty"),
    (SamplingParams(max_new_tokens=LENGTH, temperature=0.7), "sampling.temperature without sampling.seed"),
]


@pytest.mark.parametrize(
    ("sampling", "why"),
    [*INEXACT, (SamplingParams(max_new_tokens=LENGTH, temperature=0, regex="a+"), "sampling.regex")],
)
async def test_what_could_not_go_on_exactly_ends_with_a_word(
    workers: Workers, sampling: SamplingParams, why: str
) -> None:
    before = counted("inexact")
    await workers.disaggregated(grammars=True)
    answer = Answer()
    with pytest.raises(RequestError) as caught:
        await workers.interrupted(into=answer, sampling=sampling)
    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, Reason.NOT_MIGRATABLE)
    assert why in error.message
    assert (error.leg, bool(error.worker)) == ("decode", True)
    assert counted("inexact") == before + 1
    await workers.all_let_go()


@pytest.mark.parametrize(("sampling", "why"), INEXACT)
async def test_a_client_may_allow_it(workers: Workers, sampling: SamplingParams, why: str) -> None:
    await workers.disaggregated()
    answer = await workers.interrupted(sampling=sampling, allow_inexact_migration=True)
    assert (len(answer.token_ids), answer.finished.migrations) == (LENGTH, 1)


async def test_a_grammar_would_begin_anew_whatever_the_client_allows(workers: Workers) -> None:
    await workers.disaggregated(grammars=True)
    sampling = SamplingParams(max_new_tokens=LENGTH, temperature=0, regex="a+")
    with pytest.raises(RequestError) as caught:
        await workers.interrupted(sampling=sampling, allow_inexact_migration=True)
    assert caught.value.reason is Reason.NOT_MIGRATABLE


async def test_it_may_be_switched_off(etcd_endpoint: str, model_folder: Path) -> None:
    async with limited(etcd_endpoint, model_folder, max_migrations=0) as workers:
        await workers.disaggregated()
        answer = Answer()
        with pytest.raises(RequestError) as caught:
            await workers.interrupted(into=answer)
        assert caught.value.reason is Reason.ENGINE_DEAD
        assert answer.token_ids == ORACLE[: len(answer.token_ids)]


async def test_no_more_often_than_the_flag_says(etcd_endpoint: str, model_folder: Path) -> None:
    async with limited(etcd_endpoint, model_folder, max_migrations=1) as workers:
        before = counted("limit")
        await workers.disaggregated(decodes=3)
        answer = Answer()
        with pytest.raises(RequestError) as caught:
            await workers.interrupted(FAILS_AT, 2 * FAILS_AT, into=answer)
        assert caught.value.reason is Reason.ENGINE_DEAD
        assert len(answer.token_ids) >= 2 * FAILS_AT, "it moved once"
        assert answer.token_ids == ORACLE[: len(answer.token_ids)]
        assert counted("limit") == before + 1


async def test_with_nobody_left_it_ends_with_the_workers_error(workers: Workers) -> None:
    before = counted("failed")
    await workers.disaggregated(decodes=1)
    with pytest.raises(RequestError) as caught:
        await workers.interrupted()
    assert (caught.value.reason, caught.value.leg) == (Reason.ENGINE_DEAD, "decode")
    assert counted("failed") == before + 1
    await workers.all_let_go()


async def read_until_death(cluster: FakeCluster, decodes: list[HostedWorker], prompt: list[int]) -> None:
    """The worker dies with the first token."""
    died = False
    async for _ in cluster.client.stream(token_ids=prompt, sampling=GREEDY):
        if not died:
            died = True
            next(worker for worker in decodes if worker.engine.live).engine.die("scheduler killed")


async def test_a_prompt_that_has_grown_too_long_ends_with_the_workers_error(cluster: FakeCluster) -> None:
    """The prompt is as long as prefill takes; with one token more it is too long."""
    prefill = await cluster.start_worker(Role.PREFILL, pool_tokens=48)
    decodes = [await cluster.start_worker(Role.DECODE, Behaviour(token_seconds=STEP_SECONDS)) for _ in range(2)]
    await cluster.routable(3)
    prompt = list(range(prefill.engine.info().max_prompt_tokens))
    with pytest.raises(RequestError) as caught:
        await read_until_death(cluster, decodes, prompt)
    assert caught.value.reason is Reason.ENGINE_DEAD
    assert len(prefill.engine.seen) == 1
    await eventually(lambda: not any(worker.engine.live for worker in (prefill, *decodes)))


async def test_a_worker_that_shuts_down_hands_its_answers_on(workers: Workers) -> None:
    await workers.start(Role.PREFILL)
    await workers.start(Role.DECODE, 2, host={"drain_timeout": 0.05})
    await workers.cluster.routable(3)
    answer, stopped = Answer(), False
    async for chunk in workers.cluster.client.stream(token_ids=PROMPT, sampling=GREEDY):
        answer.add(chunk)
        if not stopped and len(answer.token_ids) >= FAILS_AT:
            stopped = True
            (leaving,) = workers.busy
            leaving.host.stop()
    assert (answer.token_ids, answer.finished.migrations) == (ORACLE, 1)


async def test_a_prefill_worker_that_dies_behind_the_first_token_is_not_missed(workers: Workers) -> None:
    await workers.disaggregated(decodes=1)
    answer, died = Answer(), False
    async for chunk in workers.cluster.client.stream(token_ids=PROMPT, sampling=GREEDY):
        answer.add(chunk)
        if not died:
            died = True
            do(_engine(workers.prefills[0]), "crash", how="scheduler")
            do(_engine(workers.decodes[0]), "slow", factor=FAST)
    assert (answer.token_ids, answer.finished.migrations) == (ORACLE, 0)


@pytest.mark.parametrize("link", ["session"])
async def test_cancel_wins_while_it_waits_for_other_workers(workers: Workers) -> None:
    await workers.disaggregated(max_running_requests=1)
    answers = {name: Answer() for name in ("moves", "stays")}

    async def read(name: str) -> None:
        async for chunk in workers.cluster.client.stream(
            token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=1000, temperature=0), request_id=name
        ):
            answers[name].add(chunk)

    moves = asyncio.create_task(read("moves"))
    await eventually(lambda: len(answers["moves"].token_ids) >= FAILS_AT)
    (victim,) = workers.busy
    stays = asyncio.create_task(read("stays"))
    await eventually(lambda: answers["stays"].token_ids)
    do(_engine(victim), "crash", how="scheduler")
    await eventually(lambda: queued() == 1, what="it waits for the other one's slot")
    assert await workers.cluster.client.abort("moves")
    with pytest.raises(RequestError) as caught:
        await moves
    assert caught.value.code is grpc.StatusCode.CANCELLED
    assert await workers.cluster.client.abort("stays")
    await asyncio.gather(stays, return_exceptions=True)
    await workers.all_let_go()


async def test_each_choice_migrates_by_itself(workers: Workers) -> None:
    await workers.disaggregated()
    answer, failed = Answer(), False
    async for chunk in workers.cluster.client.stream(token_ids=PROMPT, sampling=GREEDY, n=4):
        answer.add(chunk)
        begun = sum(len(choice.token_ids) >= FAILS_AT for choice in answer.choices)
        if not failed and begun == 4:
            failed = True
            workers.fail(workers.busy[0])
    assert [choice.token_ids for choice in answer.choices] == [ORACLE] * 4
    migrations = [choice.finished.migrations for choice in answer.choices]
    assert set(migrations) <= {0, 1}
    assert sum(migrations) >= 1


async def test_an_http_client_sees_one_unbroken_stream(workers: Workers, model_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    text = "It was the best of times, it was the worst of times."
    await workers.disaggregated(vocab_size=1200)
    for worker in (*workers.prefills, *workers.decodes):
        do(_engine(worker), "script", prompt=PROMPT, tokens=tokenizer.encode(text).ids)
    body = {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": len(text),
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    url = f"http://127.0.0.1:{workers.cluster.frontend.http_port}/v1/completions"
    events: list[Any] = []
    async with httpx.AsyncClient(timeout=30) as http, http.stream("POST", url, json=body) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            events.append(json.loads(line.removeprefix("data: ")))
            if len(events) == FAILS_AT:
                workers.fail(workers.busy[0])
    assert not any("error" in event for event in events)
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == text
    assert len({event["id"] for event in events}) == 1
    assert [event["usage"]["completion_tokens"] for event in events if event.get("usage")][-1] == len(text)


async def test_a_worker_takes_no_word_about_migration(workers: Workers) -> None:
    await workers.start(Role.AGGREGATED, decode_step=0.0002)
    await workers.cluster.routable(1)
    async with Client(workers.decodes[0].endpoint) as client:
        with pytest.raises(RequestError) as caught:
            await client.generate(token_ids=PROMPT, sampling=GREEDY, allow_inexact_migration=False)
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, "allow_inexact_migration")
