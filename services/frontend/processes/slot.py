"""One of a frontend's processes as its parent sees it: started, and started again whenever it ends by itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process

import structlog

from services.child_process import describe_exit, dying_with_parent
from services.config.frontend import FrontendConfig
from services.frontend.access.usage import forget_usage
from services.frontend.processes.place import Place
from services.frontend.processes.report import read_report
from services.registry.backoff import Backoff
from services.telemetry.shared import forget_process

log = structlog.get_logger()

_FIRST_BACKOFF, _LONGEST_BACKOFF = 0.5, 30.0
# A process that lived so long is started again at once.
_LONG_LIFE_SECONDS = 60.0
# Beyond --drain-timeout, for what a drain takes besides waiting.
_STOP_GRACE_SECONDS = 30.0
# A process that listens and has said nothing for so many heartbeats, and so long, is frozen: connections that it is
# given would hang. A large tokenizer that is loaded holds up all else in a process for a second.
_SILENT_HEARTBEATS, _SILENT_SECONDS = 20, 10.0


class CannotStartError(Exception):
    """A process ended before it had listened for the first time; the message says why."""


class Slot:
    """A process and its successors in one place."""

    def __init__(self, config: FrontendConfig, place: Place) -> None:
        self._place = place
        self._order = pickle.dumps(config)
        self._stop_within = config.drain_timeout + _STOP_GRACE_SECONDS
        self._heartbeat = config.heartbeat
        self._spoken = False
        self._process: Process | None = None
        self._stopping = asyncio.Event()
        self._error = ""
        self.listening = asyncio.Event()
        """Set while its process takes connections."""

    async def keep(self) -> bool:
        """Returns when its process has ended after `stop`: whether that was by itself, in good order.

        Raises CannotStartError if it never listened.
        """
        backoff = Backoff(_FIRST_BACKOFF, _LONGEST_BACKOFF)
        has_listened = False
        while not self._stopping.is_set():
            began = time.monotonic()
            status: int | None = None
            try:
                status = await self._live()
            except OSError as error:  # no memory or no process left, for now
                if not has_listened:
                    raise CannotStartError(f"process {self._place.number}: {error}") from error
                self._error = str(error)
            # Also of one that was told to stop before it could listen to signals.
            if self._stopping.is_set():
                return status in (None, 0, -signal.SIGTERM)
            has_listened = has_listened or self.listening.is_set()
            cause = self._error or describe_exit(status or 0)
            if not has_listened:
                raise CannotStartError(self._error or f"process {self._place.number} {cause}")
            self.listening.clear()
            if time.monotonic() - began > _LONG_LIFE_SECONDS:
                backoff.reset()
            wait = backoff.next()
            log.error("a process ended, starting another", process=self._place.number, cause=cause, seconds=wait)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait)
        return True

    def stop(self) -> None:
        """Lets the process drain; the second time, hurry."""
        if not self._stopping.is_set():
            self._stopping.set()
            asyncio.get_running_loop().call_later(self._stop_within, self._kill)
        self._signal(signal.SIGTERM)

    def reload_keys(self) -> None:
        """Lets the process read its API keys again. One that doesn't listen yet is about to read them."""
        if self.listening.is_set():
            self._signal(signal.SIGHUP)

    async def _live(self) -> int:
        """One process from its start to its end; its exit status."""
        place = self._place
        command = (sys.executable, "-P", "-m", "services.frontend.processes.child")
        arguments = (str(place.number), str(place.count), str(place.folder))
        self._error = ""
        # In a session of its own: a Ctrl-C in the terminal is for the parent, which passes it on.
        process = self._process = await asyncio.create_subprocess_exec(
            *dying_with_parent([*command, *arguments], signal.SIGTERM), stdin=PIPE, stdout=PIPE, start_new_session=True
        )
        try:
            if self._stopping.is_set():
                self._signal(signal.SIGTERM)
            watching = asyncio.create_task(self._watch_silence(process), name="silence")
            try:
                await self._hear(process)
                return await process.wait()
            finally:
                watching.cancel()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            forget_process(place.folder, place.number)
            forget_usage(place.folder, place.number)

    async def _hear(self, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(ConnectionError):  # it is dead already
            process.stdin.write(self._order)
            await process.stdin.drain()
        process.stdin.close()
        async for line in process.stdout:
            self._spoken = True
            listening, error = read_report(line)
            self._error = error or self._error
            if listening:
                self.listening.set()

    async def _watch_silence(self, process: Process) -> None:
        """Kills a process that listens and is frozen, which ends it as any other end does."""
        silent = 0
        while silent < max(_SILENT_HEARTBEATS, _SILENT_SECONDS / self._heartbeat):
            # Turns of this loop and not of the clock: while this process stands still it can't hear.
            await asyncio.sleep(self._heartbeat)
            if self._stopping.is_set():
                return  # it has its time for that
            silent = 0 if self._spoken or not self.listening.is_set() else silent + 1
            self._spoken = False
        log.error("a process says nothing, killing it", process=self._place.number, seconds=silent * self._heartbeat)
        process.kill()

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            log.error("a process does not end, killing it", process=self._place.number, seconds=self._stop_within)
            self._process.kill()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)
