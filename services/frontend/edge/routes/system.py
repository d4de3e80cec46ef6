"""GET /health, /live and /metrics, for orchestrators and Prometheus."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from typing_extensions import TypedDict

from services.frontend.edge.routes.models import available_models
from services.frontend.edge.wire import json_response
from services.frontend.request.api import Generation

MetricsPage = Callable[[], Awaitable[bytes]]
"""Makes the page of /metrics."""


class Health(TypedDict):
    """Whether the frontend takes requests, and for which models."""

    status: Literal["ok", "draining", "no_model"]
    models: list[str]


class Liveness(TypedDict):
    """That the process answers."""

    status: Literal["ok"]


def router(generation: Generation, metrics_page: MetricsPage) -> APIRouter:
    """The routes that are not OpenAI's."""
    routes = APIRouter(tags=["system"])

    @routes.get(
        "/health",
        response_model=None,
        responses={200: {"model": Health}, 503: {"model": Health, "description": "Takes no request."}},
    )
    async def health() -> Response:
        """Readiness: 200 while /v1/models lists at least one model."""
        names = [info.model.name for info in available_models(generation)]
        if names:
            return json_response(Health(status="ok", models=names))
        return json_response(Health(status="draining" if generation.draining else "no_model", models=[]), status=503)

    @routes.get("/live", response_model=None, responses={200: {"model": Liveness}})
    async def live() -> Response:
        """Liveness: the event loop runs."""
        return json_response(Liveness(status="ok"))

    @routes.get("/metrics", response_model=None, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """The frontend's metrics in Prometheus's text format."""
        return Response(await metrics_page(), headers={"content-type": CONTENT_TYPE_LATEST})

    return routes
