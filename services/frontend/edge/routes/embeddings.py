"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio

import structlog
from fastapi import APIRouter, Response
from starlette.types import Receive, Scope, Send

from kvbaton.errors import RequestError
from services.frontend.edge.body import json_route
from services.frontend.edge.calls import request_id
from services.frontend.edge.documented import documented
from services.frontend.edge.embeddings import EmbeddingCall, EmbeddingList, EmbeddingsRequest, answer_body
from services.frontend.edge.exchange import while_client_stays
from services.frontend.edge.headers import RequestIdHeader
from services.frontend.edge.options import EdgeOptions
from services.frontend.embedding.service import Embedding

log = structlog.get_logger()


def router(embedding: Embedding, options: EdgeOptions) -> APIRouter:
    """The route that embeds."""
    routes = APIRouter(tags=["embeddings"], route_class=json_route(options))

    @routes.post(
        "/v1/embeddings",
        response_model=None,
        responses=documented(EmbeddingList, "The vectors."),
    )
    async def embeddings(body: EmbeddingsRequest, x_request_id: RequestIdHeader = None) -> Response:
        """One vector for each input."""
        call = EmbeddingCall.of(body, request_id(x_request_id, "embd-"))
        return _Exchange(embedding, body, call, write_timeout=options.write_timeout_seconds)

    return routes


class _Exchange(Response):
    """The answer to one request; a client that closes the connection cancels it.

    One that takes nothing of its answer for `write_timeout` seconds is hung up on.
    """

    def __init__(
        self, embedding: Embedding, body: EmbeddingsRequest, call: EmbeddingCall, *, write_timeout: float
    ) -> None:
        super().__init__()
        self._write_timeout = write_timeout
        self._embedding = embedding
        self._body = body
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application; the request's body must have been read."""

        async def answer() -> None:
            try:
                response = await self._embedding.embed(self._call.request)
            except RequestError as error:
                raise self._call.in_openai_terms(error) from error
            content = answer_body(response, self._body.model, self._body.encoding_format or "float")
            headers = {"x-request-id": self._call.request.request_id}
            try:
                async with asyncio.timeout(self._write_timeout):
                    await Response(content, headers=headers, media_type="application/json")(scope, receive, send)
            except TimeoutError:
                # Returning with an unfinished response makes the server close the connection.
                log.warning("http_client_stalled", request_id=self._call.request.request_id)

        await while_client_stays(receive, answer())
