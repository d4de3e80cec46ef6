"""One session per worker: opening, one message for many legs, silence, and what a lost session does."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.rpc import status_pb2

from kvbaton.client import Client, SamplingParams
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import generate_pb2, session_pb2, session_pb2_grpc, worker_pb2
from services.decode.contract import AggregatedContract
from services.frontend.link.protocol import LegEvent, LegFailed
from services.frontend.link.session import SessionLink
from services.frontend.link.streams import StreamLink
from services.requests import Role, Sampling
from services.transport import make_channel
from services.worker.engines.simulated.oracle import expected_tokens as simulated_tokens
from services.worker.leg_runner import LegRunner
from services.worker.servicers.session import Session
from tests.support.cluster import FakeCluster, HostedWorker
from tests.support.fake_engine import expected_tokens
from tests.support.ports import free_port
from tests.support.processes import Processes, answering
from tests.support.waiting import eventually

HEARTBEAT = 0.5
SLACK = 3.0


def leg_request(leg: int, prompt: list[int], count: int) -> generate_pb2.GenerateRequest:
    return generate_pb2.GenerateRequest(
        request_id=f"leg-{leg}",
        token_ids=generate_pb2.TokenIds(ids=prompt),
        sampling=generate_pb2.SamplingParams(max_new_tokens=count, temperature=0),
    )


class RawSession:
    """A session without a frontend."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = session_pb2_grpc.WorkerSessionServiceStub(channel).Connect()

    async def open(self, worker: HostedWorker) -> None:
        incarnation = worker.host.incarnation
        await self.call.write(session_pb2.ConnectRequest(open=session_pb2.OpenSession(incarnation=incarnation)))

    async def ask(self, up_to: int, returned: int = 0) -> None:
        asked = session_pb2.AskCredits(up_to=up_to, returned=returned)
        await self.call.write(session_pb2.ConnectRequest(credits=asked))

    async def have(self, credits: int) -> None:
        """Asks for so many credits and waits for them."""
        await self.ask(credits)
        while (await self.read()).credits_granted < credits:
            pass

    async def submit(self, leg: int, prompt: list[int], count: int) -> None:
        submit = session_pb2.SubmitLeg(leg=leg, request=leg_request(leg, prompt, count))
        await self.call.write(session_pb2.ConnectRequest(submits=[submit]))

    async def abort(self, leg: int) -> None:
        await self.call.write(session_pb2.ConnectRequest(aborts=[leg]))

    async def read(self) -> session_pb2.ConnectResponse:
        response = await self.call.read()
        assert isinstance(response, session_pb2.ConnectResponse), "the session has ended"
        return response

    async def responses(self) -> AsyncIterator[session_pb2.ConnectResponse]:
        while True:
            yield await self.read()

    async def refused(self) -> RequestError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in self.call:
                pass
        return RequestError.from_rpc_error(caught.value)


@pytest_asyncio.fixture
async def worker(cluster: FakeCluster) -> HostedWorker:
    worker = await cluster.start_worker(Role.AGGREGATED)
    await cluster.routable(1)
    return worker


@pytest_asyncio.fixture
async def raw(worker: HostedWorker) -> AsyncIterator[RawSession]:
    async with grpc.aio.insecure_channel(worker.endpoint) as channel:
        yield RawSession(channel)


async def test_the_first_message_must_open(raw: RawSession) -> None:
    await raw.submit(1, [5], 1)
    error = await raw.refused()
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "open")


async def test_the_first_message_only_opens(raw: RawSession, worker: HostedWorker) -> None:
    opening = session_pb2.OpenSession(incarnation=worker.host.incarnation)
    await raw.call.write(session_pb2.ConnectRequest(open=opening, aborts=[1]))
    assert (await raw.refused()).field == "open"


async def test_a_session_is_opened_once(raw: RawSession, worker: HostedWorker) -> None:
    await raw.open(worker)
    await raw.open(worker)
    assert (await raw.refused()).field == "open"


async def test_a_message_that_says_nothing_is_refused(raw: RawSession, worker: HostedWorker) -> None:
    """As one from a frontend would be whose commands this worker doesn't know."""
    await raw.open(worker)
    await raw.call.write(session_pb2.ConnectRequest())
    error = await raw.refused()
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "submits")


async def test_one_message_ends_legs_and_brings_others(raw: RawSession, worker: HostedWorker) -> None:
    worker.engine.behaviour.token_seconds = 0.05
    await raw.open(worker)
    await raw.have(3)
    await raw.submit(1, [5], 1000)
    submits = [session_pb2.SubmitLeg(leg=leg, request=leg_request(leg, [5], 2)) for leg in (2, 3)]
    await raw.call.write(session_pb2.ConnectRequest(aborts=[1], submits=submits))
    ended: dict[int, bool] = {}
    while len(ended) < 3:
        for update in (await raw.read()).updates:
            if update.error or update.HasField("finished"):
                ended[update.leg] = update.HasField("finished")
    assert ended == {1: False, 2: True, 3: True}


async def test_a_session_with_another_incarnation_is_refused(raw: RawSession) -> None:
    incarnation = worker_pb2.Incarnation(created_us=1, uuid="0" * 32)
    await raw.call.write(session_pb2.ConnectRequest(open=session_pb2.OpenSession(incarnation=incarnation)))
    assert (await raw.refused()).reason is Reason.PEER_REPLACED


async def test_heartbeats_come_without_news(raw: RawSession, worker: HostedWorker) -> None:
    await raw.open(worker)
    async with asyncio.timeout(HEARTBEAT * 4 * SLACK):
        for _ in range(4):
            response = await raw.read()
            assert response.state == worker_pb2.WORKER_STATE_SERVING
            assert list(response.updates) == []


async def test_many_legs_share_messages_and_each_is_whole(raw: RawSession, worker: HostedWorker) -> None:
    worker.engine.behaviour.token_seconds, worker.engine.behaviour.in_step = 0.05, True
    await raw.open(worker)
    await raw.have(32)
    for leg in range(1, 33):
        await raw.submit(leg, [leg, leg + 1], 20)
    tokens: dict[int, list[int]] = {leg: [] for leg in range(1, 33)}
    ended: set[int] = set()
    messages = 0
    async for response in raw.responses():
        messages += bool(response.updates)
        for update in response.updates:
            assert update.first_token == len(tokens[update.leg]), "no gap, no repeat"
            assert update.leg not in ended
            tokens[update.leg].extend(update.token_ids)
            if update.HasField("finished"):
                ended.add(update.leg)
        if len(ended) == 32:
            break
    assert all(tokens[leg] == expected_tokens([leg, leg + 1], 20) for leg in tokens)
    assert messages < 32 * 20 / 4, f"{messages} messages for {32 * 20} tokens"


async def test_a_bad_leg_fails_alone(raw: RawSession, worker: HostedWorker) -> None:
    await raw.open(worker)
    await raw.have(2)
    await raw.submit(1, [], 1)
    await raw.submit(2, [5], 3)
    updates: dict[int, session_pb2.LegUpdate] = {}
    async for response in raw.responses():
        for update in response.updates:
            updates.setdefault(update.leg, session_pb2.LegUpdate()).MergeFrom(update)
        if len(updates) == 2 and updates[2].HasField("finished"):
            break
    error = RequestError.from_rpc_status(status_pb2.Status.FromString(updates[1].error))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "token_ids")
    assert list(updates[2].token_ids) == expected_tokens([5], 3)


async def test_the_end_of_a_session_aborts_its_legs(raw: RawSession, worker: HostedWorker) -> None:
    worker.engine.behaviour.hang = True
    await raw.open(worker)
    await raw.have(2)
    await raw.submit(1, [5], 3)
    await eventually(lambda: worker.engine.live)
    raw.call.cancel()
    await eventually(lambda: not worker.engine.live, within=5)


async def test_abort_ends_one_leg(raw: RawSession, worker: HostedWorker) -> None:
    worker.engine.behaviour.hang = True
    await raw.open(worker)
    await raw.have(2)
    await raw.submit(1, [5], 3)
    await raw.submit(2, [6], 3)
    await eventually(lambda: len(worker.engine.live) == 2)
    await raw.abort(1)
    await eventually(lambda: len(worker.engine.live) == 1, within=5)


async def test_the_heartbeat_tells_how_long_the_engine_has_been_silent(raw: RawSession, worker: HostedWorker) -> None:
    worker.engine.behaviour.hang = True
    await raw.open(worker)
    await raw.have(2)
    await raw.submit(1, [5], 3)

    async def silence() -> bool:
        response = await raw.read()
        return response.live_legs == 1 and response.engine_silence.ToNanoseconds() > 0.5e9

    await eventually(silence, within=5)


def link_to(worker: HostedWorker, target: str, *, heartbeat: float) -> SessionLink:
    """A frontend's side of a session with the worker; `target` is its endpoint, or a way to it."""
    return SessionLink(
        make_channel(target),
        worker.host.incarnation,
        worker="worker",
        leg="aggregated",
        heartbeat=heartbeat,
        changed=lambda: None,
        credits_came=lambda: None,
    )


async def test_an_abort_never_overtakes_its_own_leg(cluster: FakeCluster, worker: HostedWorker) -> None:
    """The worker ignores aborts of legs that it doesn't know: the leg would run to its end."""
    link = link_to(worker, worker.endpoint, heartbeat=2.0)
    await eventually(lambda: link.healthy)
    free = link.free_slots
    link.ask(1)
    credit = await eventually(link.take)
    worker.engine.behaviour.hang = True
    heard: list[LegEvent] = []
    request = generate_pb2.GenerateRequest(request_id="0" * 32, token_ids=generate_pb2.TokenIds(ids=[5]))
    leg = link.submit(request, heard.append, credit, {})
    leg.abort()
    async with asyncio.timeout(2):
        await leg.ended()
    await asyncio.sleep(0.2)
    assert [type(event) for event in heard] == [LegFailed]
    assert worker.engine.seen == []
    await eventually(lambda: link.free_slots == free, what="its credit has gone back")
    await link.close()


class Cut:
    """A TCP relay to a worker; `cut` breaks what runs through it, and the next connection works again."""

    def __init__(self, port: int) -> None:
        self.port = free_port()
        self._to = port
        self._writers: list[asyncio.StreamWriter] = []

    async def serve(self) -> asyncio.Server:
        return await asyncio.start_server(self._relay, "127.0.0.1", self.port)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
        self._writers += [writer, far_writer]
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def test_a_session_stands_again_after_its_connection_was_cut(worker: HostedWorker) -> None:
    """The worker is the same process: only the way to it broke. Idle, and with legs that wait to be sent."""
    relay = Cut(worker.config.port)
    server = await relay.serve()
    link = link_to(worker, f"127.0.0.1:{relay.port}", heartbeat=0.5)
    try:
        for _ in range(3):
            await eventually(lambda: link.healthy, what="the session stands")
            link.ask(1)
            credit = await eventually(link.take)
            heard: list[LegEvent] = []
            request = generate_pb2.GenerateRequest(request_id=uuid.uuid4().hex)
            leg = link.submit(request, heard.append, credit, {})
            relay.cut()
            await eventually(lambda: not link.healthy, what="the cut is seen")
            leg.abort()
            await asyncio.wait_for(leg.ended(), 10)
            assert [type(event) for event in heard][-1] is LegFailed
        await eventually(lambda: link.healthy, what="the session stands")
    finally:
        await link.close()
        server.close()


async def test_a_leg_for_a_closed_link_fails_at_once(worker: HostedWorker) -> None:
    for link in (
        link_to(worker, worker.endpoint, heartbeat=0.5),
        StreamLink(make_channel(worker.endpoint), worker="worker", leg="aggregated", total_timeout=10),
    ):
        await eventually(lambda link=link: link.healthy)
        await link.close()
        heard: list[LegEvent] = []
        leg = link.submit(generate_pb2.GenerateRequest(request_id="0" * 32), heard.append, None, {})
        await asyncio.wait_for(leg.ended(), 1)
        await eventually(lambda heard=heard: heard, within=1)
        (failed,) = heard
        assert isinstance(failed, LegFailed)
        assert failed.error.reason is Reason.WORKER_UNREACHABLE


async def test_an_abort_right_behind_its_leg_ends_it_and_frees_its_slot(worker: HostedWorker) -> None:
    """The leg's task is cancelled before its first step."""
    session = Session(worker.host._core, LegRunner(worker.host._core, AggregatedContract()), heartbeat=0.05)
    window = worker.host._core.window
    assert window is not None
    assert session._credits is not None
    session._credits.ask(up_to=1, returned=0)
    free = window.free
    session._submit(session_pb2.SubmitLeg(leg=1, request=generate_pb2.GenerateRequest(request_id="quick")))
    await session._abort(1)
    await eventually(lambda: not session._legs)
    (update,) = session._take_news().updates
    error = RequestError.from_rpc_status(status_pb2.Status.FromString(update.error))
    assert error.code is grpc.StatusCode.CANCELLED
    assert not session._sent_tokens
    assert (window.entering, window.free) == (0, free + 1)


async def test_nothing_is_kept_of_a_leg_whose_engine_lets_go_late(worker: HostedWorker) -> None:
    class LateRunner:
        async def run(self, request: object, headers: object, accepted: object, load: object) -> AsyncIterator[object]:
            yield generate_pb2.GenerateResponse(token_ids=[1], finished=generate_pb2.Finished())
            await asyncio.sleep(0.1)

    async def messages() -> AsyncIterator[session_pb2.ConnectRequest]:
        yield session_pb2.ConnectRequest(credits=session_pb2.AskCredits(up_to=1))
        yield session_pb2.ConnectRequest(submits=[session_pb2.SubmitLeg(leg=1)])
        await asyncio.sleep(0.3)

    session = Session(worker.host._core, cast("LegRunner", LateRunner()), heartbeat=0.05)
    reading = asyncio.create_task(session.read(messages()))
    updates = [update async for response in session.responses(reading) for update in response.updates]
    assert [update.HasField("finished") for update in updates] == [True]
    assert not session._sent_tokens


@pytest_asyncio.fixture
async def processes(etcd_endpoint: str, tmp_path: Path) -> AsyncIterator[Processes]:
    processes = Processes(etcd_endpoint, tmp_path)
    processes.frontend("--link", "session", "--heartbeat", str(HEARTBEAT))
    try:
        yield processes
    finally:
        await asyncio.to_thread(processes.stop)


PROMPT = list(range(100, 160))
GREEDY = SamplingParams(max_new_tokens=20, temperature=0)


async def test_a_frozen_worker_costs_its_requests_two_heartbeats(processes: Processes) -> None:
    processes.worker("prefill", "prefill", sim="prefill_base=0.5")
    processes.worker("decode", "decode", sim="release_timeout=4")
    async with Client(f"127.0.0.1:{processes.grpc_port}", timeout=60) as client:
        await answering(client)
        running = asyncio.create_task(client.generate(token_ids=PROMPT, sampling=GREEDY))
        await asyncio.sleep(0.2)
        processes.signal("prefill", signal.SIGSTOP)
        frozen = time.monotonic()
        with pytest.raises(RequestError) as caught:
            await running
        assert (caught.value.reason, caught.value.leg) == (Reason.WORKER_SILENT, "prefill")
        assert time.monotonic() - frozen < 2 * HEARTBEAT * SLACK
        with pytest.raises(RequestError) as refused:
            await client.generate(token_ids=PROMPT, sampling=GREEDY)
        assert refused.value.reason is Reason.NO_PREFILL_WORKER, "a suspect worker gets no new work"
        processes.signal("prefill", signal.SIGCONT)
        await answering(client)
        answer = await client.generate(token_ids=PROMPT, sampling=GREEDY)
        assert answer.token_ids == simulated_tokens(PROMPT, Sampling(max_new_tokens=20, temperature=0.0))


async def test_a_frozen_worker_costs_no_request_while_another_is_there(processes: Processes) -> None:
    for name in ("one", "two"):
        processes.worker(f"prefill-{name}", "prefill", sim="prefill_base=0.3")
    processes.worker("decode", "decode", sim="release_timeout=4")
    async with Client(f"127.0.0.1:{processes.grpc_port}", timeout=60) as client:
        await answering(client)

        async def both() -> bool:
            status = await client.status()
            return sum(worker.routable for worker in status.workers) == 3

        await eventually(both, within=30)
        prompts = [[*PROMPT, number] for number in range(8)]
        running = [asyncio.create_task(client.generate(token_ids=prompt, sampling=GREEDY)) for prompt in prompts]
        await asyncio.sleep(0.1)
        processes.signal("prefill-one", signal.SIGSTOP)
        answers = await asyncio.gather(*running)
        sampling = Sampling(max_new_tokens=20, temperature=0.0)
        assert [answer.token_ids for answer in answers] == [simulated_tokens(prompt, sampling) for prompt in prompts]
