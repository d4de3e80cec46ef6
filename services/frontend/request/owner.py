"""The one task that owns a request: dispatches its legs, follows both, ends both.

The client's side only reads a queue, so a client that leaves, is slow or is cancelled twice can't cut
the clean-up short.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc
import structlog

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import generate_pb2
from services.frontend.link.protocol import Leg, LegEvent, LegFailed, LegFinished, LegTokens
from services.frontend.request.api import Finished, FinishReason, Output, Timings
from services.frontend.request.deadlines import DeadlineClock, Deadlines
from services.frontend.request.prepare import PreparedRequest
from services.frontend.router.placement import Placement
from services.frontend.router.worker import Worker
from services.requests import ROOM_LIMIT, Role, Room

log = structlog.get_logger()

# Seconds that a finished answer waits for prefill's own end, so that its token can be compared.
PREFILL_END_TIMEOUT = 5.0

_FINISH_REASONS = {
    generate_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    generate_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


@dataclass(frozen=True, slots=True)
class _End:
    """Somebody other than the legs ends the request: the client, or a shutdown."""

    error: RequestError


class RequestOwner:
    """Implements `LiveRequest`. `start` it once; `ended` is called when both legs are gone."""

    def __init__(
        self,
        prepared: PreparedRequest,
        placement: Placement,
        deadlines: Deadlines,
        received: float,
        ended: Callable[[RequestOwner, str], None],
    ) -> None:
        self._prepared = prepared
        self._placement = placement
        self._clock = DeadlineClock(deadlines)
        self._ended = ended
        self._room = _fresh_room(placement)
        self._events: asyncio.Queue[tuple[Role, LegEvent] | _End] = asyncio.Queue()
        self._outputs: asyncio.Queue[Output | RequestError] = asyncio.Queue()
        self._legs: dict[Role, Leg] = {}
        self._open_legs: set[Role] = set()
        self._answer = _Answer(prepared, placement, received)
        self._handover = _HandOver()
        self._task: asyncio.Task[None] | None = None

    @property
    def request_id(self) -> str:
        """See `LiveRequest`."""
        return self._prepared.request_id

    @property
    def model(self) -> str:
        """The model's served name."""
        return self._prepared.model

    @property
    def answer(self) -> _Answer:
        """What has come so far."""
        return self._answer

    def start(self) -> asyncio.Task[None]:
        """Begins; the caller keeps the task."""
        self._task = asyncio.create_task(self._own(), name=f"request {self.request_id}")
        return self._task

    async def outputs(self) -> AsyncIterator[Output]:
        """See `LiveRequest`."""
        try:
            while True:
                item = await self._outputs.get()
                if isinstance(item, RequestError):
                    raise item
                yield item
                if item.finished is not None:
                    return
        finally:
            self.cancel()

    def cancel(self) -> None:
        """See `LiveRequest`."""
        self.end(RequestError(grpc.StatusCode.CANCELLED, Reason.CANCELLED, "the request was cancelled"))

    def end(self, error: RequestError) -> None:
        """Ends both legs; `outputs` then raises the error. Without effect on a request that has ended."""
        self._events.put_nowait(_End(error))

    async def _own(self) -> None:
        outcome = "INTERNAL"
        for worker in self._placement.workers:
            worker.request_began()
        try:
            await self._run()
            outcome = "finished"
        except RequestError as error:
            outcome = error.code.name
            error = error.with_context(room=self._room.room if self._room else 0, request_id=self.request_id)
            self._outputs.put_nowait(error)
            self._answer.error = error
        except Exception as error:
            log.error("request failed", request_id=self.request_id, exc_info=error)
            self._outputs.put_nowait(RequestError(grpc.StatusCode.INTERNAL, Reason.INTERNAL, "internal error"))
        finally:
            await self._end_legs()
            for worker in self._placement.workers:
                worker.request_ended()
            self._ended(self, outcome)

    async def _run(self) -> None:
        self._dispatch()
        while True:
            event = await self._next_event()
            if isinstance(event, _End):
                raise event.error
            role, leg_event = event
            if isinstance(leg_event, LegFailed):
                raise leg_event.error
            if role is Role.PREFILL:
                self._handover.prefill(leg_event)
                self._answer.prefilled()
                continue
            self._handover.decode(leg_event)
            self._clock.token()
            if self._forward(leg_event):
                return

    def _dispatch(self) -> None:
        """The same request to both legs at once: decode reserves pages while prefill computes."""
        self._answer.dispatched()
        for worker in reversed(self._placement.workers):
            role = worker.role
            self._open_legs.add(role)
            request = self._leg_request(worker)
            self._legs[role] = worker.link.submit(request, lambda event, role=role: self._sink(role, event))

    def _leg_request(self, worker: Worker) -> generate_pb2.GenerateRequest:
        request = generate_pb2.GenerateRequest(
            request_id=uuid.uuid4().hex,
            model=self.model,
            token_ids=generate_pb2.TokenIds(ids=self._prepared.token_ids),
            sampling=self._prepared.sampling.to_proto(),
        )
        if self._room is not None:
            request.bootstrap.CopyFrom(self._room.to_proto())
        return request

    def _sink(self, role: Role, event: LegEvent) -> None:
        if not isinstance(event, LegTokens):
            self._open_legs.discard(role)
        self._events.put_nowait((role, event))

    async def _next_event(self) -> tuple[Role, LegEvent] | _End:
        if not self._events.empty():
            return self._events.get_nowait()
        try:
            async with asyncio.timeout(self._clock.remaining()):
                return await self._events.get()
        except TimeoutError:
            raise self._clock.expired() from None

    def _forward(self, event: LegTokens | LegFinished) -> bool:
        """Hands decode's tokens on; True when the answer is complete."""
        output = self._answer.take(event)
        if output.finished is None:
            if output.token_ids:
                self._outputs.put_nowait(output)
            return False
        self._outputs.put_nowait(output)
        return True

    async def _end_legs(self) -> None:
        """Ends what still runs, prefill first.

        NIXL writes are one-sided: while the prefill leg lives it may write into decode's pages, so decode must not let
        go of them (and give them to another request) before prefill has ended or can't be reached any more.
        """
        prefill = self._legs.get(Role.PREFILL)
        if prefill is not None and Role.PREFILL in self._open_legs:
            if self._answer.complete:
                await self._await_prefill(prefill)
            if Role.PREFILL in self._open_legs:
                prefill.abort()
                await prefill.ended()
        for role, leg in self._legs.items():
            if role in self._open_legs:
                leg.abort()
            if role is not Role.PREFILL:
                await leg.ended()

    async def _await_prefill(self, prefill: Leg) -> None:
        """The answer is out; prefill's stream normally ends within milliseconds of decode's first token."""
        try:
            async with asyncio.timeout(PREFILL_END_TIMEOUT):
                await prefill.ended()
        except TimeoutError:
            log.warning("prefill leg outlives its request", request_id=self.request_id)


class _HandOver:
    """Compares prefill's one token with decode's first, whichever comes first.

    They are the same token, sent two ways: over gRPC, and with the KV cache. If they differ, decode reads pages that
    are not this request's.
    """

    def __init__(self) -> None:
        self._prefill: int | None = None
        self._decode: int | None = None

    def prefill(self, event: LegTokens | LegFinished) -> None:
        """Raises RequestError when the tokens differ."""
        if self._prefill is None and event.token_ids:
            self._prefill = event.token_ids[0]
            self._compare()

    def decode(self, event: LegTokens | LegFinished) -> None:
        """Raises RequestError when the tokens differ."""
        if self._decode is None and event.token_ids:
            self._decode = event.token_ids[0]
            self._compare()

    def _compare(self) -> None:
        if self._prefill is None or self._decode is None or self._prefill == self._decode:
            return
        raise RequestError(
            grpc.StatusCode.DATA_LOSS,
            Reason.FIRST_TOKEN_MISMATCH,
            f"prefill generated token {self._prefill} first, decode {self._decode}: the KV cache is not this request's",
        )


class _Answer:
    """What the client gets, and when it came."""

    def __init__(self, prepared: PreparedRequest, placement: Placement, received: float) -> None:
        self._prepared = prepared
        self._placement = placement
        self._received = received
        self._dispatched: float | None = None
        self._prefilled: float | None = None
        self._first: float | None = None
        self._last: float | None = None
        self._tokens = 0
        self.complete: Finished | None = None
        self.error: RequestError | None = None

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self._prepared.token_ids)

    @property
    def completion_tokens(self) -> int:
        """Tokens sent so far."""
        return self._tokens

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from receipt."""
        return None if self._first is None else self._first - self._received

    def dispatched(self) -> None:
        """Both legs are on their way."""
        self._dispatched = time.monotonic()

    def prefilled(self) -> None:
        """Prefill's token has left its engine."""
        if self._prefilled is None:
            self._prefilled = time.monotonic()

    def take(self, event: LegTokens | LegFinished) -> Output:
        """Decode's next tokens as an output; `finished` is set when the answer ends here, also at a stop string."""
        self._last = time.monotonic()
        if self._first is None and event.token_ids:
            self._first = self._last
        token_ids, before = event.token_ids, self._tokens
        self._tokens += len(token_ids)
        if self._prepared.text is None:
            text, stopped = "", None
        else:
            text, stopped = self._text(event)
        if stopped is not None:
            return self._finished(Output(token_ids[: max(0, self._tokens - before)], text), stopped=stopped)
        if isinstance(event, LegFinished):
            return self._finished(Output(token_ids, text), finished=event.finished)
        return Output(token_ids, text)

    def timings(self) -> Timings:
        """Seconds of each phase as far as it got."""
        # Prefill's stream ends after the transfer; whichever told first bounds the prefill phase.
        prefilled = self._prefilled if self._placement.prefill is not None else self._first
        if prefilled is not None and self._first is not None:
            prefilled = min(prefilled, self._first)
        return Timings(
            queue=_between(self._received, self._dispatched),
            prefill=_between(self._dispatched, prefilled),
            transfer=_between(prefilled, self._first) if self._placement.prefill is not None else None,
            decode=_between(self._first, self._last),
        )

    def _text(self, event: LegTokens | LegFinished) -> tuple[str, str | None]:
        """New text and the stop string that was hit; at the end, the rest of the text."""
        output = self._prepared.text
        assert output is not None
        token_ids = event.token_ids
        if isinstance(event, LegFinished) and event.finished.WhichOneof("matched") == "matched_token_id":
            # The token that ended the answer is counted, but is no text of it.
            token_ids = token_ids[:-1]
        delta = output.push(token_ids)
        text = delta.text
        if delta.stopped is None and isinstance(event, LegFinished):
            delta = output.finish()
            text += delta.text
        if delta.stopped is not None:
            self._tokens = delta.token_count_used
        return text, delta.stopped

    def _finished(
        self, output: Output, *, finished: generate_pb2.Finished | None = None, stopped: str | None = None
    ) -> Output:
        matched = None
        if finished is not None and finished.WhichOneof("matched") == "matched_token_id":
            matched = finished.matched_token_id
        placement = self._placement
        self.complete = Finished(
            reason=FinishReason.STOP if finished is None else _FINISH_REASONS[finished.reason],
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self._tokens,
            cached_prompt_tokens=finished.usage.cached_prompt_tokens if finished is not None else 0,
            matched_token_id=matched,
            matched_stop=stopped,
            timings=self.timings(),
            prefill_worker=placement.prefill.instance_id if placement.prefill is not None else "",
            decode_worker=placement.decode.instance_id,
        )
        return Output(output.token_ids, output.text, self.complete)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(0.0, end - start)


def _fresh_room(placement: Placement) -> Room | None:
    """A room nobody has used: SGLang takes `room % dp_size` as the prefill rank, and 0 for "not landed"."""
    if placement.prefill is None:
        return None
    endpoint = placement.prefill.record.bootstrap
    return Room(endpoint.host, endpoint.port, 1 + secrets.randbelow(ROOM_LIMIT - 1))
