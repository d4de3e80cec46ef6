"""The frontend's process, or processes: signals in, drain, exit status out."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace

import structlog
import uvloop

from services import heap
from services.config.frontend import FrontendConfig
from services.config.report import Setting, for_log
from services.frontend.processes.parent import CannotStartError, run_processes
from services.frontend.processes.place import Place
from services.frontend.processes.report import Report
from services.frontend.server import Frontend
from services.telemetry.logging import configure_logging
from services.telemetry.metrics import PROCESS_STARTS
from services.telemetry.tracing import configure_tracing
from services.transport import PortTakenError, join_host_port

log = structlog.get_logger()


def run_frontend(config: FrontendConfig, settings: Sequence[Setting] = ()) -> int:
    """Runs the frontend until a signal ends it; `settings` are logged. Returns the exit status."""
    configure_logging(level=config.log.log_level, format=config.log.log_format, service="frontend")
    log.info("configuration", **for_log(settings))
    try:
        status = run_processes(config, _log_listening) if config.processes > 1 else _run(config, None, _log_listening)
    except (PortTakenError, CannotStartError, ValueError) as error:
        log.error("frontend can't start", error=str(error))
        return 1
    log.info("stopped")
    return status


def run_child(config: FrontendConfig, place: Place, report: Report) -> int:
    """Runs one of several processes; its parent logs what it reports. Returns the exit status."""
    log_flags = config.log
    configure_logging(level=log_flags.log_level, format=log_flags.log_format, service="frontend", process=place.number)
    PROCESS_STARTS.labels(str(place.number)).inc()

    def listening(_: FrontendConfig) -> None:
        report.listening()
        report.keep_saying_alive(config.heartbeat)

    try:
        status = _run(config, place, listening)
    except (PortTakenError, ValueError) as error:
        report.cannot_start(str(error))
        return 1
    log.info("stopped")
    return status


def _run(config: FrontendConfig, place: Place | None, listening: Callable[[FrontendConfig], None]) -> int:
    """`listening` is told the configuration with the ports in use."""
    flush_spans = configure_tracing(enabled=config.trace.enable_otel, service="kvbaton-frontend")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, place, listening))
    finally:
        flush_spans()
    return 0


def _log_listening(config: FrontendConfig) -> None:
    processes = {"processes": config.processes} if config.processes > 1 else {}
    log.info(
        "listening",
        grpc=join_host_port(config.host, config.port),
        http=join_host_port(config.host, config.http_port),
        **processes,
    )


async def _serve(config: FrontendConfig, place: Place | None, listening: Callable[[FrontendConfig], None]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with Frontend(config, place) as frontend:
        if config.access.api_keys is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, frontend.reload_keys)
        heap.settle()
        listening(replace(config, port=frontend.grpc_port, http_port=frontend.http_port))
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
