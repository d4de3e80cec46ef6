"""Generation as the frontend offers it: every live request by id, admission, and the drain at the end."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping

import grpc
import structlog

from kvbaton.errors import Reason, RequestError, cancelled
from kvbaton.v1 import generate_pb2, model_pb2
from services.config.frontend import FrontendConfig
from services.early_aborts import EarlyAborts
from services.frontend.dispatch.line import Ticket
from services.frontend.dispatch.queue import DispatchQueue
from services.frontend.request.api import LiveRequest
from services.frontend.request.deadlines import Deadlines
from services.frontend.request.owner import RequestOwner
from services.frontend.request.prepare import prepare
from services.frontend.request.trace import RequestTrace
from services.frontend.router.placement import Router
from services.frontend.router.worker import Worker
from services.requests import check_request_id
from services.telemetry import metrics
from services.telemetry.tracing import NO_HEADERS

log = structlog.get_logger()

# Seconds for the workers to let go of what a shutdown ends.
_ABORT_GRACE = 10.0


class GenerationService:
    """Implements `Generation`."""

    def __init__(self, config: FrontendConfig, router: Router, queue: DispatchQueue) -> None:
        self._config = config
        self._router = router
        self._queue = queue
        # Ids from admission on; the owner is None while the request is being prepared.
        self._live: dict[str, RequestOwner | None] = {}
        # Ended while they were being prepared.
        self._ended_early: dict[str, RequestError] = {}
        self._early_aborts = EarlyAborts()
        # Of requests that came while nobody serves their model.
        self._unready = 0
        # Set, and replaced, when workers have changed or a request was ended.
        self._news = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False

    @property
    def draining(self) -> bool:
        """See `Generation`."""
        return self._draining

    @property
    def live_requests(self) -> int:
        """Requests accepted and not ended."""
        return len(self._live)

    def models(self) -> list[model_pb2.ModelInfo]:
        """See `Generation`."""
        return self._router.models()

    async def submit(
        self, request: generate_pb2.GenerateRequest, trace_headers: Mapping[str, str] = NO_HEADERS
    ) -> LiveRequest:
        """See `Generation`."""
        received = time.monotonic()
        trace = RequestTrace(trace_headers)
        # The served name once it is known: what clients make up is no label.
        model = ""
        request_id = ""
        ticket: Ticket | None = None
        try:
            request_id = check_request_id(request.request_id) or uuid.uuid4().hex
            self._admit(request_id)
            worker = await self._serving(request.model, request_id)
            model = worker.record.model.name
            # Before the prompt is tokenized: the credit comes meanwhile.
            ticket = self._queue.enter(model, priority=request.priority)
            prepared = await prepare(request, request_id, worker, self._router.limits(model))
            if (ended := self._ended_early.get(request_id)) is not None:
                raise ended
        except BaseException as error:
            if ticket is not None:
                ticket.leave()
            # Also when the caller left while its prompt was being tokenized. A refused duplicate forgets nothing.
            if self._live.get(request_id, self) is None:
                self._forget(request_id)
            trace.refused(request_id, model, error)
            if not isinstance(error, RequestError):
                raise
            metrics.REQUESTS.labels(model, error.code.name).inc()
            raise error.with_context(request_id=request_id) from error
        owner = RequestOwner(
            prepared,
            self._queue,
            ticket,
            deadlines=self._deadlines(worker, len(prepared.token_ids)),
            retries=self._config.retries,
            max_buffered_bytes=self._config.max_buffered_bytes,
            received=received,
            trace=trace,
            ended=self._request_ended,
        )
        self._live[request_id] = owner
        task = owner.start()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return owner

    def abort(self, request_id: str) -> bool:
        """See `Generation`."""
        if request_id not in self._live:
            self._early_aborts.remember(request_id)
            return False
        self._end(request_id, cancelled())
        return True

    def workers_changed(self) -> None:
        """Some worker came, went, or can't be routed to any more."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def drain(self, timeout: float) -> None:
        """Takes no new request, waits for the live ones, cancels what is left after `timeout` seconds."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._empty.wait()
        except TimeoutError:
            log.warning("drain timed out", live=len(self._live), seconds=timeout)
            self.shut_down()
            if self._tasks:
                await asyncio.wait(set(self._tasks), timeout=_ABORT_GRACE)

    def shut_down(self) -> None:
        """Ends every live request with SHUTTING_DOWN."""
        for request_id in list(self._live):
            self._end(request_id, shutting_down())

    def _end(self, request_id: str, error: RequestError) -> None:
        owner = self._live[request_id]
        if owner is None:
            self._ended_early[request_id] = error
            self.workers_changed()  # it may wait for them
        else:
            owner.end(error)

    async def _serving(self, model: str, request_id: str) -> Worker:
        """A worker that knows the model, waiting a while for one that serves it. Raises RequestError."""
        try:
            return self._router.find_model(model)
        except RequestError as error:
            if error.code is not grpc.StatusCode.UNAVAILABLE or self._unready >= self._config.max_queued_requests:
                raise
            unready = error
        self._unready += 1
        try:
            async with asyncio.timeout(self._config.ready_queue_timeout):
                while request_id not in self._ended_early:
                    await self._news.wait()
                    try:
                        return self._router.find_model(model)
                    except RequestError as error:
                        if error.code is not grpc.StatusCode.UNAVAILABLE:
                            raise
                        unready = error
        except TimeoutError:
            raise unready from None
        finally:
            self._unready -= 1
        raise self._ended_early[request_id]

    def _deadlines(self, worker: Worker, prompt_tokens: int) -> Deadlines:
        config = self._config
        cache_bytes = prompt_tokens * worker.record.runtime.kv_bytes_per_token
        return Deadlines(
            queue=config.queue_timeout,
            prefill=config.phases.prefill(prompt_tokens),
            transfer=config.phases.transfer(cache_bytes),
            token_gap=config.token_gap_timeout,
            total=config.total_timeout,
        )

    def _admit(self, request_id: str) -> None:
        if self._draining:
            raise shutting_down()
        if request_id in self._live:
            raise RequestError(
                grpc.StatusCode.ALREADY_EXISTS,
                Reason.DUPLICATE_REQUEST_ID,
                f"request_id: {request_id!r} is live",
                field="request_id",
                request_id=request_id,
            )
        if len(self._live) >= self._config.max_live_requests:
            raise RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                Reason.TOO_MANY_REQUESTS,
                f"{len(self._live)} requests are live, --max-live-requests is {self._config.max_live_requests}",
                retry_after=1.0,
            )
        if self._early_aborts.claim(request_id):
            raise cancelled()
        self._live[request_id] = None
        self._empty.clear()
        metrics.LIVE_REQUESTS.set(len(self._live))

    def _forget(self, request_id: str) -> None:
        self._live.pop(request_id, None)
        self._ended_early.pop(request_id, None)
        if not self._live:
            self._empty.set()
        metrics.LIVE_REQUESTS.set(len(self._live))

    def _request_ended(self, owner: RequestOwner, outcome: str) -> None:
        """One log line and one count per request."""
        self._forget(owner.request_id)
        answer = owner.answer
        metrics.REQUESTS.labels(owner.model, outcome).inc()
        timings = answer.timings()
        phases = {
            "queue": timings.queue,
            "prefill": timings.prefill,
            "transfer": timings.transfer,
            "decode": timings.decode,
        }
        if answer.complete is not None:
            metrics.PROMPT_TOKENS.labels(owner.model).inc(answer.prompt_tokens)
            metrics.COMPLETION_TOKENS.labels(owner.model).inc(answer.completion_tokens)
            for phase, seconds in phases.items():
                if seconds is not None:
                    metrics.PHASE_SECONDS.labels(phase).observe(seconds)
            if (ttft := answer.time_to_first_token) is not None:
                metrics.TIME_TO_FIRST_TOKEN_SECONDS.labels(owner.model).observe(ttft)
        log.info(
            "request ended",
            request_id=owner.request_id,
            outcome=outcome,
            phase=owner.ended_in,
            model=owner.model,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            attempts=owner.attempts,
            error=str(answer.error) if answer.error is not None else None,
            **{f"{phase}_s": round(seconds, 4) for phase, seconds in phases.items() if seconds is not None},
        )
        owner.trace.ended(owner.request_id, owner.model, answer, phases)


def shutting_down() -> RequestError:
    """The error of a request that a stopping frontend refuses or ends."""
    return RequestError(
        grpc.StatusCode.UNAVAILABLE, Reason.SHUTTING_DOWN, "the frontend is shutting down", retry_after=1.0
    )
