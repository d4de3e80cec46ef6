"""ModelService of a worker: what it serves, and the files a frontend needs to speak text to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import model_pb2, model_pb2_grpc
from services.worker.core import WorkerCore

CHUNK_BYTES = 1024 * 1024


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """UNAVAILABLE until the engine is there."""

    def __init__(self, core: WorkerCore) -> None:
        self._core = core

    async def ListModels(
        self, request: model_pb2.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> model_pb2.ListModelsResponse:
        """The one model of this worker."""
        return model_pb2.ListModelsResponse(models=[self._core.require_loaded().model_info])

    async def GetModelInfo(
        self, request: model_pb2.GetModelInfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> model_pb2.GetModelInfoResponse:
        """NOT_FOUND for another model's name."""
        info = self._core.require_loaded().model_info
        if request.model not in ("", info.model.name):
            raise _not_found(f"model: this worker serves {info.model.name!r}, not {request.model!r}", "model")
        return model_pb2.GetModelInfoResponse(info=info)

    async def GetTokenizer(  # type: ignore[override]
        self, request: model_pb2.GetTokenizerRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[model_pb2.GetTokenizerResponse]:
        """File by file, in chunks of at most 1 MiB."""
        loaded = self._core.require_loaded()
        if not loaded.tokenizer_files:
            raise _not_found(f"the model folder of {loaded.record.model.name!r} has no tokenizer.json", "")
        for file in loaded.tokenizer_files:
            content = await asyncio.to_thread(file.path.read_bytes)
            for offset in range(0, max(len(content), 1), CHUNK_BYTES):
                chunk = model_pb2.GetTokenizerResponse(
                    file_name=file.path.name, offset=offset, data=content[offset : offset + CHUNK_BYTES]
                )
                if offset == 0:
                    chunk.file_size, chunk.file_sha256 = file.size, file.sha256
                yield chunk


def _not_found(message: str, field: str) -> RequestError:
    reason = Reason.MODEL_NOT_FOUND if field else Reason.NO_TOKENIZER
    return RequestError(grpc.StatusCode.NOT_FOUND, reason, message, field=field)
