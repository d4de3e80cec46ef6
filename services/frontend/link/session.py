"""`WorkerLink` over one WorkerSessionService stream for all legs of a worker.

A lost stream fails every leg on it; there is no resume. A worker that is silent for two heartbeats is suspect: its legs
fail for their requests at once, although it may come back, and it gets no new ones until it speaks again.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping

import grpc
import grpc.aio
import structlog
from google.rpc import status_pb2

from kvbaton.errors import Reason, RequestError, cancelled
from kvbaton.v1 import generate_pb2, generate_pb2_grpc, session_pb2, session_pb2_grpc, worker_pb2
from services.frontend.link.broken import STREAM_BROKE, why_broken
from services.frontend.link.credits import SessionCredits
from services.frontend.link.load import LegShare, WorkerLoad
from services.frontend.link.outgoing import Outgoing
from services.frontend.link.proof import RELEASE_DEADLINE, prove_ended
from services.frontend.link.protocol import Credit, LegAccepted, LegFailed, LegFinished, LegSink, LegTokens

log = structlog.get_logger()

# How many heartbeats a worker may miss.
SILENT_HEARTBEATS = 2
_RECONNECT_SECONDS = 0.1


class SessionLink:
    """One channel to one incarnation of a worker. `worker` and `leg` name it in errors; `heartbeat` is in seconds.

    `changed` is called when `healthy` has changed, `credits_came` when there is something to `take`, or to ask for.
    `load` hears what the worker reports.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        incarnation: worker_pb2.Incarnation,
        *,
        worker: str,
        leg: str,
        heartbeat: float,
        changed: Callable[[], None],
        credits_came: Callable[[], None],
        load: WorkerLoad | None = None,
    ) -> None:
        self._channel = channel
        self._sessions = session_pb2_grpc.WorkerSessionServiceStub(channel)
        self._generate = generate_pb2_grpc.GenerateServiceStub(channel)
        self._worker, self._leg = worker, leg
        self._heartbeat = heartbeat
        self._changed = changed
        self._credits_came = credits_came
        self._load = load or WorkerLoad(1)
        self._opening = session_pb2.OpenSession(incarnation=incarnation)
        self._opening.heartbeat.FromNanoseconds(int(heartbeat * 1e9))
        self._credits = SessionCredits(0)
        self._outgoing = Outgoing(self._opening, self._credits)
        self._numbers = itertools.count(1)
        self._legs: dict[int, SessionLeg] = {}
        self._heard_at = 0.0
        self._healthy = False
        # Why there is none, as it was logged last.
        self._why = ""
        self._proving: set[asyncio.Task[None]] = set()
        self._tasks = [
            asyncio.create_task(self._keep_connected(), name=f"session {worker}"),
            asyncio.create_task(self._watch_silence(), name=f"silence {worker}"),
        ]

    @property
    def healthy(self) -> bool:
        """Whether the session stands and the worker has spoken lately."""
        return self._healthy

    @property
    def window(self) -> int:
        """See `WorkerLink`; 0 until the worker has said it."""
        return self._credits.window

    @property
    def free_slots(self) -> int:
        """See `WorkerLink`."""
        return self._credits.free_slots

    def ask(self, count: int) -> None:
        """See `WorkerLink`."""
        self._credits.ask(count)
        self._outgoing.credits_changed()

    def take(self) -> Credit | None:
        """See `WorkerLink`."""
        return self._credits.take()

    def give_back(self, credit: Credit) -> None:
        """See `WorkerLink`."""
        self._credits.give_back(credit)
        self._outgoing.credits_changed()

    def submit(
        self,
        request: generate_pb2.GenerateRequest,
        sink: LegSink,
        credit: Credit | None,
        trace_headers: Mapping[str, str],
        share: LegShare | None = None,
    ) -> SessionLeg:
        """See `WorkerLink`."""
        leg = SessionLeg(self, next(self._numbers), request, sink, credit, share)
        lost = credit is not None and credit.session != self._credits.session
        if lost or not self._healthy:
            if credit is not None:
                self.give_back(credit)
            asyncio.get_running_loop().call_soon(leg.fail, self._error(Reason.WORKER_UNREACHABLE, "no session with it"))
            leg.released.set()
            return leg
        self._legs[leg.number] = leg
        submit = session_pb2.SubmitLeg(leg=leg.number, request=request, trace_headers=trace_headers)
        if share is not None:
            share.sent(leg.number)
            submit.cached_tokens = share.cached_tokens
        self._outgoing.submit(submit)
        return leg

    def send_abort(self, number: int) -> None:
        """Ahead of every submit that waits to be sent. A leg that waits itself is never sent."""
        if number in self._legs and self._outgoing.abort(number):
            leg = self._legs.pop(number)
            if leg.credit is not None:
                self.give_back(leg.credit)
            leg.fail(cancelled("aborted before it was sent"))
            leg.released.set()

    async def close(self) -> None:
        """See `WorkerLink`."""
        self._healthy = False
        self._outgoing.close()
        for task in (*self._tasks, *self._proving):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._proving, return_exceptions=True)
        for leg in list(self._legs.values()):
            leg.fail(self._error(Reason.WORKER_UNREACHABLE, "the worker is gone"))
            leg.released.set()
        self._legs.clear()
        await self._channel.close()

    async def _keep_connected(self) -> None:
        while True:
            try:
                await self._session()
                why = "the worker ended the session"
            except STREAM_BROKE as error:
                why = why_broken(error)
            except Exception as error:  # whatever one message sets off, the worker must not be lost for ever
                log.exception("session failed", worker=self._worker)
                why = f"{type(error).__name__}: {error}"
            self._set_healthy(False, why)
            self._lose_legs(why)
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _session(self) -> None:
        """One stream, until it ends. Raises AioRpcError."""
        self._load.reset()
        self._credits = SessionCredits(self._credits.session + 1)
        self._outgoing = Outgoing(self._opening, self._credits)
        call = self._sessions.Connect(self._outgoing.messages())
        try:
            async for response in call:
                self._heard_at = time.monotonic()
                if response.HasField("load"):
                    self._load.report(response.load)
                credits_came = self._credits.heard(response)
                self._outgoing.credits_changed()
                self._set_healthy(True, "")
                for update in response.updates:
                    self._take(update)
                if credits_came:
                    self._credits_came()
        finally:
            self._outgoing.close()
            call.cancel()

    def _take(self, update: session_pb2.LegUpdate) -> None:
        leg = self._legs.get(update.leg)
        if leg is None:
            return
        if leg.take(update):
            del self._legs[update.leg]

    def _lose_legs(self, why: str) -> None:
        """No resume: every leg of the stream has failed. Whether the worker has let go of it must be proven."""
        legs, self._legs = list(self._legs.values()), {}
        for leg in legs:
            leg.fail(self._error(Reason.WORKER_UNREACHABLE, f"the session broke: {why}"))
            task = asyncio.create_task(self._prove(leg), name=f"prove {leg.request_id}")
            self._proving.add(task)
            task.add_done_callback(self._proving.discard)

    async def _prove(self, leg: SessionLeg) -> None:
        try:
            await prove_ended(self._generate, leg.request_id, worker=self._worker)
        finally:
            leg.released.set()

    async def _watch_silence(self) -> None:
        """A process that is frozen keeps its connection: only its silence shows it."""
        limit = SILENT_HEARTBEATS * self._heartbeat
        tick = self._heartbeat / 4
        while True:
            began = time.monotonic()
            await asyncio.sleep(tick)
            # While this process stood still it could not hear: the worker gets the time back.
            now = time.monotonic()
            self._heard_at = min(now, self._heard_at + max(0.0, now - began - tick))
            silent = now - self._heard_at
            if not self._healthy or silent <= limit:
                continue
            self._set_healthy(False, f"silent for {silent:.2f} s")
            for leg in self._legs.values():
                leg.fail(self._error(Reason.WORKER_SILENT, f"the worker has said nothing for {silent:.2f} s"))

    def _set_healthy(self, healthy: bool, why: str) -> None:
        if healthy == self._healthy:
            if why != self._why:  # it is tried ten times a second
                self._why = why
                log.info("no session", worker=self._worker, why=why)
            return
        self._healthy, self._why = healthy, why
        log.info("session stands" if healthy else "session lost", worker=self._worker, why=why)
        self._changed()

    def name(self, error: RequestError) -> RequestError:
        """The same error, of this worker's leg."""
        return error.with_context(leg=self._leg, worker=self._worker)

    def _error(self, reason: Reason, message: str) -> RequestError:
        return RequestError(
            grpc.StatusCode.UNAVAILABLE, reason, message, leg=self._leg, worker=self._worker, retry_after=1.0
        )


class SessionLeg:
    """One leg of a session; see `Leg`. `released` is set when the worker has let go of it."""

    def __init__(
        self,
        link: SessionLink,
        number: int,
        request: generate_pb2.GenerateRequest,
        sink: LegSink,
        credit: Credit | None,
        share: LegShare | None,
    ) -> None:
        self.number = number
        self.credit = credit
        self.request_id = request.request_id
        self.released = asyncio.Event()
        self._link = link
        self._room = request.bootstrap.room
        self._sink = sink
        self._share = share
        self._tokens = 0
        self._failed = False
        self._aborted = False

    def abort(self) -> None:
        """See `Leg`."""
        if not self._aborted:
            self._aborted = True
            self._link.send_abort(self.number)

    async def ended(self) -> None:
        """See `Leg`. A frozen worker's leg counts as ended after the release deadline."""
        try:
            async with asyncio.timeout(RELEASE_DEADLINE):
                await self.released.wait()
        except TimeoutError:
            log.warning("a leg's end is not proven", request_id=self.request_id, seconds=RELEASE_DEADLINE)

    def fail(self, error: RequestError) -> None:
        """The request hears of it, once; the worker may still run the leg."""
        if not self._failed:
            self._failed = True
            self._end_share()
            self._sink(LegFailed(self._link.name(error).with_context(room=self._room)))

    def take(self, update: session_pb2.LegUpdate) -> bool:
        """One update; True when it was the last."""
        last = bool(update.error) or update.HasField("finished")
        if last:
            self.released.set()
        if self._failed:
            return last
        if update.error:
            self.fail(RequestError.from_rpc_status(status_pb2.Status.FromString(update.error)))
            return True
        if update.first_token != self._tokens:
            message = f"token {update.first_token} came where {self._tokens} was due"
            self.fail(RequestError(grpc.StatusCode.INTERNAL, Reason.INTERNAL, message))
            self.abort()
            return last
        if update.accepted:
            self._sink(LegAccepted())
        self._tokens += len(update.token_ids)
        if self._share is not None and update.token_ids:
            self._share.prefilled()
        if last:
            self._failed = True
            self._end_share()
            self._sink(LegFinished.of(update))
        elif update.token_ids:
            self._sink(LegTokens.of(update))
        return last

    def _end_share(self) -> None:
        if self._share is not None:
            self._share.end()
