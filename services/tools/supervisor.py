"""One child process of ours: its log, its death, and an end that leaves nothing of it behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from services.child_process import describe_exit, dying_with_parent

_POLL_SECONDS = 0.05
_GROUP_GONE_SECONDS = 3.0
_HURRY_SECONDS = 3.0
_TAIL_BYTES = 64 * 1024


class ChildDiedError(Exception):
    """A child ended by itself; the message has its exit status and the end of its log."""

    def __init__(self, child: Child) -> None:
        self.name = child.name
        self.log_tail = child.log_tail()
        indented = "\n".join(f"  | {line}" for line in self.log_tail) or "  | (empty)"
        super().__init__(f"{child.name} {describe_exit(child.exit_status())}. The end of {child.log_file}:\n{indented}")


class Child:
    """A process in a session of its own, so that a Ctrl-C in the terminal reaches only us.

    It leads its process group: what it started and left behind is killed with the group. On Linux it gets SIGTERM when
    the thread that called `start` ends, however it ends. Output goes to the end of `log_file`.
    """

    def __init__(self, name: str, command: Sequence[str], log_file: Path, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.command = tuple(command)
        self.log_file = log_file
        self.env = dict(os.environ if env is None else env)
        self.started_at = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def pid(self) -> int:
        """Of the last start; it is also the id of the process group."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Started and not ended."""
        return self._process is not None and self.exit_status() is None

    def start(self) -> None:
        """Starts it, or starts it again after its end. Raises OSError."""
        assert not self.running, f"{self.name} runs already"
        # Not SIGKILL: a worker that is killed while its engine is being built leaves the engine's processes behind.
        command = dying_with_parent(self.command, signal.SIGTERM)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env, start_new_session=True
            )
        self.started_at = time.monotonic()

    def exit_status(self) -> int | None:
        """None while it runs or before the start; minus the signal's number when one ended it.

        Whatever the process left in its group is killed when its end is first seen here.
        """
        process = self._process
        if process is None or process.returncode is not None:
            return None if process is None else process.returncode
        # Looks without collecting: until then nobody else can get this id, so the group is certainly ours.
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        self._signal_group(signal.SIGKILL)
        return process.wait()

    def log_tail(self, lines: int = 30) -> list[str]:
        """The last lines that this life of the process wrote."""
        try:
            with self.log_file.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, size - _TAIL_BYTES))
                return log.read().decode(errors="replace").splitlines()[-lines:]
        except OSError:
            return []

    def signal(self, number: signal.Signals) -> None:
        """To the process itself, not to its group: its own children are its own business."""
        if self.running:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to the whole group, as a crash of the machine would look."""
        if self.running:
            self._signal_group(signal.SIGKILL)

    async def wait(self) -> int:
        """The exit status, when it ends."""
        while True:
            if (status := self.exit_status()) is not None:
                return status
            await asyncio.sleep(_POLL_SECONDS)

    async def stop(self, deadline: float, hurry: asyncio.Event | None = None) -> bool:
        """SIGTERM, and SIGKILL to the group after `deadline` seconds; sooner once `hurry` is set.

        True when the process ended by itself. Returns when nothing of its group is left.
        """
        if self._process is None:
            return True
        if not self.running:
            await self._group_gone()
            return True
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)  # a stopped process would never see it
        ended = await self._ended_within(deadline, hurry)
        if not ended and hurry is not None and hurry.is_set():
            # To our own processes a second SIGTERM means: no drain, but no litter either.
            self.signal(signal.SIGTERM)
            ended = await self._ended_within(_HURRY_SECONDS, None)
        if not ended:
            self._signal_group(signal.SIGKILL)
            await self.wait()
        await self._group_gone()
        return ended

    def group_exists(self) -> bool:
        """Whether any process of the group still runs."""
        return self._process is not None and bool(group_members(self.pid))

    async def _ended_within(self, seconds: float, hurry: asyncio.Event | None) -> bool:
        until = time.monotonic() + seconds
        while self.running:
            if time.monotonic() >= until or (hurry is not None and hurry.is_set()):
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True

    async def _group_gone(self) -> None:
        until = time.monotonic() + _GROUP_GONE_SECONDS
        while self.group_exists():
            if time.monotonic() >= until:
                return
            await asyncio.sleep(_POLL_SECONDS)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


async def stop_all(children: Iterable[Child], deadline: float, hurry: asyncio.Event | None = None) -> list[str]:
    """Stops them at the same time. Returns the names of those that had to be killed."""
    stopping = list(children)
    ended = await asyncio.gather(*(child.stop(deadline, hurry) for child in stopping))
    return [child.name for child, by_itself in zip(stopping, ended, strict=True) if not by_itself]


def group_members(group: int) -> list[int]:
    """Process ids of a group. Zombies don't count: they hold nothing, and not every init process collects them."""
    if not Path("/proc/self/stat").exists():
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return []
        return [group]
    members: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "pid (command) state ppid pgrp ...", and the command may hold anything.
            state, _, pgrp = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state not in "ZX":
                members.append(int(stat.parent.name))
    return members
