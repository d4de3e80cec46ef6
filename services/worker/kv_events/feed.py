"""Brings the engine's KV events into the hub, whatever they are, for as long as the worker lives."""

from __future__ import annotations

import asyncio

import structlog

from services.worker.engines.protocol import Engine
from services.worker.kv_events.hub import KvEventHub

log = structlog.get_logger()

_RETRY_SECONDS = 1.0


async def feed(engine: Engine, hub: KvEventHub) -> None:
    """To be cancelled. After an error nothing is known, and the engine is asked again: no wrong page is ever told."""
    while True:
        try:
            async for change in engine.kv_events():
                hub.apply(change)
            return
        except Exception as error:
            log.error("kv events failed", exc_info=error)
        hub.clear()
        await asyncio.sleep(_RETRY_SECONDS)
