"""How the death of SGLang's processes is noticed, and kept from taking the host with it.

Two ways lead here. A descriptor per child (`pidfd`) tells at once that it ended. SIGQUIT is how SGLang's children and
its watchdog threads report a failure to the host; SGLang's own handlers for it SIGKILL the host, so ours takes their
place from the launch on (`ServerArgs.custom_sigquit_handler`).
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType

import structlog

_log = structlog.get_logger(__name__)


class EngineLaunchError(RuntimeError):
    """A child reported a failure while the engine was being built."""


class DeathWatch:
    """The first cause of death of one engine, told once to whoever asks."""

    def __init__(self) -> None:
        self._cause: str | None = None
        self._listener: Callable[[str], None] | None = None
        self.launching = False

    @property
    def cause(self) -> str | None:
        """None while the engine lives."""
        return self._cause

    def listen(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with the cause, at once if the engine is dead already. From any thread: it must be short."""
        self._listener = listener
        if self._cause is not None:
            listener(self._cause)

    def declare(self, cause: str) -> None:
        """The engine is dead. Takes no lock: a signal handler calls it. Later causes are dropped."""
        if self._cause is not None:
            return
        self._cause = cause
        if self._listener is not None:
            self._listener(cause)

    def watch(self, pids: Iterable[int]) -> None:
        """Declare death when one of these processes ends. Where the kernel has no pidfd, SGLang's SIGQUIT is left."""
        poll = select.poll()
        pid_of: dict[int, int] = {}
        for pid in pids:
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                self.declare(f"SGLang's process {pid} ended right after the launch")
                continue
            except OSError as error:
                _log.warning("engine_watch_without_pidfd", pid=pid, error=str(error))
                continue
            pid_of[descriptor] = pid
            poll.register(descriptor, select.POLLIN)

        def wait() -> None:
            (descriptor, _), *_ = poll.poll()
            self.declare(f"SGLang's process {pid_of[descriptor]} ended")
            for each in pid_of:
                os.close(each)

        if pid_of:
            threading.Thread(target=wait, name="engine-watch", daemon=True).start()


_watched: DeathWatch | None = None


def on_sigquit(_signum: int, _frame: FrameType | None) -> None:
    """The host's SIGQUIT handler. A module-level function because SGLang pickles it into its children's arguments."""
    if _watched is None:
        return
    _watched.declare("a process of SGLang reported a failure (SIGQUIT); its traceback is in the log")
    if _watched.launching:
        raise EngineLaunchError(_watched.cause)


def take_sigquit(watch: DeathWatch) -> None:
    """Send this process's SIGQUIT to `watch`, of which there is one per process. Main thread only."""
    global _watched
    _watched = watch
    signal.signal(signal.SIGQUIT, on_sigquit)
