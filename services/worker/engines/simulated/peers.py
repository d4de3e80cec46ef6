"""Decode's side of transfers: the prefills it knows, by address, and what they write into its pages.

As in SGLang a prefill's table and connections are kept until its heartbeat has failed: one that was replaced at the
same address meanwhile is taken for the old one. What is sent to a lost connection is lost without a word.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Protocol

from services.worker.engines.simulated import wire
from services.worker.engines.simulated.bootstrap import PrefillTable, fetch_table, is_healthy
from services.worker.engines.simulated.options import SimulatedOptions
from services.worker.engines.simulated.pages import PageArray

Address = tuple[str, int]


class TransferEvents(Protocol):
    """What a decode rank hears of its transfers; it looks at them when its scheduler does."""

    array: PageArray

    def room_done(self, room: int) -> None:
        """Every page of the room is written."""
        ...

    def abort_confirmed(self, room: int, generation: int) -> None:
        """Prefill will write nothing for the room any more."""
        ...

    def link_closed(self, link: DataLink) -> None:
        """Nothing comes over this connection any more."""
        ...

    def peer_lost(self, peer: Peer) -> None:
        """Its heartbeat has failed."""
        ...


class DataLink(wire.FrameProtocol):
    """From one decode rank to one prefill rank. What comes lands in the page array whatever the scheduler does."""

    def __init__(self, incarnation: bytes, rank: TransferEvents, broken: Callable[[], None]) -> None:
        super().__init__()
        self._incarnation = incarnation
        self._rank = rank
        self._broken = broken

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        super().connection_made(transport)
        self.send(wire.hello(self._incarnation))

    def frame(self, kind: wire.Kind, body: memoryview) -> None:
        """See `wire`."""
        if kind is wire.Kind.WRITE:
            array = self._rank.array
            pages, contents = wire.read_write(body)
            for index, page in enumerate(pages):
                array.write(page, contents[index * array.page_bytes : (index + 1) * array.page_bytes])
        elif kind is wire.Kind.DONE:
            self._rank.room_done(wire.read_done(body))
        elif kind is wire.Kind.ABORT_ACK:
            self._rank.abort_confirmed(*wire.read_abort(body))

    def closed(self) -> None:
        """See `wire`."""
        self._rank.link_closed(self)
        self._broken()


class Peer:
    """One prefill at one address, as decode remembers it."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.table: PrefillTable | None = None
        self.error = ""
        """Why there is no table and won't be."""
        self.missed = 0
        self.links: dict[tuple[int, int], DataLink] = {}
        """By decode rank and prefill rank."""

    def link(self, decode_rank: int, room: int) -> DataLink:
        """The connection for a room: SGLang's rule is that the room chooses prefill's rank."""
        assert self.table is not None
        return self.links[decode_rank, room % len(self.table.ranks)]


class PeerTable:
    """All peers of one decode engine. Belongs to the event loop."""

    def __init__(
        self, options: SimulatedOptions, incarnation: bytes, ranks: list[TransferEvents], wake: Callable[[], None]
    ) -> None:
        """`wake` is called whenever a peer's state has changed."""
        self._options = options
        self._incarnation = incarnation
        self._ranks = ranks
        self._wake = wake
        self._peers: dict[Address, Peer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._links: set[DataLink] = set()
        self._stale: dict[Address, list[DataLink]] = {}
        self._heartbeat: asyncio.Task[None] | None = None

    @property
    def known(self) -> Iterable[Peer]:
        """The peers whose table is kept."""
        return self._peers.values()

    def get(self, address: Address) -> Peer:
        """The peer at an address; a new one has neither table nor error yet."""
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peers[address] = Peer(address)
            self._start(self._connect(peer), f"bootstrap {address}")
            if self._heartbeat is None:
                self._heartbeat = self._start(self._beat(), "heartbeat")
        return peer

    def _forget(self, peer: Peer) -> None:
        """The next `get` asks anew. Its connections stay: its writes may still come."""
        if self._peers.get(peer.address) is peer:
            del self._peers[peer.address]
            self._stale.setdefault(peer.address, []).extend(link for link in peer.links.values() if link.is_open)

    def close(self) -> None:
        """Ends every connection and task."""
        for task in self._tasks:
            task.cancel()
        for link in self._links:
            link.close()
        self._peers.clear()

    async def _connect(self, peer: Peer) -> None:
        """Fetches the table and opens a connection from every rank to every rank."""
        options, problem = self._options, ""
        for attempt in range(options.fetch_retries):
            if attempt:
                await asyncio.sleep(options.fetch_interval)
            try:
                table = await fetch_table(peer.address, timeout=options.heartbeat_timeout)
                peer.links = {
                    (mine, theirs): await self._open(rank, address, peer)
                    for mine, rank in enumerate(self._ranks)
                    for theirs, address in enumerate(table.ranks)
                }
            except (OSError, TimeoutError, ValueError) as error:
                problem = str(error) or "no answer"
                continue
            if table.page_size == options.page_size:
                peer.table = table
                self._close_stale(peer)
                self._wake()
            else:
                self._give_up(peer, f"page size mismatch: prefill={table.page_size}, decode={options.page_size}")
            return
        host, port = peer.address
        asked = f"{host}:{port} after {options.fetch_retries} attempts ({problem})"
        self._give_up(peer, f"Could not fetch prefill parallel info from {asked}")

    def _give_up(self, peer: Peer, error: str) -> None:
        peer.error = error
        self._forget(peer)
        self._wake()

    async def _open(self, rank: TransferEvents, address: Address, peer: Peer) -> DataLink:
        host, port = address
        async with asyncio.timeout(self._options.heartbeat_timeout):
            _, link = await asyncio.get_running_loop().create_connection(
                lambda: DataLink(self._incarnation, rank, lambda: self._link_broken(peer)), host.strip("[]"), port
            )
        self._links = {each for each in self._links if each.is_open} | {link}
        return link

    def _link_broken(self, peer: Peer) -> None:
        if self._options.reconnect:
            self._forget(peer)

    def _close_stale(self, peer: Peer) -> None:
        """Nothing can be written over a connection that is closed."""
        for link in self._stale.pop(peer.address, ()) if self._options.reconnect else ():
            link.close()

    async def _beat(self) -> None:
        options = self._options
        while True:
            await asyncio.sleep(options.heartbeat_interval)
            peers = [peer for peer in self._peers.values() if peer.table is not None]
            answers = await asyncio.gather(
                *(is_healthy(peer.address, timeout=options.heartbeat_timeout) for peer in peers)
            )
            for peer, healthy in zip(peers, answers, strict=True):
                peer.missed = 0 if healthy else peer.missed + 1
                if peer.missed >= options.heartbeat_failures:
                    self._forget(peer)
                    for rank in self._ranks:
                        rank.peer_lost(peer)

    def _start(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=f"simulated {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
