"""The OpenAI-compatible HTTP edge: requests become kvbaton.v1 requests, outputs become OpenAI's bodies and events."""

from services.frontend.edge.app import create_app
from services.frontend.edge.options import EdgeOptions

__all__ = ["EdgeOptions", "create_app"]
