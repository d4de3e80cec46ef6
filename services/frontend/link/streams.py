"""`WorkerLink` with one GenerateService stream per leg."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import grpc
import grpc.aio

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import generate_pb2, generate_pb2_grpc
from services.frontend.link.load import LegShare
from services.frontend.link.proof import prove_ended
from services.frontend.link.protocol import (
    Credit,
    Leg,
    LegAccepted,
    LegEvent,
    LegFailed,
    LegFinished,
    LegSink,
    LegTokens,
)

# Seconds for the Abort call itself, and for the stream to end after it; then the call is cancelled from our side.
ABORT_CALL_TIMEOUT = 2.0
ABORT_END_TIMEOUT = 5.0
# The stream's own deadline comes this much later than the request's: ending legs in order is the owner's business.
_BACKSTOP = 30.0
UNLIMITED = 1 << 20


class StreamLink:
    """One channel to one worker; `worker` and `leg` name it in errors."""

    def __init__(self, channel: grpc.aio.Channel, *, worker: str, leg: str, total_timeout: float) -> None:
        self._channel = channel
        self._stub = generate_pb2_grpc.GenerateServiceStub(channel)
        self._worker, self._leg = worker, leg
        self._total_timeout = total_timeout
        self._legs: set[StreamLeg] = set()
        self._asked = 0
        self._closed = False

    @property
    def healthy(self) -> bool:
        """Streams per leg have no heartbeat: the channel's state has to do."""
        return True

    @property
    def window(self) -> int:
        """A stream needs no credit: what the worker's engine can't run waits in there."""
        return UNLIMITED

    @property
    def free_slots(self) -> int:
        """See `window`."""
        return UNLIMITED

    def ask(self, count: int) -> None:
        """Granted at once."""
        self._asked = count

    def take(self) -> Credit | None:
        """As many as were asked for."""
        if not self._asked:
            return None
        self._asked -= 1
        return Credit(session=0)

    def give_back(self, credit: Credit) -> None:
        """Nothing was reserved for it."""

    def submit(
        self,
        request: generate_pb2.GenerateRequest,
        sink: LegSink,
        credit: Credit | None,
        trace_headers: Mapping[str, str],
        share: LegShare | None = None,
    ) -> Leg:
        """See `WorkerLink`. There are no reports, so a share counts until its leg has ended."""
        if share is not None:
            sink = _telling(share, sink)
        if self._closed:
            error = RequestError(grpc.StatusCode.UNAVAILABLE, Reason.WORKER_UNREACHABLE, "the worker is gone")
            failed = LegFailed(error.with_context(leg=self._leg, worker=self._worker, room=request.bootstrap.room))
            asyncio.get_running_loop().call_soon(sink, failed)
            return _NeverSent()
        timeout = self._total_timeout + _BACKSTOP
        call = self._stub.Generate(request, timeout=timeout, metadata=tuple(trace_headers.items()))
        leg = StreamLeg(self._stub, call, request, sink, worker=self._worker, leg=self._leg)
        self._legs.add(leg)
        leg.reading.add_done_callback(lambda _: self._legs.discard(leg))
        return leg

    async def close(self) -> None:
        """See `WorkerLink`."""
        self._closed = True
        legs = list(self._legs)
        for leg in legs:
            leg.close()
        await asyncio.gather(*(leg.ended() for leg in legs))
        await self._channel.close()


def _telling(share: LegShare, sink: LegSink) -> LegSink:
    def tell(event: LegEvent) -> None:
        if isinstance(event, LegTokens):
            share.prefilled()
        elif isinstance(event, LegFinished | LegFailed):
            share.end()
        sink(event)

    return tell


class _NeverSent:
    """A leg of a link that is closed."""

    def abort(self) -> None:
        """Nothing runs."""

    async def ended(self) -> None:
        """At once."""


class StreamLeg:
    """One open stream; `reading` is the task that owns it."""

    def __init__(
        self,
        stub: generate_pb2_grpc.GenerateServiceAsyncStub,
        call: grpc.aio.UnaryStreamCall[generate_pb2.GenerateRequest, generate_pb2.GenerateResponse],
        request: generate_pb2.GenerateRequest,
        sink: LegSink,
        *,
        worker: str,
        leg: str,
    ) -> None:
        self._stub, self._call, self._sink = stub, call, sink
        self._request_id, self._room = request.request_id, request.bootstrap.room
        self._worker, self._leg = worker, leg
        self._aborting: asyncio.Task[None] | None = None
        self._proving: asyncio.Task[None] | None = None
        self._closing = False
        self.reading = asyncio.create_task(self._read(), name=f"leg {leg} {request.request_id}")

    def abort(self) -> None:
        """See `Leg`."""
        if self._aborting is None and not self.reading.done():
            self._aborting = asyncio.create_task(self._abort(), name=f"abort {self._leg} {self._request_id}")

    async def ended(self) -> None:
        """See `Leg`."""
        await asyncio.wait({self.reading})
        for task in (self._aborting, self._proving):
            if task is not None:
                await asyncio.wait({task})

    async def _read(self) -> None:
        finished = False
        try:
            # The worker sends its headers once it has accepted the leg; a refusal has none.
            await self._call.initial_metadata()
            if not self._call.done():
                self._sink(LegAccepted())
            async for response in self._call:
                if response.HasField("finished"):
                    finished = True
                    self._sink(LegFinished.of(response))
                else:
                    self._sink(LegTokens.of(response))
            if not finished:
                self._fail(RequestError(grpc.StatusCode.INTERNAL, Reason.LEG_ENDED_EARLY, "the stream ended early"))
        except grpc.aio.AioRpcError as error:
            typed = RequestError.from_rpc_error(error)
            if typed.reason is Reason.UNTYPED:
                # Not the worker's word: the connection broke. Its engine may still run the leg.
                self._start_proving()
            if not finished:
                self._fail(unreachable(typed))
        except asyncio.CancelledError:
            # We hung up: `_abort` because the worker doesn't answer, or the link because it is closed.
            self._call.cancel()
            if not self._closing:
                self._start_proving()
            if not finished:
                self._fail(RequestError(grpc.StatusCode.UNAVAILABLE, Reason.WORKER_UNREACHABLE, "the worker is gone"))

    async def _abort(self) -> None:
        """By the Abort call, so that the end of the stream says that the engine has dropped the leg."""
        try:
            await self._stub.Abort(generate_pb2.AbortRequest(request_id=self._request_id), timeout=ABORT_CALL_TIMEOUT)
            async with asyncio.timeout(ABORT_END_TIMEOUT):
                await asyncio.shield(self.reading)
        except (grpc.aio.AioRpcError, TimeoutError):
            self._call.cancel()

    def close(self) -> None:
        """Hangs up for good: the link is closed."""
        self._closing = True
        for task in (self.reading, self._aborting, self._proving):
            if task is not None:
                task.cancel()

    def _start_proving(self) -> None:
        self._proving = asyncio.create_task(
            prove_ended(self._stub, self._request_id, worker=self._worker), name=f"prove {self._request_id}"
        )

    def _fail(self, error: RequestError) -> None:
        self._sink(LegFailed(error.with_context(leg=self._leg, worker=self._worker, room=self._room)))


def unreachable(error: RequestError) -> RequestError:
    """A status without our ErrorInfo is gRPC's own: a lost connection, above all."""
    if error.reason is Reason.UNTYPED and error.code is grpc.StatusCode.UNAVAILABLE:
        error.reason, error.retry_after = Reason.WORKER_UNREACHABLE, 1.0
    return error
