"""Embedding as the frontend offers it: admission, attempts, deadline, and the drain at the end.

No credits and no queue: a request is one call, and when every worker is full it is refused at once.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, field
from typing import Protocol

import grpc
import structlog

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import embed_pb2
from services.config.frontend import FrontendConfig
from services.frontend.embedding.prepare import PreparedEmbedding, prepare
from services.frontend.request.blame import is_workers_fault
from services.frontend.request.retry import retryable
from services.frontend.router.embedding import EmbeddingRouter
from services.frontend.router.worker import Worker
from services.frontend.service import shutting_down
from services.requests import Role, check_request_id
from services.telemetry import metrics

log = structlog.get_logger()

# Seconds for what a shutdown ends to leave.
_END_GRACE = 5.0


class Embedding(Protocol):
    """What the frontend's edges (gRPC, HTTP) see."""

    async def embed(self, request: embed_pb2.EmbedRequest) -> embed_pb2.EmbedResponse:
        """One vector for each input. Raises RequestError. Cancelling it ends the worker's call."""
        ...


@dataclass(eq=False)
class _Live:
    """One request from admission to its end."""

    request_id: str
    received: float = field(default_factory=time.monotonic)
    model: str = ""
    """The served name once it is known: what clients make up is no label."""
    attempts: int = 0
    prompt_tokens: int = 0
    inputs: int = 0
    task: asyncio.Task[embed_pb2.EmbedResponse] | None = None
    cut_short: bool = False
    """By a shutdown."""
    worker: Worker | None = None
    silent: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the worker of the running attempt doesn't show any life."""


class EmbeddingService:
    """Implements `Embedding`. `workers_changed` must hear of every change of the workers."""

    def __init__(self, config: FrontendConfig, router: EmbeddingRouter) -> None:
        self._config = config
        self._router = router
        self._live: dict[str, _Live] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self._draining = False

    @property
    def live_requests(self) -> int:
        """Requests accepted and not ended."""
        return len(self._live)

    async def embed(self, request: embed_pb2.EmbedRequest) -> embed_pb2.EmbedResponse:
        """See `Embedding`."""
        live = _Live(request.request_id)
        outcome, error_text = "INTERNAL", None
        try:
            live.request_id = check_request_id(request.request_id) or uuid.uuid4().hex
            self._admit(live)
            live.task = asyncio.create_task(self._within_deadline(live, request), name=f"embed {live.request_id}")
            response = await self._result(live)
            outcome = "finished"
            return response
        except RequestError as error:
            outcome, error_text = error.code.name, str(error)
            raise error.with_context(request_id=live.request_id) from error
        except asyncio.CancelledError:
            outcome = grpc.StatusCode.CANCELLED.name
            raise
        finally:
            self._ended(live, outcome, error_text)

    def workers_changed(self) -> None:
        """Calls on workers that have fallen silent are given up; those on workers that drain are not."""
        for live in self._live.values():
            if live.worker is not None and not live.worker.link.healthy:
                live.silent.set()

    async def drain(self, timeout: float) -> None:
        """Takes no new request, waits for the live ones, ends what is left after `timeout` seconds."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._empty.wait()
        except TimeoutError:
            log.warning("drain timed out", live_embeddings=len(self._live), seconds=timeout)
            self.shut_down()
            async with asyncio.timeout(_END_GRACE):
                await self._empty.wait()

    def shut_down(self) -> None:
        """Ends every live request with SHUTTING_DOWN."""
        for live in self._live.values():
            live.cut_short = True
            if live.task is not None:
                live.task.cancel()

    def _admit(self, live: _Live) -> None:
        if self._draining:
            raise shutting_down()
        if live.request_id in self._live:
            raise RequestError(
                grpc.StatusCode.ALREADY_EXISTS,
                Reason.DUPLICATE_REQUEST_ID,
                f"request_id: {live.request_id!r} is live",
                field="request_id",
            )
        self._live[live.request_id] = live
        self._empty.clear()
        metrics.LIVE_EMBEDDINGS.set(len(self._live))

    async def _result(self, live: _Live) -> embed_pb2.EmbedResponse:
        assert live.task is not None
        try:
            return await live.task
        except asyncio.CancelledError:
            if live.cut_short:
                raise shutting_down() from None
            raise

    async def _within_deadline(self, live: _Live, request: embed_pb2.EmbedRequest) -> embed_pb2.EmbedResponse:
        seconds = self._config.embedding_timeout
        try:
            async with asyncio.timeout(seconds):
                return await self._run(live, request)
        except TimeoutError:
            raise RequestError(
                grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE_TOTAL, f"no embeddings within {seconds:g} s"
            ) from None

    async def _run(self, live: _Live, request: embed_pb2.EmbedRequest) -> embed_pb2.EmbedResponse:
        known = self._router.find_model(request.model)
        live.model = known.record.model.name
        # Before the texts are tokenized: what would be refused behind it costs nothing.
        self._router.require_room(live.model)
        prepared = await prepare(request, known, *self._router.limits(live.model))
        live.inputs, live.prompt_tokens = len(prepared.inputs), prepared.prompt_tokens
        excluded: set[str] = set()
        failure: RequestError | None = None
        while True:
            try:
                worker = self._router.choose(live.model, excluded)
            except RequestError as error:
                raise failure or error from None  # nobody is left to try: what failed is the better answer
            try:
                return await self._attempt(live, worker, prepared)
            except RequestError as error:
                if live.attempts > self._config.retries or not _another_may_do(error):
                    raise
                log.info("attempt failed", request_id=live.request_id, attempt=live.attempts, error=str(error))
                excluded.add(worker.instance_id)
                failure = error

    async def _attempt(self, live: _Live, worker: Worker, prepared: PreparedEmbedding) -> embed_pb2.EmbedResponse:
        live.attempts += 1
        live.worker = worker
        live.silent.clear()
        worker.request_began()
        sent = time.monotonic()
        request = prepared.to_proto(uuid.uuid4().hex)
        calling = asyncio.create_task(worker.embed(request, timeout=self._config.embedding_timeout))
        silent = asyncio.create_task(live.silent.wait())
        try:
            await asyncio.wait({calling, silent}, return_when=asyncio.FIRST_COMPLETED)
            if not calling.done():
                raise RequestError(
                    grpc.StatusCode.UNAVAILABLE,
                    Reason.WORKER_SILENT,
                    "the worker shows no life",
                    leg=Role.EMBEDDING,
                    worker=worker.instance_id,
                    retry_after=1.0,
                )
            response = calling.result()
            worker.breaker.succeeded()
        except RequestError as error:
            if is_workers_fault(error) or error.reason is Reason.ENGINE_ABORTED:
                worker.breaker.failed(str(error), sent=sent)
            raise
        finally:
            for task in (calling, silent):
                task.cancel()
            await asyncio.gather(calling, silent, return_exceptions=True)
            live.worker = None
            worker.request_ended()
        _complete(response, live, prepared, sent)
        return response

    def _ended(self, live: _Live, outcome: str, error: str | None) -> None:
        """One log line and one count per request. A refused duplicate forgets nothing."""
        if self._live.get(live.request_id) is live:
            del self._live[live.request_id]
            metrics.LIVE_EMBEDDINGS.set(len(self._live))
            if not self._live:
                self._empty.set()
        seconds = time.monotonic() - live.received
        metrics.EMBEDDINGS.labels(live.model, outcome).inc()
        if outcome == "finished":
            metrics.EMBEDDED_INPUTS.labels(live.model).inc(live.inputs)
            metrics.EMBEDDED_TOKENS.labels(live.model).inc(live.prompt_tokens)
            metrics.EMBEDDING_SECONDS.labels(live.model).observe(seconds)
        log.info(
            "embedding ended",
            request_id=live.request_id,
            outcome=outcome,
            model=live.model,
            inputs=live.inputs,
            prompt_tokens=live.prompt_tokens,
            attempts=live.attempts,
            seconds=round(seconds, 4),
            error=error,
        )


def _another_may_do(error: RequestError) -> bool:
    """A fault of the worker, or a worker that other frontends have filled."""
    return retryable(error) or error.reason is Reason.TOO_MANY_REQUESTS


def _complete(response: embed_pb2.EmbedResponse, live: _Live, prepared: PreparedEmbedding, sent: float) -> None:
    """The worker's response as the client gets it. Raises RequestError for one that can't be the answer."""
    if len(response.embeddings) != len(prepared.inputs):
        raise RequestError(
            grpc.StatusCode.INTERNAL,
            Reason.INTERNAL,
            f"worker {response.worker} sent {len(response.embeddings)} vectors for {len(prepared.inputs)} inputs",
        )
    for embedding, each in zip(response.embeddings, prepared.inputs, strict=True):
        if each.truncated:
            embedding.truncated = True
    response.request_id = live.request_id
    response.timings.queue.FromNanoseconds(int((sent - live.received) * 1e9))
    response.timings.compute.FromNanoseconds(int((time.monotonic() - sent) * 1e9))
