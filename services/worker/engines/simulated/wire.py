"""Frames on the data sockets between prefill and decode.

Towards prefill: who decode is, the page indices of a room, an abort. Towards decode: pages, written without asking
whether anyone still waits for them; then the notice that a room is complete; and the confirmation of an abort.
"""

from __future__ import annotations

import asyncio
import struct
from array import array
from collections.abc import Sequence
from enum import IntEnum
from typing import cast

INCARNATION_BYTES = 16

_HEADER = struct.Struct("<IB")
_ROOM = struct.Struct("<Q")
_ROOM_AND_NUMBER = struct.Struct("<QI")


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1
    REGISTER = 2
    ABORT = 3
    WRITE = 4
    DONE = 5
    ABORT_ACK = 6


def hello(incarnation: bytes) -> bytes:
    """Decode's first frame."""
    return _frame(Kind.HELLO, incarnation)


def register(room: int, pages: Sequence[int]) -> bytes:
    """Decode's pages for a room, in the order of the sequence."""
    return _frame(Kind.REGISTER, _ROOM.pack(room) + array("I", pages).tobytes())


def read_register(body: memoryview) -> tuple[int, list[int]]:
    """Room and pages."""
    return _ROOM.unpack_from(body)[0], body[_ROOM.size :].cast("I").tolist()


def abort(room: int, generation: int) -> bytes:
    """Decode no longer wants the room; `generation` comes back in the confirmation."""
    return _frame(Kind.ABORT, _ROOM_AND_NUMBER.pack(room, generation))


def abort_ack(room: int, generation: int) -> bytes:
    """Prefill writes nothing for the room any more."""
    return _frame(Kind.ABORT_ACK, _ROOM_AND_NUMBER.pack(room, generation))


def read_abort(body: memoryview) -> tuple[int, int]:
    """Room and generation of an abort or its confirmation."""
    return cast("tuple[int, int]", _ROOM_AND_NUMBER.unpack(body))


def done(room: int) -> bytes:
    """Every page of the room is written."""
    return _frame(Kind.DONE, _ROOM.pack(room))


def read_done(body: memoryview) -> int:
    """The room."""
    return _ROOM.unpack(body)[0]


def write(pages: Sequence[int], contents: bytes) -> bytes:
    """Contents, one page behind the other, for those pages."""
    return _frame(Kind.WRITE, len(pages).to_bytes(4, "little") + array("I", pages).tobytes() + contents)


def read_write(body: memoryview) -> tuple[list[int], memoryview]:
    """Pages and contents."""
    end = 4 + 4 * int.from_bytes(body[:4], "little")
    return body[4:end].cast("I").tolist(), body[end:]


class FrameProtocol(asyncio.Protocol):
    """Cuts a connection's bytes into frames; the two ends fill in `frame` and `closed`."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None

    @property
    def is_open(self) -> bool:
        """Whether what is sent may still arrive."""
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._transport = None
        self.closed()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._received:
            self._received += data
            data = bytes(self._received)
            self._received.clear()
        at, view = 0, memoryview(data)
        while len(data) - at >= _HEADER.size:
            length, kind = _HEADER.unpack_from(data, at)
            end = at + _HEADER.size + length
            if end > len(data):
                break
            self.frame(Kind(kind), view[at + _HEADER.size : end])
            at = end
        if at < len(data):
            self._received += data[at:]

    def send(self, frame: bytes) -> None:
        """Sends, or drops it when the connection is gone, as SGLang's own sockets do."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def close(self) -> None:
        """Closes at once."""
        if self._transport is not None:
            self._transport.abort()

    def frame(self, kind: Kind, body: memoryview) -> None:
        """One frame has come."""
        raise NotImplementedError

    def closed(self) -> None:
        """The connection is gone."""


def _frame(kind: Kind, body: bytes) -> bytes:
    return _HEADER.pack(len(body), kind) + body
