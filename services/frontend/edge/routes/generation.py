"""POST /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Header, Response

from services.frontend.edge.body import json_route
from services.frontend.edge.errors import ErrorBody
from services.frontend.edge.exchange import Exchange
from services.frontend.edge.options import EdgeOptions
from services.frontend.edge.responses import Answer, ChatCompletion, ChatFormat, Completion, CompletionFormat
from services.frontend.edge.schemas import ChatCompletionRequest, CompletionRequest, GenerationBody
from services.frontend.edge.translate import Call, chat_call, completion_call, request_id
from services.frontend.request.api import Generation

RequestIdHeader = Annotated[
    str | None, Header(description="The request's id, for Abort and for logs; no two live requests may share it.")
]


def router(generation: Generation, options: EdgeOptions) -> APIRouter:
    """The routes that generate text."""
    routes = APIRouter(tags=["generation"], route_class=json_route(options))

    @routes.post("/v1/completions", response_model=None, responses=_documented(Completion))
    async def completions(body: CompletionRequest, x_request_id: RequestIdHeader = None) -> Response:
        """Continues a prompt."""
        call = completion_call(body, request_id(x_request_id, "cmpl"))
        return exchange(call, body, CompletionFormat(_answer(call, body)))

    @routes.post("/v1/chat/completions", response_model=None, responses=_documented(ChatCompletion))
    async def chat_completions(body: ChatCompletionRequest, x_request_id: RequestIdHeader = None) -> Response:
        """Answers a conversation."""
        call = chat_call(body, request_id(x_request_id, "chatcmpl"))
        return exchange(call, body, ChatFormat(_answer(call, body)))

    def exchange(call: Call, body: GenerationBody, answer_format: CompletionFormat | ChatFormat) -> Exchange:
        return Exchange(
            generation, call, answer_format, stream=bool(body.stream), write_timeout=options.write_timeout_seconds
        )

    return routes


def _answer(call: Call, body: GenerationBody) -> Answer:
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return Answer(id=call.request.request_id, model=body.model, created=int(time.time()), include_usage=include_usage)


def _documented(body: type[Any]) -> dict[int | str, dict[str, Any]]:
    events = (
        "With `stream`: one JSON object in each `data:` line, then `data: [DONE]`, or an error body as the last one."
    )
    return {
        200: {
            "model": body,
            "description": "The answer.",
            "content": {"text/event-stream": {"schema": {"type": "string", "description": events}}},
        },
        "4XX": {"model": ErrorBody, "description": "The request was refused."},
        "5XX": {"model": ErrorBody, "description": "The request failed."},
    }
