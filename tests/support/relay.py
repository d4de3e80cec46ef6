"""TCP between two processes, through the test: it can lose everything for a while, or reset every connection.

A server that binds 127.0.0.1:port and advertises 127.0.0.2 is reached through a relay that listens on 127.0.0.2:port,
so that neither side knows.
"""

from __future__ import annotations

import asyncio
import socket
import struct

RELAYED_HOST = "127.0.0.2"
_BEHIND = "127.0.0.1"
# Linger is on, for 0 s: closing resets.
_RESET = struct.pack("ii", 1, 0)


class Relay:
    """From RELAYED_HOST:port to 127.0.0.1:port. Belongs to the event loop that `listen` is called in."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        """Takes connections, until `refuse`."""
        if self._server is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(lambda: _Connection(self), RELAYED_HOST, self.port)

    def refuse(self) -> None:
        """Nobody listens any more, as behind a process that is gone."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def black_hole(self) -> None:
        """Nothing passes, neither bytes nor ends; senders can't tell it from a slow peer."""
        self.is_open.clear()
        for connection in self.connections:
            connection.pause()

    def heal(self) -> None:
        """What was on its way arrives, as TCP would send it again."""
        self.is_open.set()
        for connection in self.connections:
            connection.resume()

    def reset(self) -> None:
        """Every connection ends with RST on both sides; new ones are taken."""
        for connection in list(self.connections):
            connection.reset()

    def close(self) -> None:
        """Stops listening and resets what is left."""
        self.refuse()
        self.reset()


class _Connection(asyncio.Protocol):
    """The client's side of one connection; `_Upstream` is the server's."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._upstream: asyncio.Transport | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._client: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._client = transport
        transport.pause_reading()
        self._relay.connections.add(self)
        self._connecting = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        await self._relay.is_open.wait()
        try:
            self._upstream, _ = await loop.create_connection(lambda: _Upstream(self), _BEHIND, self._relay.port)
        except OSError:
            self.reset()
            return
        if self._client is None or self._client.is_closing():
            self._upstream.abort()
            return
        (self.resume if self._relay.is_open.is_set() else self.pause)()

    def data_received(self, data: bytes) -> None:
        if self._upstream is not None:
            self._upstream.write(data)

    def eof_received(self) -> bool:
        self._end()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def from_upstream(self, data: bytes) -> None:
        """Bytes for the client."""
        if self._client is not None:
            self._client.write(data)

    def upstream_ended(self) -> None:
        """The server's side is gone."""
        self._end()

    def pause(self) -> None:
        """Nothing passes."""
        for side in self._sides():
            side.pause_reading()

    def resume(self) -> None:
        """It goes on."""
        for side in self._sides():
            side.resume_reading()

    def reset(self) -> None:
        """Ends both sides with RST."""
        for side in self._sides():
            if (raw := side.get_extra_info("socket")) is not None:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            side.abort()
        self._gone()

    def _sides(self) -> list[asyncio.Transport]:
        return [side for side in (self._client, self._upstream) if side is not None and not side.is_closing()]

    def _end(self) -> None:
        for side in self._sides():
            side.close()
        self._gone()

    def _gone(self) -> None:
        self._relay.connections.discard(self)
        if self._connecting is not None and not self._connecting.done():
            self._connecting.cancel()


class _Upstream(asyncio.Protocol):
    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    def data_received(self, data: bytes) -> None:
        self._connection.from_upstream(data)

    def eof_received(self) -> bool:
        self._connection.upstream_ended()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.upstream_ended()
