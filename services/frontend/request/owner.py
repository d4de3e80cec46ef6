"""The one task that owns one choice of a request: waits for workers, follows both legs, tries again, ends everything.

The client's side only reads a queue, so a client that leaves, is slow or is cancelled twice can't cut the clean-up
short.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import grpc
import structlog

from kvbaton.errors import Reason, RequestError
from services.frontend.dispatch.line import Ticket
from services.frontend.dispatch.queue import DispatchQueue
from services.frontend.link.protocol import GoodEvent, LegAccepted, LegEvent, LegFailed
from services.frontend.request.answer import Answer
from services.frontend.request.api import Output
from services.frontend.request.attempt import PREFILL_END_TIMEOUT, Attempt
from services.frontend.request.deadlines import DeadlineClock, Deadlines
from services.frontend.request.events import End, EndedError, FromLeg, FromQueue, Inbox, Progress
from services.frontend.request.migration import lost_end
from services.frontend.request.outbox import Outbox
from services.frontend.request.places import Places
from services.frontend.request.prepare import PreparedRequest
from services.frontend.request.retry import retryable
from services.frontend.request.states import RequestState, State, Step
from services.frontend.request.trace import RequestTrace
from services.frontend.router.placement import Placement
from services.requests import Role

log = structlog.get_logger()


class RequestOwner:
    """`start` it once, or `leave` without. A request of several choices has an owner for each."""

    def __init__(
        self,
        prepared: PreparedRequest,
        queue: DispatchQueue,
        ticket: Ticket,
        *,
        outbox: Outbox,
        progress: Progress,
        deadlines: Callable[[int], Deadlines],
        retries: int,
        migrations: int,
        received: float,
        tokenization: float | None,
        trace: RequestTrace,
        choice: int = 0,
    ) -> None:
        """`ticket` is the choice's first place in the queue. `received` is on the monotonic clock.

        `deadlines` are those of a prompt of so many tokens; further attempts number at most `retries` before the first
        token and `migrations` behind it.
        `tokenization` is in seconds; None for a prompt that came as tokens.
        """
        self._prepared = prepared
        self._choice = choice
        self._progress = progress
        self._deadlines = deadlines
        self._clock = DeadlineClock(deadlines(len(prepared.token_ids)))
        self._inbox = Inbox(self._clock)
        self._places = Places(prepared, queue, ticket, self._inbox, retries=retries, migrations=migrations)
        self._trace = trace
        self._state = RequestState()
        self._outbox = outbox
        self._attempt: Attempt | None = None
        # What that failed by itself; the client may be told of something else, or of another choice's failure.
        self._fault: RequestError | None = None
        self._closing: list[asyncio.Task[None]] = []
        self.answer = Answer(prepared, received, tokenization)
        self.attempts = 0

    @property
    def request_id(self) -> str:
        """The request's, the same for all its choices."""
        return self._prepared.request_id

    @property
    def state(self) -> State:
        """Where the request is."""
        return self._state.now

    @property
    def ended_in(self) -> State | None:
        """Where the request was when it ended."""
        return self._state.ended_in

    def start(self) -> asyncio.Task[None]:
        """Begins; the caller keeps the task."""
        self._clock.enter(State.ADMITTED)
        return asyncio.create_task(self._own(), name=f"request {self.request_id}", context=self._trace.task_context())

    def leave(self) -> None:
        """Never started, it gives up its place."""
        self._places.leave()

    def release(self, *, prefers: str) -> None:
        """A held ticket gets its turn, on that prefill worker if it can."""
        self._places.release(prefers=prefers)

    @property
    def prefill_worker(self) -> str:
        """The instance id of the attempt's prefill worker; empty without one."""
        prefill = None if self._attempt is None else self._attempt.placement.prefill
        return "" if prefill is None else prefill.instance_id

    def end(self, error: RequestError) -> None:
        """Ends both legs; the request then fails with the error. Without effect on one that has ended."""
        self._inbox.put(End(error))

    async def _own(self) -> None:
        try:
            await self._run()
        except EndedError as ended:
            self._fail(ended.error)
        except RequestError as error:
            self._fail(error)
        except Exception as error:
            log.error("request failed", request_id=self.request_id, state=self.state, exc_info=error)
            self._fail(RequestError(grpc.StatusCode.INTERNAL, Reason.INTERNAL, "internal error"))
        finally:
            self._inbox.close()
            self._places.leave()
            self._close_attempt(self.answer.error)
            for result in await asyncio.gather(*self._closing, return_exceptions=True):
                if isinstance(result, BaseException):
                    log.error("attempt not closed in order", request_id=self.request_id, exc_info=result)
            self._progress.choice_ended()

    def _fail(self, error: RequestError) -> None:
        """The client is told at once; the legs are ended afterwards."""
        if not self._state.ended:
            self._state.take(Step.CANCEL if error.code is grpc.StatusCode.CANCELLED else Step.ERROR)
        self._places.migration.failed()
        room = self._attempt.room_number if self._attempt is not None else 0
        self.answer.error = self._prepared.as_sent(error).with_context(room=room, request_id=self.request_id)
        self._progress.choice_failed(self.answer.error)

    async def _run(self) -> None:
        """Attempts, until one gives an answer or the last one's error is the request's."""
        while True:
            attempt = self._dispatch(await self._places.workers())
            try:
                await self._follow()
                return
            except RequestError as error:
                self._fault = error
                if not retryable(error):
                    raise
                self._places.enter_again(error, attempt, self.answer.taken)
                self._clock.renew(self._deadlines(len(self._places.rest.token_ids)))
                log.info(
                    "answer migrates" if self.answer.taken else "attempt failed",
                    request_id=self.request_id,
                    attempt=self.attempts,
                    tokens=len(self.answer.taken),
                    error=str(error),
                )
                step = Step.MIGRATE if self.state is State.DECODING else Step.RETRY
                self._clock.enter(self._state.take(step))
                self._close_attempt(error)
                await self._places.pause()

    def _dispatch(self, placement: Placement) -> Attempt:
        self._state.take(Step.PAIR_CHOSEN)
        self._places.spend()
        self.attempts += 1
        span = self._trace.attempt(self.attempts, self._choice)
        self._attempt = attempt = Attempt(self._places.rest, placement, self._from_leg, span)
        self.answer.dispatched(placement)
        attempt.dispatch()
        self._clock.enter(self._state.take(Step.DISPATCHED))
        return attempt

    def _close_attempt(self, error: RequestError | None) -> None:
        """Ends the attempt's legs in a task of its own; the request ends only when all such tasks have."""
        if self._attempt is None:
            return
        fault, self._fault = self._fault, None
        answered = self.answer.complete is not None and fault is None
        closing = self._attempt.close(answered=answered, error=error, fault=fault)
        self._closing.append(asyncio.create_task(closing))
        self._attempt = None

    def _from_leg(self, attempt: Attempt, role: Role, event: LegEvent) -> None:
        self._inbox.put(FromLeg(attempt, role, event))

    async def _follow(self) -> None:
        """Until the answer is complete. Raises the attempt's error, or EndedError."""
        while True:
            item = await self._inbox.get_in_time()
            if isinstance(item, FromQueue) or item.attempt is not self._attempt:
                continue  # an earlier attempt's legs still say goodbye
            event = self._unless_failed(item)
            output = None if event is None else self._take(item.attempt, item.role, event)
            if output is None:
                continue
            if output.finished is None:
                self._put(output)
                continue
            if not item.attempt.hand_over.settled:
                # Prefill's engine may tell of its token only behind its next batch: tokens don't wait for that.
                self._put(replace(output, finished=None))
                output = Output([], finished=output.finished)
                await self._settle_hand_over(item.attempt)
            self._state.take(Step.COMPLETE)
            self._put(self.answer.with_prefills_word(output))
            return

    def _unless_failed(self, item: FromLeg) -> GoodEvent | None:
        """The event; for the failure of a leg that isn't needed any more what is left of it. Raises RequestError."""
        if not isinstance(item.event, LegFailed):
            return item.event
        if item.role is Role.PREFILL and self.state is State.DECODING:
            # Decode has the whole KV cache, or it had no first token.
            log.warning(
                "prefill failed behind the first token", request_id=self.request_id, error=str(item.event.error)
            )
            item.attempt.hand_over.give_up()
            return None
        end = lost_end(self._prepared, self.answer.taken) if retryable(item.event.error) else None
        if end is None:
            raise item.event.error
        return end

    def _put(self, output: Output) -> None:
        self._outbox.put(replace(output, index=self._choice) if self._choice else output)

    async def _settle_hand_over(self, attempt: Attempt) -> None:
        """A short answer may be complete before prefill's token is here; without the comparison it proves nothing.

        Raises RequestError when the tokens differ, and EndedError.
        """
        try:
            async with asyncio.timeout(PREFILL_END_TIMEOUT):
                while not attempt.hand_over.settled:
                    item = await self._inbox.get()
                    if isinstance(item, FromQueue) or item.attempt is not attempt or item.role is not Role.PREFILL:
                        continue
                    if isinstance(item.event, LegFailed):
                        log.warning("prefill failed behind its answer", request_id=self.request_id)
                        return
                    self._take(attempt, item.role, item.event)
        except TimeoutError:
            log.warning("no word from prefill", request_id=self.request_id, seconds=PREFILL_END_TIMEOUT)

    def _take(self, attempt: Attempt, role: Role, event: GoodEvent) -> Output | None:
        """One event of a leg that goes on, or ends well; what the client gets of it."""
        if isinstance(event, LegAccepted):
            if attempt.accepted and self.state is State.BOOTSTRAPPING:
                self._clock.enter(self._state.take(Step.LEGS_ACCEPTED))
            return None
        if self.state is State.BOOTSTRAPPING:
            # A token says more than an acceptance that is still on its way.
            self._clock.enter(self._state.take(Step.LEGS_ACCEPTED))
        attempt.hand_over.take(role, event)
        if role is Role.PREFILL:
            self.answer.prefilled(event)
            if event.token_ids:
                self._clock.enter(self._state.take(Step.PREFILL_ENDED))
                self._progress.choice_prefilled()
            return None
        if self.state is not State.DECODING and event.token_ids:
            self._clock.enter(self._state.take(Step.FIRST_TOKEN))
            self._progress.choice_prefilled()
        self._clock.token()
        self._places.migration.continued()
        output = self.answer.take(event)
        return output if output.token_ids or output.finished is not None else None
