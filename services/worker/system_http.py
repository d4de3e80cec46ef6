"""The worker's system HTTP: /health, /live and /metrics.

Plain text also where everything else has TLS: probes and scrapers bring no certificate, and nothing secret is told.
"""

from __future__ import annotations

import asyncio

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kvbaton.v1 import worker_pb2
from services.telemetry.exposition import exposition
from services.worker.core import WorkerCore


def create_app(core: WorkerCore) -> Starlette:
    """`/health` is 200 only while SERVING; `/live` is 200 until the engine is gone, whatever the load."""

    async def health(_: Request) -> Response:
        return JSONResponse(_description(core), status_code=200 if core.lifecycle.serving else 503)

    async def live(_: Request) -> Response:
        failed = core.lifecycle.state == worker_pb2.WORKER_STATE_FAILED
        return JSONResponse(_description(core), status_code=503 if failed else 200)

    async def metrics(_: Request) -> Response:
        engine = core.engine
        page = await asyncio.to_thread(lambda: exposition(engine.collect_metrics() if engine is not None else ()))
        return Response(page, media_type=CONTENT_TYPE_LATEST)

    async def engine_http(scope: Scope, receive: Receive, send: Send) -> None:
        """What the engine serves of its own: the simulated one its command channel, others nothing."""
        engine = core.engine
        app: ASGIApp = getattr(engine, "http_app", Response(status_code=404))
        await app(scope, receive, send)

    routes = [Route("/health", health), Route("/live", live), Route("/metrics", metrics), Mount("/", engine_http)]
    return Starlette(routes=routes)


def _description(core: WorkerCore) -> dict[str, object]:
    return {
        "state": core.lifecycle.state_name,
        "detail": core.lifecycle.detail,
        "role": core.role.value,
        "instance_id": core.instance_id,
        "live_requests": len(core.legs),
    }
