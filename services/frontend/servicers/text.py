"""TextService of the frontend."""

from __future__ import annotations

from typing import Any

import grpc

from kvbaton.v1 import text_pb2, text_pb2_grpc
from services.frontend.request.api import Generation


class TextServicer(text_pb2_grpc.TextServiceServicer):
    """A thin edge over `Generation`."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def Tokenize(
        self, request: text_pb2.TokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> text_pb2.TokenizeResponse:
        """The tokens of a prompt."""
        return await self._generation.tokenize(request)

    async def Detokenize(
        self, request: text_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> text_pb2.DetokenizeResponse:
        """The text of tokens."""
        return await self._generation.detokenize(request)
