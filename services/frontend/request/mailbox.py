"""Items for one reader, in order.

asyncio.Queue serves any number of readers and writers, and asyncio.timeout around it makes a timer for every item. The
two were a fifth of what a token cost the frontend over HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Unbounded. Anybody puts, one task at a time gets, all in one event loop."""

    __slots__ = ("_items", "_loop", "_waiting")

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        # Asked for once: to find it out is a system call.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        """Behind all that came before."""
        self._items.append(item)
        self.wake()

    def clear(self) -> None:
        """Nobody will get what is here."""
        self._items.clear()

    async def get(self) -> T:
        """The next item, when there is one."""
        while not self._items:
            await self.wait()
        return self._items.popleft()

    async def wait(self) -> None:
        """Until something comes, or `wake` is called."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        waiting = self._waiting = self._loop.create_future()
        try:
            await waiting
        finally:
            self._waiting = None

    def wake(self) -> None:
        """Whoever waits looks again."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
