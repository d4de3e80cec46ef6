"""Generation as the frontend offers it: every live request by id, admission, and the drain at the end."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import grpc
import structlog

from kvbaton.errors import Reason, RequestError, cancelled, invalid
from kvbaton.v1 import generate_pb2, model_pb2, text_pb2
from services.config.frontend import FrontendConfig
from services.early_aborts import EarlyAborts
from services.frontend.dispatch.line import Ticket
from services.frontend.dispatch.queue import DispatchQueue
from services.frontend.request.api import LiveRequest
from services.frontend.request.choices import check_choices
from services.frontend.request.deadlines import Deadlines
from services.frontend.request.fan_out import FanOut, first_alone
from services.frontend.request.outbox import Outbox
from services.frontend.request.owner import RequestOwner
from services.frontend.request.prepare import PreparedRequest, prepare_choices
from services.frontend.request.trace import RequestTrace
from services.frontend.router.hints import Hints
from services.frontend.router.placement import Router
from services.frontend.router.worker import Worker
from services.frontend.text_calls import TextCalls
from services.requests import check_request_id
from services.telemetry import metrics
from services.telemetry.tracing import NO_HEADERS

log = structlog.get_logger()

# Seconds for the workers to let go of what a shutdown ends.
_ABORT_GRACE = 10.0


@dataclass(eq=False)
class _Live:
    """One client's request from admission until the last leg of its last choice is gone."""

    request_id: str
    choices: int
    """That are not gone."""
    received: float
    trace: RequestTrace
    model: str = ""
    """The served name once it is known: what clients make up is no label."""
    fan_out: FanOut | None = None
    """None while the request is being prepared."""
    ended_early: RequestError | None = None
    """Why it was ended meanwhile."""


class GenerationService:
    """Implements `Generation`."""

    def __init__(self, config: FrontendConfig, router: Router, queue: DispatchQueue) -> None:
        self._config = config
        self._router = router
        self._queue = queue
        self._text = TextCalls(router, limit=config.max_live_requests)
        self._live: dict[str, _Live] = {}
        self._live_choices = 0
        self._early_aborts = EarlyAborts()
        # By the name that clients gave: choices that wait while nobody serves their model.
        self._unready: Counter[str] = Counter()
        # Set, and replaced, when workers have changed or a request was ended.
        self._news = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._draining = False

    @property
    def draining(self) -> bool:
        """See `Generation`."""
        return self._draining

    @property
    def live_requests(self) -> int:
        """Requests accepted and not ended, each choice counted."""
        return self._live_choices

    def models(self) -> list[model_pb2.ModelInfo]:
        """See `Generation`."""
        return self._router.models()

    async def tokenize(self, request: text_pb2.TokenizeRequest) -> text_pb2.TokenizeResponse:
        """See `Generation`."""
        if self._draining:
            raise shutting_down()
        return await self._text.tokenize(request)

    async def detokenize(self, request: text_pb2.DetokenizeRequest) -> text_pb2.DetokenizeResponse:
        """See `Generation`."""
        if self._draining:
            raise shutting_down()
        return await self._text.detokenize(request)

    async def submit(
        self,
        request: generate_pb2.GenerateRequest,
        trace_headers: Mapping[str, str] = NO_HEADERS,
        *,
        anywhere: bool = False,
    ) -> LiveRequest:
        """See `Generation`. With `anywhere` no policy asks for the names of workers."""
        live = _Live("", 0, time.monotonic(), RequestTrace(trace_headers))
        tickets: list[Ticket] = []
        try:
            live.request_id = check_request_id(request.request_id) or uuid.uuid4().hex
            self._admit(live, self._choices(request))
            worker = await self._serving(request.model, live)
            live.model = worker.record.model.name
            # Before the prompt is tokenized: a full queue costs nothing, and places are by arrival.
            hints = Hints.of(request, optional=anywhere)
            tickets = self._queue.enter_all(live.model, live.choices, priority=request.priority, hints=hints)
            began = time.monotonic()
            prepared = await prepare_choices(
                request, live.request_id, worker, self._router.limits(live.model), live.choices
            )
            if live.ended_early is not None:
                raise live.ended_early
        except BaseException as error:
            for ticket in tickets:
                ticket.leave()
            # Also when the caller left while its prompt was being tokenized. A refused duplicate forgets nothing.
            if self._live.get(live.request_id) is live:
                self._forget(live)
            live.trace.refused(live.request_id, live.model, error)
            if not isinstance(error, RequestError):
                raise
            metrics.REQUESTS.labels(live.model, error.code.name).inc()
            raise error.with_context(request_id=live.request_id) from error
        as_tokens = request.WhichOneof("input") == "token_ids"
        tokenization = None if as_tokens else time.monotonic() - began
        return self._start(live, worker, prepared, tickets, tokenization)

    def abort(self, request_id: str) -> bool:
        """See `Generation`."""
        if self.abort_live(request_id):
            return True
        self._early_aborts.remember(request_id)
        return False

    def abort_live(self, request_id: str) -> bool:
        """See `Generation`."""
        if request_id not in self._live:
            return False
        self._end(self._live[request_id], cancelled())
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
            log.warning("drain timed out", live=self._live_choices, seconds=timeout)
            self.shut_down()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ABORT_GRACE):
                    await self._empty.wait()

    def shut_down(self) -> None:
        """Ends every live request with SHUTTING_DOWN."""
        for live in list(self._live.values()):
            self._end(live, shutting_down())

    def _start(
        self,
        live: _Live,
        worker: Worker,
        prepared: Sequence[PreparedRequest],
        tickets: Sequence[Ticket],
        tokenization: float | None,
    ) -> FanOut:
        config, prompt_tokens = self._config, len(prepared[0].token_ids)
        outbox = Outbox(config.max_buffered_bytes, choices=live.choices)
        live.fan_out = fan_out = FanOut(
            live.request_id,
            outbox,
            prompt_tokens=prompt_tokens,
            choice_gone=partial(self._choice_gone, live),
            ended=partial(self._ended, live),
        )
        owners = [
            RequestOwner(
                each,
                self._queue,
                ticket,
                outbox=outbox,
                progress=fan_out,
                deadlines=partial(self._deadlines, worker),
                retries=config.retries,
                migrations=config.max_migrations,
                received=live.received,
                tokenization=tokenization,
                trace=live.trace,
                choice=choice,
            )
            for choice, (each, ticket) in enumerate(zip(prepared, tickets, strict=True))
        ]
        targets = self._router.targets(live.model)
        alone = first_alone(targets, prompt_tokens=prompt_tokens, choices=live.choices)
        fan_out.start(owners, first_alone=alone)
        return fan_out

    def _end(self, live: _Live, error: RequestError) -> None:
        if live.fan_out is None:
            live.ended_early = error
            self.workers_changed()  # it may wait for them
        else:
            live.fan_out.end(error)

    async def _serving(self, model: str, live: _Live) -> Worker:
        """A worker that knows the model, waiting a while for one that serves it. Raises RequestError."""
        try:
            return self._router.find_model(model)
        except RequestError as error:
            full = self._unready[model] + live.choices > self._config.max_queued_requests
            if error.code is not grpc.StatusCode.UNAVAILABLE or full:
                raise
            unready = error
        self._unready[model] += live.choices
        try:
            async with asyncio.timeout(self._config.ready_queue_timeout):
                while live.ended_early is None:
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
            self._unready[model] -= live.choices
            if not self._unready[model]:
                del self._unready[model]
        raise live.ended_early

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

    def _choices(self, request: generate_pb2.GenerateRequest) -> int:
        """How many; none are refused that fit when nothing else runs. Raises RequestError naming `n`."""
        choices = check_choices(request)
        for flag in ("max_live_requests", "max_queued_requests"):
            if choices > (most := getattr(self._config, flag)):
                raise invalid("n", f"{choices} requests at once, --{flag.replace('_', '-')} is {most}")
        return choices

    def _admit(self, live: _Live, choices: int) -> None:
        if self._draining:
            raise shutting_down()
        if live.request_id in self._live:
            raise RequestError(
                grpc.StatusCode.ALREADY_EXISTS,
                Reason.DUPLICATE_REQUEST_ID,
                f"request_id: {live.request_id!r} is live",
                field="request_id",
                request_id=live.request_id,
            )
        if self._live_choices + choices > self._config.max_live_requests:
            raise RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                Reason.TOO_MANY_REQUESTS,
                f"{self._live_choices} requests are live, --max-live-requests is {self._config.max_live_requests}",
                retry_after=1.0,
            )
        if self._early_aborts.claim(live.request_id):
            raise cancelled()
        live.choices = choices
        self._live[live.request_id] = live
        self._empty.clear()
        self._count(choices)

    def _choice_gone(self, live: _Live) -> None:
        live.choices -= 1
        self._count(-1)

    def _count(self, change: int) -> None:
        self._live_choices += change
        metrics.LIVE_REQUESTS.set(self._live_choices)

    def _forget(self, live: _Live) -> None:
        del self._live[live.request_id]
        self._count(-live.choices)
        if not self._live:
            self._empty.set()

    def _ended(self, live: _Live, fan_out: FanOut) -> None:
        """One log line and one count per request."""
        self._forget(live)
        report = fan_out.report(live.model, live.received)
        report.count()
        report.write()
        live.trace.ended(report)


def shutting_down() -> RequestError:
    """The error of a request that a stopping frontend refuses or ends."""
    return RequestError(
        grpc.StatusCode.UNAVAILABLE, Reason.SHUTTING_DOWN, "the frontend is shutting down", retry_after=1.0
    )
