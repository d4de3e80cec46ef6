"""The frontend's process: signals in, drain, exit status out."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence

import structlog
import uvloop

from services import heap
from services.config.frontend import FrontendConfig
from services.config.report import Setting, for_log
from services.frontend.server import Frontend
from services.telemetry.logging import configure_logging
from services.telemetry.tracing import configure_tracing
from services.transport import PortTakenError

log = structlog.get_logger()


def run_frontend(config: FrontendConfig, settings: Sequence[Setting] = ()) -> int:
    """Runs the frontend until a signal ends it; `settings` are logged. Returns the exit status."""
    configure_logging(level=config.log.log_level, format=config.log.log_format, service="frontend")
    log.info("configuration", **for_log(settings))
    try:
        flush_spans = configure_tracing(enabled=config.trace.enable_otel, service="kvbaton-frontend")
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_serve(config))
        finally:
            flush_spans()
    except (PortTakenError, ValueError) as error:
        log.error("frontend can't start", error=str(error))
        return 1
    log.info("stopped")
    return 0


async def _serve(config: FrontendConfig) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with Frontend(config) as frontend:
        if config.access.api_keys is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, frontend.reload_keys)
        heap.settle()
        await stop.wait()
        stop.clear()
        draining = asyncio.create_task(frontend.drain())
        hurrying = asyncio.create_task(stop.wait())
        await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            log.warning("second signal: not waiting for the drain")
            frontend.shut_down()
        hurrying.cancel()
        await draining
