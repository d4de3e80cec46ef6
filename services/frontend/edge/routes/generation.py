"""POST /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import time

from fastapi import APIRouter, Response

from kvbaton.errors import RequestError
from kvbaton.v1 import text_pb2
from services.frontend.edge.answer import Answer, BodyWriter, EventWriter
from services.frontend.edge.body import json_route
from services.frontend.edge.calls import request_id
from services.frontend.edge.chat.answer import ChatBody, ChatCompletion, ChatCompletionChunk, ChatEvents
from services.frontend.edge.chat.schema import ChatCompletionRequest
from services.frontend.edge.chat.translate import chat_call
from services.frontend.edge.completions.answer import Completion, CompletionBody, CompletionEvents, Shape
from services.frontend.edge.completions.schema import CompletionRequest
from services.frontend.edge.completions.translate import completion_work
from services.frontend.edge.documented import documented_stream
from services.frontend.edge.exchange import Exchange
from services.frontend.edge.headers import RequestIdHeader, WorkerHeaders
from services.frontend.edge.options import EdgeOptions
from services.frontend.edge.outputs import Work
from services.frontend.edge.stream_options import usage_events
from services.frontend.request.api import Generation

_EVENTS = "With `stream`: one JSON object in each `data:` line, then `data: [DONE]`, or an error body as the last one."


def router(generation: Generation, options: EdgeOptions) -> APIRouter:
    """The routes that generate text."""
    routes = APIRouter(tags=["generation"], route_class=json_route(options))

    @routes.post("/v1/completions", response_model=None, responses=documented_stream(Completion, Completion, _EVENTS))
    async def completions(
        body: CompletionRequest, workers: WorkerHeaders, x_request_id: RequestIdHeader = None
    ) -> Response:
        """Continues one prompt or several."""
        usage = usage_events(body.stream_options, stream=bool(body.stream))
        work = workers.named_by(completion_work(body, request_id(x_request_id, "cmpl-")))
        answer = Answer(work.request_id, body.model, int(time.time()))
        shape = Shape(await _echoes(generation, body, work), work.choices_per_call, body.logprobs is not None)
        return exchange(work, CompletionEvents(answer, shape, usage) if body.stream else CompletionBody(answer, shape))

    @routes.post(
        "/v1/chat/completions",
        response_model=None,
        responses=documented_stream(ChatCompletion, ChatCompletionChunk, _EVENTS),
    )
    async def chat_completions(
        body: ChatCompletionRequest, workers: WorkerHeaders, x_request_id: RequestIdHeader = None
    ) -> Response:
        """Answers a conversation."""
        usage = usage_events(body.stream_options, stream=bool(body.stream))
        call = chat_call(body, request_id(x_request_id, "chatcmpl-"))
        work = workers.named_by(Work(call.request.request_id, [call]))
        answer = Answer(work.request_id, body.model, int(time.time()))
        if body.stream:
            return exchange(work, ChatEvents(answer, call.choices, usage))
        return exchange(work, ChatBody(answer, call.choices, with_logprobs=bool(body.logprobs)))

    def exchange(work: Work, writer: EventWriter | BodyWriter) -> Exchange:
        return Exchange(generation, work, writer, write_timeout=options.write_timeout_seconds)

    return routes


async def _echoes(generation: Generation, body: CompletionRequest, work: Work) -> list[str]:
    """The text in front of the choices of each prompt."""
    if not body.echo:
        return [""] * len(body.prompt)
    echoes: list[str] = []
    for prompt, call in zip(body.prompt, work.calls, strict=True):
        if isinstance(prompt, str):
            echoes.append(prompt)
            continue
        request = text_pb2.DetokenizeRequest(
            model=body.model, token_ids=prompt, skip_special_tokens=body.skip_special_tokens
        )
        try:
            echoes.append((await generation.detokenize(request)).text)
        except RequestError as error:
            raise call.in_openai_terms(error, work.request_id) from error
    return echoes
