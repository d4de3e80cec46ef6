"""The process that `kvbaton frontend --processes N` starts: it serves nothing, and keeps N others that do."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import structlog

from services.config.frontend import FrontendConfig
from services.frontend.processes.place import MAX_SOCKET_PATH, Place, lock_folder
from services.frontend.processes.ports import reserved_port
from services.frontend.processes.slot import CannotStartError, Slot

log = structlog.get_logger()


def run_processes(config: FrontendConfig, listening: Callable[[FrontendConfig], None]) -> int:
    """Runs them until a signal ends them; returns the exit status: 0 when all of them ended in good order.

    `listening` is told, once all do, the configuration with the ports in use. Raises PortTakenError, ValueError, or
    CannotStartError with what kept one of them from its first start.
    """
    with ExitStack() as stack:
        port = stack.enter_context(reserved_port(config.host, config.port, flag="--port"))
        http_port = stack.enter_context(reserved_port(config.host, config.http_port, flag="--http-port"))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvbaton-frontend-")))
        stack.callback(os.close, lock_folder(folder))
        config = replace(config, port=port, http_port=http_port)
        places = [Place(number, config.processes, folder) for number in range(1, config.processes + 1)]
        if len(str(places[-1].socket)) > MAX_SOCKET_PATH:
            raise ValueError(f"TMPDIR: {tempfile.gettempdir()} is too long for the path of a Unix socket")
        return asyncio.run(_run(config, [Slot(config, place) for place in places], listening))


async def _run(config: FrontendConfig, slots: Sequence[Slot], listening: Callable[[FrontendConfig], None]) -> int:
    def stop() -> None:
        for slot in slots:
            slot.stop()

    def reload_keys() -> None:
        for slot in slots:
            slot.reload_keys()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    if config.access.api_keys is not None:
        loop.add_signal_handler(signal.SIGHUP, reload_keys)
    announcing = asyncio.create_task(_announce(slots, lambda: listening(config)))
    keeping = [asyncio.create_task(slot.keep(), name="slot") for slot in slots]
    try:
        # Until all have ended after a signal, or one can't start.
        await asyncio.wait(keeping, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        announcing.cancel()
        stop()
        ended = await asyncio.gather(*keeping, return_exceptions=True)
    for each in ended:
        if isinstance(each, BaseException):
            raise each
    return 0 if all(ended) else 1


async def _announce(slots: Sequence[Slot], listening: Callable[[], None]) -> None:
    for slot in slots:
        await slot.listening.wait()
    listening()


__all__ = ["CannotStartError", "run_processes"]
