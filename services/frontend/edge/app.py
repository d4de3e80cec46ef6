"""What the HTTP edge consists of."""

from __future__ import annotations

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from services.frontend.access.gate import Gate
from services.frontend.edge import errors
from services.frontend.edge.body import BodyMemory
from services.frontend.edge.gate import HttpGate
from services.frontend.edge.options import EdgeOptions
from services.frontend.edge.routes import embeddings as embedding_routes
from services.frontend.edge.routes import generation as generation_routes
from services.frontend.edge.routes import models as model_routes
from services.frontend.edge.routes import responses as response_routes
from services.frontend.edge.routes import system as system_routes
from services.frontend.edge.routes import tokenization as tokenization_routes
from services.frontend.embedding.service import Embedding
from services.frontend.request.api import Generation


def create_app(
    generation: Generation,
    embedding: Embedding,
    *,
    options: EdgeOptions | None = None,
    gate: Gate | None = None,
    registry: CollectorRegistry = REGISTRY,
    metrics_page: system_routes.MetricsPage | None = None,
) -> FastAPI:
    """The ASGI application over one frontend's service; it needs no lifespan events.

    With a `gate` every route but the system's needs an API key. /metrics shows `registry`, or
    the page of several processes.
    """
    app = FastAPI(
        title="Baton, OpenAI-compatible API",
        version="1",
        # Their pages load scripts from a foreign host.
        docs_url=None,
        redoc_url=None,
        # "/v1/models/" is an unknown route, not another name of one.
        redirect_slashes=False,
        # FastAPI's own spans, one for every scrape and probe too. Versions without them take any keyword.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    errors.install(app)
    options = options or EdgeOptions()
    app.state.body_memory = BodyMemory(options.max_bodies_bytes)
    keyed = []
    if gate is not None:
        app.add_middleware(HttpGate, gate=gate)
        # For the OpenAPI document alone: it checks nothing, and would come after the body.
        keyed.append(Depends(HTTPBearer(auto_error=False, description="An API key of this frontend.")))
    app.include_router(generation_routes.router(generation, options), dependencies=keyed)
    app.include_router(response_routes.router(generation, options), dependencies=keyed)
    app.include_router(embedding_routes.router(embedding, options), dependencies=keyed)
    app.include_router(tokenization_routes.router(generation, options), dependencies=keyed)
    app.include_router(model_routes.router(generation), dependencies=keyed)

    async def own_page() -> bytes:
        return generate_latest(registry)  # in the event loop's thread, which writes what it shows

    app.include_router(system_routes.router(generation, metrics_page or own_page))
    return app
