"""What the HTTP edge consists of."""

from __future__ import annotations

from fastapi import FastAPI
from prometheus_client import REGISTRY, CollectorRegistry

from services.frontend.edge import errors
from services.frontend.edge.options import EdgeOptions
from services.frontend.edge.routes import embeddings as embedding_routes
from services.frontend.edge.routes import generation as generation_routes
from services.frontend.edge.routes import models as model_routes
from services.frontend.edge.routes import system as system_routes
from services.frontend.embedding.service import Embedding
from services.frontend.request.api import Generation


def create_app(
    generation: Generation,
    embedding: Embedding,
    *,
    options: EdgeOptions | None = None,
    registry: CollectorRegistry = REGISTRY,
) -> FastAPI:
    """The ASGI application over one frontend's service; it needs no lifespan events. /metrics shows `registry`."""
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
    app.include_router(generation_routes.router(generation, options))
    app.include_router(embedding_routes.router(embedding, options))
    app.include_router(model_routes.router(generation))
    app.include_router(system_routes.router(generation, registry))
    return app
