"""POST /v1/responses."""

from __future__ import annotations

import time

from fastapi import APIRouter
from fastapi import Response as HttpResponse

from services.frontend.edge.answer import Answer
from services.frontend.edge.body import json_route
from services.frontend.edge.calls import request_id
from services.frontend.edge.documented import documented_stream
from services.frontend.edge.exchange import Exchange
from services.frontend.edge.headers import RequestIdHeader, WorkerHeaders
from services.frontend.edge.options import EdgeOptions
from services.frontend.edge.outputs import Work
from services.frontend.edge.responses_api.answer import ResponseBody, ResponseEvents
from services.frontend.edge.responses_api.bodies import Response, ResponseEvent
from services.frontend.edge.responses_api.schema import ResponsesRequest
from services.frontend.edge.responses_api.translate import responses_call
from services.frontend.request.api import Generation

_EVENTS = (
    "With `stream`: named events with one JSON object each, as OpenAI documents them; the last one is"
    " `response.completed`, `response.incomplete`, or `response.failed` after `error`."
)


def router(generation: Generation, options: EdgeOptions) -> APIRouter:
    """The route that answers without storing anything."""
    routes = APIRouter(tags=["generation"], route_class=json_route(options))

    @routes.post("/v1/responses", response_model=None, responses=documented_stream(Response, ResponseEvent, _EVENTS))
    async def responses(
        body: ResponsesRequest, workers: WorkerHeaders, x_request_id: RequestIdHeader = None
    ) -> HttpResponse:
        """Answers a conversation in items."""
        call = responses_call(body, request_id(x_request_id, "resp_"))
        work = workers.named_by(Work(call.request.request_id, [call]))
        answer = Answer(work.request_id, body.model, int(time.time()))
        writer = ResponseEvents(answer, body) if body.stream else ResponseBody(answer, body)
        return Exchange(generation, work, writer, write_timeout=options.write_timeout_seconds)

    return routes
