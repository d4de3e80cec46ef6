"""ModelService of the frontend: every model that can be generated or embedded with right now."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import model_pb2, model_pb2_grpc
from services.frontend.request.api import Generation


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Answers from what the workers have said of themselves."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def ListModels(
        self, request: model_pb2.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> model_pb2.ListModelsResponse:
        """May be empty."""
        return model_pb2.ListModelsResponse(models=self._generation.models())

    async def GetModelInfo(
        self, request: model_pb2.GetModelInfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> model_pb2.GetModelInfoResponse:
        """NOT_FOUND when no model, or more than one, fits."""
        models = self._generation.models()
        fitting = [info for info in models if request.model in ("", info.model.name)]
        if len(fitting) != 1:
            names = ", ".join(info.model.name for info in models) or "none"
            raise RequestError(
                grpc.StatusCode.NOT_FOUND,
                Reason.MODEL_NOT_FOUND,
                f"model: {request.model!r} doesn't name one of the models served here: {names}",
                field="model",
            )
        return model_pb2.GetModelInfoResponse(info=fitting[0])

    async def GetTokenizer(  # type: ignore[override]
        self, request: model_pb2.GetTokenizerRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[model_pb2.GetTokenizerResponse]:
        """Workers have the files; the frontend refuses."""
        raise RequestError(
            grpc.StatusCode.FAILED_PRECONDITION, Reason.WRONG_ROLE, "ask a worker for the tokenizer's files"
        )
        yield
