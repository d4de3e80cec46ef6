"""Outputs of one request, of all its choices, that its client has not taken yet, bounded in bytes.

Owners never wait for a client: they go on reading their legs. So a client that does not read costs memory, up to a
stated number of bytes; then its request is ended.
"""

from __future__ import annotations

from collections.abc import Callable

import grpc

from kvbaton.errors import Reason, RequestError
from services.frontend.request.api import Output
from services.frontend.request.mailbox import Mailbox

TOKEN_BYTES = 4
# Bytes that an output costs beside its tokens and its text.
OUTPUT_BYTES = 128
# Bytes of one log probability, of a token or of one that was likely too.
LOGPROB_BYTES = 32


class Outbox:
    """One writer for each choice, its owner; one reader, the edge."""

    def __init__(self, max_bytes: int, *, choices: int = 1) -> None:
        self.buffered_bytes = 0
        # Choices whose last output has not come.
        self._open = choices
        self._max_bytes = max_bytes
        self._items: Mailbox[tuple[Output, int] | RequestError] = Mailbox()
        self._overflowed = False
        # Nobody takes, or nothing more is to come.
        self._closed = False
        self._cut_off: Callable[[], None] | None = None

    def put(self, output: Output) -> None:
        """Takes one output in. Drops every output and raises RequestError when the reader is too far behind.

        Two always fit: an output into an empty box, and the last of a request, behind which nothing comes.
        """
        if self._closed:
            return
        size = size_of(output)
        self._open -= output.finished is not None
        if self.buffered_bytes and self._open and self.buffered_bytes + size > self._max_bytes:
            self._drop()
            self._overflowed = True
            raise RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                Reason.CLIENT_TOO_SLOW,
                f"the client has left more than {self._max_bytes} bytes of its answer unread",
            )
        self.buffered_bytes += size
        self._items.put((output, size))

    def fail(self, error: RequestError) -> None:
        """The last word of all choices: `get` raises it behind what is buffered."""
        self._closed = True
        self._items.put(error)
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
        self._items.clear()
        self.buffered_bytes = 0


def size_of(output: Output) -> int:
    """What an output counts for while it is buffered, in bytes."""
    size = TOKEN_BYTES * len(output.token_ids) + len(output.text.encode()) + OUTPUT_BYTES
    if output.reasoning:
        size += len(output.reasoning.encode())
    for call in output.tool_calls:
        size += len(call.arguments.encode()) + len(call.name.encode()) + OUTPUT_BYTES
    for each in output.logprobs:
        size += LOGPROB_BYTES * (1 + len(each.top))
    return size
