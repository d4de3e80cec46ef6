"""Outputs of one request that its client has not taken yet, bounded in bytes.

The owner never waits for a client: it goes on reading its legs. So a client that does not read costs memory, up to a
stated number of bytes; then its request is ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc

from kvbaton.errors import Reason, RequestError
from services.frontend.request.api import Output

TOKEN_BYTES = 4
# Bytes that an output costs beside its tokens and its text.
OUTPUT_BYTES = 128


class Outbox:
    """One writer, the request's owner; one reader, its edge."""

    def __init__(self, max_bytes: int) -> None:
        self.buffered_bytes = 0
        self._max_bytes = max_bytes
        self._items: asyncio.Queue[tuple[Output, int] | RequestError] = asyncio.Queue()
        self._overflowed = False
        self._closed = False
        self._cut_off: Callable[[], None] | None = None

    def put(self, output: Output) -> None:
        """Takes one output in. Drops every output and raises RequestError when the reader is too far behind.

        Two always fit: an output into an empty box, and the last of a request, behind which nothing comes.
        """
        if self._closed:
            return
        size = size_of(output)
        if self.buffered_bytes and output.finished is None and self.buffered_bytes + size > self._max_bytes:
            self._drop()
            self._overflowed = True
            raise RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                Reason.CLIENT_TOO_SLOW,
                f"the client has left more than {self._max_bytes} bytes of its answer unread",
            )
        self.buffered_bytes += size
        self._items.put_nowait((output, size))

    def fail(self, error: RequestError) -> None:
        """The last word: `get` raises it behind what is buffered."""
        self._items.put_nowait(error)
        if self._overflowed and self._cut_off is not None:
            self._cut_off()

    async def get(self) -> Output:
        """The next output. Raises the RequestError that `fail` was given."""
        item = await self._items.get()
        if isinstance(item, RequestError):
            raise item
        output, size = item
        self.buffered_bytes -= size
        return output

    def when_cut_off(self, act: Callable[[], None]) -> None:
        """`act` is called when the error of an overflow is there to be read: the reader hangs in a write."""
        self._cut_off = act

    def close(self) -> None:
        """The reader is gone: nothing is kept for it."""
        self._closed = True
        self._cut_off = None
        self._drop()

    def _drop(self) -> None:
        while not self._items.empty():
            self._items.get_nowait()
        self.buffered_bytes = 0


def size_of(output: Output) -> int:
    """What an output counts for while it is buffered, in bytes."""
    return TOKEN_BYTES * len(output.token_ids) + len(output.text.encode()) + OUTPUT_BYTES
