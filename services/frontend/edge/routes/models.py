"""GET /v1/models: what a request could be sent to right now."""

from __future__ import annotations

import time
from typing import Literal

import grpc
from fastapi import APIRouter, Response
from typing_extensions import TypedDict

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import model_pb2
from services.frontend.edge.errors import ErrorBody
from services.frontend.edge.wire import json_response
from services.frontend.request.api import Generation


class Model(TypedDict):
    """One model. `max_model_len` is its context length in tokens, as SGLang and vLLM report it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(TypedDict):
    """Every model, by name."""

    object: Literal["list"]
    data: list[Model]


def available_models(generation: Generation) -> list[model_pb2.ModelInfo]:
    """What /v1/models lists and /health answers by, so that the two never disagree."""
    return [] if generation.draining else generation.models()


def router(generation: Generation) -> APIRouter:
    """The routes that list models."""
    routes = APIRouter(tags=["models"])
    # A worker's record does not say when its model was made; the same number in every answer is what clients need.
    created = int(time.time())

    @routes.get("/v1/models", response_model=None, responses={200: {"model": ModelList}})
    async def list_models() -> Response:
        """Every model that takes requests now."""
        models = [_model(info, created) for info in available_models(generation)]
        return json_response(ModelList(object="list", data=models))

    @routes.get(
        "/v1/models/{model_id:path}",
        response_model=None,
        responses={200: {"model": Model}, "4XX": {"model": ErrorBody, "description": "No such model."}},
    )
    async def retrieve_model(model_id: str) -> Response:
        """One model; its name may have slashes."""
        for info in available_models(generation):
            if info.model.name == model_id:
                return json_response(_model(info, created))
        raise RequestError(
            grpc.StatusCode.NOT_FOUND, Reason.MODEL_NOT_FOUND, f"model {model_id!r} is not served", field="model"
        )

    return routes


def _model(info: model_pb2.ModelInfo, created: int) -> Model:
    return Model(
        id=info.model.name,
        object="model",
        created=created,
        owned_by="kvbaton",
        max_model_len=info.runtime.context_length,
    )
