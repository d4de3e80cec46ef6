"""EmbedService of the frontend."""

from __future__ import annotations

from typing import Any

import grpc

from kvbaton.v1 import embed_pb2, embed_pb2_grpc
from services.frontend.embedding.service import Embedding


class EmbedServicer(embed_pb2_grpc.EmbedServiceServicer):
    """A thin edge over `Embedding`."""

    def __init__(self, embedding: Embedding) -> None:
        self._embedding = embedding

    async def Embed(
        self, request: embed_pb2.EmbedRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> embed_pb2.EmbedResponse:
        """A cancelled call ends the worker's."""
        return await self._embedding.embed(request)
