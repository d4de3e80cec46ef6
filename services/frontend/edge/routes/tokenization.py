"""POST /tokenize and /detokenize, also under /v1 as SGLang has them."""

from __future__ import annotations

from fastapi import APIRouter, Response

from kvbaton.errors import RequestError
from services.frontend.edge.body import json_route
from services.frontend.edge.calls import request_id
from services.frontend.edge.documented import documented
from services.frontend.edge.headers import RequestIdHeader
from services.frontend.edge.options import EdgeOptions
from services.frontend.edge.tokenization import (
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
    detokenize_request,
    in_body_terms,
    tokenize_request,
    tokenized,
)
from services.frontend.edge.wire import json_response
from services.frontend.request.api import Generation


def router(generation: Generation, options: EdgeOptions) -> APIRouter:
    """The routes between text and tokens."""
    routes = APIRouter(tags=["text"], route_class=json_route(options))

    @routes.post("/v1/tokenize", response_model=None, responses=documented(Tokenized))
    @routes.post("/tokenize", response_model=None, responses=documented(Tokenized))
    async def tokenize(body: TokenizeRequest, x_request_id: RequestIdHeader = None) -> Response:
        """The tokens of a prompt, exactly as a generating route would make them."""
        own_id = request_id(x_request_id, "tokn-")
        try:
            response = await generation.tokenize(tokenize_request(body))
        except RequestError as error:
            raise in_body_terms(error, own_id) from error
        answer = tokenized(response, with_strings=bool(body.return_token_strs))
        return json_response(answer, headers={"x-request-id": own_id})

    @routes.post("/v1/detokenize", response_model=None, responses=documented(Detokenized))
    @routes.post("/detokenize", response_model=None, responses=documented(Detokenized))
    async def detokenize(body: DetokenizeRequest, x_request_id: RequestIdHeader = None) -> Response:
        """The text of tokens."""
        own_id = request_id(x_request_id, "detk-")
        try:
            response = await generation.detokenize(detokenize_request(body))
        except RequestError as error:
            raise in_body_terms(error, own_id) from error
        return json_response(Detokenized(text=response.text, prompt=response.text), headers={"x-request-id": own_id})

    return routes
