"""WorkerSessionService: every leg that one frontend runs here, over one stream.

A message costs grpc.aio about 50 microseconds. One for each turn of the event loop, with the new tokens of every leg in
it, spreads that over all legs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog

from kvbaton.errors import Reason, RequestError, cancelled, invalid
from kvbaton.v1 import generate_pb2, session_pb2, session_pb2_grpc
from services.telemetry.tracing import check_headers
from services.worker.core import WorkerCore
from services.worker.credits import Entry
from services.worker.leg_runner import LegRunner
from services.worker.load import LegLoad

log = structlog.get_logger()

DEFAULT_HEARTBEAT = 0.5
_SHORTEST_HEARTBEAT, _LONGEST_HEARTBEAT = 0.05, 10.0


class SessionServicer(session_pb2_grpc.WorkerSessionServiceServicer):
    """One per worker."""

    def __init__(self, core: WorkerCore, runner: LegRunner) -> None:
        self._core = core
        self._runner = runner

    async def Connect(  # type: ignore[override]
        self,
        request_iterator: AsyncIterator[session_pb2.ConnectRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[session_pb2.ConnectResponse]:
        """Serves one frontend until either side ends the stream."""
        first = await anext(aiter(request_iterator), session_pb2.ConnectRequest())
        session = Session(self._core, self._runner, self._opened(first))
        reading = asyncio.create_task(session.read(request_iterator), name="session messages")
        asking = asyncio.create_task(session.ask_engine(), name="session load")
        try:
            async for response in session.responses(reading):
                yield response
        finally:
            reading.cancel()
            asking.cancel()
            await session.close()

    def _opened(self, first: session_pb2.ConnectRequest) -> float:
        """Checks the first message; returns the heartbeat in seconds."""
        core = self._core
        if not first.HasField("open") or _says_something(first):
            raise invalid("open", "the first message opens the session, and says nothing else")
        if first.open.incarnation != core.incarnation:
            raise RequestError(
                grpc.StatusCode.FAILED_PRECONDITION,
                Reason.PEER_REPLACED,
                f"{core.role} worker {core.instance_id} is incarnation {core.incarnation.uuid}",
                leg=core.role,
                worker=core.instance_id,
            )
        if not first.open.HasField("heartbeat"):
            return DEFAULT_HEARTBEAT
        heartbeat = first.open.heartbeat.ToNanoseconds() / 1e9
        if not _SHORTEST_HEARTBEAT <= heartbeat <= _LONGEST_HEARTBEAT:
            raise invalid(
                "open.heartbeat", f"{heartbeat:g} s is not in [{_SHORTEST_HEARTBEAT:g}, {_LONGEST_HEARTBEAT:g}]"
            )
        return heartbeat


class Session:
    """The legs of one frontend, and what it has not been told of them yet."""

    def __init__(self, core: WorkerCore, runner: LegRunner, heartbeat: float) -> None:
        self._core = core
        self._runner = runner
        self._heartbeat = heartbeat
        self._legs: dict[int, asyncio.Task[None]] = {}
        self._request_ids: dict[int, str] = {}
        self._sent_tokens: dict[int, int] = {}
        self._news: dict[int, session_pb2.LegUpdate] = {}
        self._wake = asyncio.Event()
        self._wake.set()
        self._credits = None if core.window is None else core.window.account(self._wake.set)
        self._last_submitted = 0
        # Of the load that the frontend was told last.
        self._load_version = -1

    async def read(self, messages: AsyncIterator[session_pb2.ConnectRequest]) -> None:
        """Takes what the frontend says, without waiting for any of it, until it has no more to say."""
        async for message in messages:
            if message.HasField("open"):
                raise invalid("open", "a session is opened once")
            if not _says_something(message):
                raise invalid("submits", "missing: one of aborts, submits or credits")
            for leg in message.aborts:
                await self._abort(leg)
            for submit in message.submits:
                self._submit(submit)
            if message.HasField("credits"):
                self._ask(message.credits)

    async def ask_engine(self) -> None:
        """Keeps what the engine says of its load as fresh as a heartbeat, for ever."""
        while True:
            await self._core.load.ask_engine(self._core.loads, older_than=self._heartbeat / 2)
            await asyncio.sleep(self._heartbeat)

    async def responses(self, reading: asyncio.Task[None]) -> AsyncIterator[session_pb2.ConnectResponse]:
        """One message whenever there is news, and a heartbeat otherwise; ends when `reading` does."""
        reading.add_done_callback(lambda _: self._wake.set())
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat):
                    await self._wake.wait()
            # The rest of this turn: an engine step wakes its legs one after the other.
            await asyncio.sleep(0)
            self._wake.clear()
            yield self._take_news()
            if reading.done():
                reading.result()
                return

    async def close(self) -> None:
        """Aborts what is left. The engine lets go in its own time; `WorkerCore.legs` waits for it."""
        tasks = list(self._legs.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._credits is not None:
            self._credits.close()

    def _ask(self, credits: session_pb2.AskCredits) -> None:
        if self._credits is None:
            raise invalid("credits", "legs need no credit on a prefill worker")
        self._credits.ask(up_to=credits.up_to, returned=credits.returned)
        # The answer is due now, also when it is that nothing is free.
        self._wake.set()

    def _submit(self, submit: session_pb2.SubmitLeg) -> None:
        if submit.leg in self._legs or submit.leg in self._sent_tokens:
            raise invalid("submits.leg", f"{submit.leg} was used before in this session")
        self._request_ids[submit.leg] = submit.request.request_id
        self._sent_tokens[submit.leg] = 0
        self._last_submitted = submit.leg
        try:
            # Here and not in the task: the slot is taken from now on.
            entry = None if self._credits is None else self._credits.spend()
        except RequestError as error:
            self._refuse(submit.leg, error)
            return
        load = self._core.expect(submit.request, cached_tokens=submit.cached_tokens)
        task = asyncio.create_task(self._run(submit, entry, load), name=f"leg {submit.leg}")
        self._legs[submit.leg] = task
        # Not in the task itself: one that is cancelled before its first step runs no line of its own.
        task.add_done_callback(lambda task: self._ended(submit.leg, task, entry, load))

    async def _abort(self, leg: int) -> None:
        if leg in self._legs and not await self._core.legs.abort(self._request_ids[leg]):
            # Not admitted yet: its checks still wait for the registry.
            self._legs[leg].cancel()

    def _refuse(self, leg: int, error: RequestError) -> None:
        core = self._core
        self._fail(leg, error.with_context(leg=core.role, worker=core.instance_id))
        del self._request_ids[leg]

    async def _run(self, submit: session_pb2.SubmitLeg, entry: Entry | None, load: LegLoad) -> None:
        leg = submit.leg

        async def accepted() -> None:
            self._update(leg).accepted = True
            if entry is not None:
                entry.done()

        try:
            trace_headers = check_headers(submit.trace_headers, "submits.trace_headers")
            run = self._runner.run(submit.request, trace_headers, accepted, load)
            async with contextlib.aclosing(run) as responses:  # type: ignore[type-var]
                async for response in responses:
                    self._add(leg, response)
        except RequestError as error:
            self._fail(leg, error)
        except Exception as error:
            log.error("leg failed", exc_info=error)
            self._fail(leg, RequestError(grpc.StatusCode.INTERNAL, Reason.INTERNAL, "internal error"))

    def _ended(self, leg: int, task: asyncio.Task[None], entry: Entry | None, load: LegLoad) -> None:
        if task.cancelled():
            self._fail(leg, cancelled("aborted"))
        del self._legs[leg], self._request_ids[leg]
        if entry is not None:
            entry.done()
        load.leave()
        if leg not in self._news:
            # Its last word has been sent already: the engine took longer to let go of it.
            del self._sent_tokens[leg]

    def _add(self, leg: int, response: generate_pb2.GenerateResponse) -> None:
        update = self._update(leg)
        update.token_ids.extend(response.token_ids)
        update.logprobs.extend(response.logprobs)
        if response.HasField("finished"):
            update.finished.CopyFrom(response.finished)

    def _fail(self, leg: int, error: RequestError) -> None:
        self._update(leg).error = error.to_rpc_status().SerializeToString()

    def _update(self, leg: int) -> session_pb2.LegUpdate:
        """The leg's update of this turn."""
        update = self._news.get(leg)
        if update is None:
            update = self._news[leg] = session_pb2.LegUpdate(leg=leg, first_token=self._sent_tokens[leg])
            self._wake.set()
        return update

    def _take_news(self) -> session_pb2.ConnectResponse:
        news, self._news = self._news, {}
        for leg, update in news.items():
            if leg in self._legs:
                self._sent_tokens[leg] += len(update.token_ids)
            else:
                del self._sent_tokens[leg]
        response = session_pb2.ConnectResponse(
            updates=news.values(), state=self._core.lifecycle.state, live_legs=len(self._core.legs)
        )
        if (silence := self._core.legs.engine_silence) is not None:
            response.engine_silence.FromNanoseconds(int(silence * 1e9))
        if (window := self._core.window) is not None and self._credits is not None:
            response.credits_granted = self._credits.granted
            response.window, response.free_slots = window.size, self._credits.tell_free()
        # What the engine alone changes waits for the next message, which is never far away.
        if self._load_version != (version := self._core.load.version):
            self._load_version = version
            response.load.through_leg = self._last_submitted
            response.load.ranks.extend(self._core.load.ranks())
        return response


def _says_something(message: session_pb2.ConnectRequest) -> bool:
    """Beyond opening the session."""
    return bool(message.aborts or message.submits) or message.HasField("credits")
