"""The file of --api-keys while the process runs: read again when it changes, or when somebody asks for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from services.frontend.access.gate import Gate
from services.frontend.access.keys import ApiKey, KeyFileError, names_of, read_keys
from services.frontend.access.usage import Usage, own_usage

log = structlog.get_logger()

POLL_SECONDS = 2.0

Signature = tuple[int, int, int, int] | None


class KeyFile:
    """Feeds a gate from the file; use it as an async context manager.

    Watched by its status, not by inotify: Kubernetes changes a secret by swapping a symlink two folders further up, and
    network file systems tell nobody. A file that can't be used changes nothing. Creating it raises KeyFileError.
    """

    def __init__(
        self, path: Path, *, poll_seconds: float = POLL_SECONDS, usage: Callable[[str], Usage] = own_usage
    ) -> None:
        """`usage` as in `Gate`."""
        self._path = path
        self._poll_seconds = poll_seconds
        self._seen = _signature(path)
        self._keys: tuple[ApiKey, ...] = read_keys(path)
        self.gate = Gate(self._keys, usage=usage)
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        log.info("api keys read", file=str(path), keys=len(self._keys))

    def reload(self) -> None:
        """Reads the file soon, changed or not."""
        self._asked.set()

    async def __aenter__(self) -> KeyFile:
        self._task = asyncio.create_task(self._watch(), name="api-keys")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            asked = await self._wait()
            try:
                await self._look(asked)
            except Exception as error:  # a watcher that died would leave old keys in force, and tell nobody
                log.error("api keys not looked at", file=str(self._path), exc_info=error)

    async def _look(self, asked: bool) -> None:
        signature = await asyncio.to_thread(_signature, self._path)
        if asked or signature != self._seen:
            # Of before the file was read: what is written meanwhile is found next time.
            self._seen = signature
            await self._read()

    async def _wait(self) -> bool:
        """Whether somebody asked."""
        try:
            async with asyncio.timeout(self._poll_seconds):
                await self._asked.wait()
        except TimeoutError:
            return False
        self._asked.clear()
        return True

    async def _read(self) -> None:
        try:
            keys = await asyncio.to_thread(read_keys, self._path)
        except KeyFileError as error:
            log.error("api keys not changed: the new file can't be used", error=str(error), keys=len(self._keys))
            return
        before, after = set(names_of(self._keys)), set(names_of(keys))
        self.gate.replace(keys)
        self._keys = keys
        log.info("api keys read", keys=len(keys), added=sorted(after - before), removed=sorted(before - after))


def _signature(path: Path) -> Signature:
    """What differs when the file, or what its name leads to, was replaced or written."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
