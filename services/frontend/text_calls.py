"""Text to tokens and back for clients, with any model that ListModels reports; no engine is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import grpc

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import text_pb2
from services.frontend.request.prepare import detokenize, tokenize
from services.frontend.router.placement import Router
from services.telemetry import metrics, tracing


class TextCalls:
    """Both calls of TextService, `limit` at a time: a text that waits for a thread costs its memory."""

    def __init__(self, router: Router, *, limit: int) -> None:
        self._router = router
        self._limit = limit
        self._live = 0

    async def tokenize(self, request: text_pb2.TokenizeRequest) -> text_pb2.TokenizeResponse:
        """See `Generation`."""
        with self._counted("Tokenize"):
            worker, limits = self._router.find_text(request.model)
            return await tokenize(request, worker, limits)

    async def detokenize(self, request: text_pb2.DetokenizeRequest) -> text_pb2.DetokenizeResponse:
        """See `Generation`."""
        with self._counted("Detokenize"):
            worker, limits = self._router.find_text(request.model)
            return await detokenize(request, worker, limits)

    @contextlib.contextmanager
    def _counted(self, call: str) -> Generator[None]:
        outcome = "finished"
        self._live += 1
        try:
            if self._live > self._limit:
                raise RequestError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    Reason.TOO_MANY_REQUESTS,
                    f"{self._limit} texts are in work, as many as --max-live-requests",
                    retry_after=1.0,
                )
            yield
        except BaseException as error:
            outcome = tracing.as_request_error(error).code.name
            raise
        finally:
            self._live -= 1
            metrics.TEXT_REQUESTS.labels(call, outcome).inc()
