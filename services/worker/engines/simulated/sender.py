"""Prefill's side of transfers: who asked for which room, and writing pages into decode's memory as time goes by.

A transfer that has begun is written to its end, whatever becomes of its request: a write that the network has can't be
taken back. That is why an abort is confirmed only when nothing of its room is under way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from services.worker.engines.simulated import wire
from services.worker.engines.simulated.faults import Faults
from services.worker.engines.simulated.options import SimulatedOptions


class RegistrationEvents(Protocol):
    """What a prefill rank hears from decode; it looks at them when its scheduler does."""

    def registered(self, link: PrefillLink, room: int, pages: list[int]) -> None:
        """Decode has pages for the room."""
        ...

    def abandoned(self, link: PrefillLink, room: int, generation: int) -> None:
        """Decode no longer wants the room."""
        ...

    def link_opened(self, link: PrefillLink) -> None:
        """A decode rank has connected."""
        ...

    def link_closed(self, link: PrefillLink) -> None:
        """It is gone."""
        ...


class PrefillLink(wire.FrameProtocol):
    """From one prefill rank to one decode rank."""

    def __init__(self, rank: RegistrationEvents) -> None:
        super().__init__()
        self.decode_incarnation = b""
        self._rank = rank

    def frame(self, kind: wire.Kind, body: memoryview) -> None:
        """See `wire`."""
        if kind is wire.Kind.HELLO:
            self.decode_incarnation = bytes(body)
            self._rank.link_opened(self)
        elif kind is wire.Kind.REGISTER:
            self._rank.registered(self, *wire.read_register(body))
        elif kind is wire.Kind.ABORT:
            self._rank.abandoned(self, *wire.read_abort(body))

    def closed(self) -> None:
        """See `wire`."""
        self._rank.link_closed(self)


@dataclass(slots=True, eq=False)
class Transfer:
    """Some of a room's pages on their way. `last` announces the room's end behind them."""

    link: PrefillLink
    room: int
    pages: list[int]
    contents: bytes
    last: bool
    started: float
    written: int = 0


class Sender:
    """All transfers of one prefill rank."""

    def __init__(
        self,
        options: SimulatedOptions,
        faults: Faults,
        page_bytes: int,
        *,
        stalls: Callable[[Transfer], bool],
        complete: Callable[[Transfer], None],
    ) -> None:
        """Of a transfer that `stalls` half is written. `complete` is called when the last of a room's is written."""
        self._options = options
        self._faults = faults
        self._page_bytes = page_bytes
        self._stalls = stalls
        self._complete = complete
        self._transfers: list[Transfer] = []
        self._under_way: Counter[int] = Counter()
        self._confirmations: dict[int, list[tuple[PrefillLink, int]]] = {}

    def __len__(self) -> int:
        return len(self._transfers)

    def start(self, transfer: Transfer) -> None:
        """Begins a transfer."""
        self._transfers.append(transfer)
        self._under_way[transfer.room] += 1

    def confirm_when_drained(self, link: PrefillLink, room: int, generation: int) -> None:
        """Confirms an abort, at once or when everything of the room that has begun is written."""
        if self._under_way[room]:
            self._confirmations.setdefault(room, []).append((link, generation))
        else:
            link.send(wire.abort_ack(room, generation))

    def advance(self, now: float) -> None:
        """Writes what is due."""
        if not self._transfers:
            return
        written = {transfer for transfer in self._transfers if self._write(transfer, now)}
        if not written:
            return
        for transfer in sorted(written, key=lambda each: each.last):
            if transfer.last and self._under_way[transfer.room] > 1:
                written.discard(transfer)  # an earlier, larger part of the room is still on its way
                continue
            self._drained(transfer.room)
            if transfer.last:
                self._complete(transfer)
        self._transfers = [transfer for transfer in self._transfers if transfer not in written]

    def next_due(self) -> float | None:
        """When something can be written again; None when nothing is left, or all that is left is stalled."""
        return min((self._page_due(each) for each in self._transfers if self._moves(each)), default=None)

    def _moves(self, transfer: Transfer) -> bool:
        return transfer.written < len(transfer.pages) // 2 or not self._stalls(transfer)

    def _page_due(self, transfer: Transfer) -> float:
        options = self._options
        written = transfer.written + 1 if options.transfer_byte else len(transfer.pages)
        seconds = options.transfer_base + written * self._page_bytes * options.transfer_byte
        return transfer.started + seconds * self._faults.slow

    def _write(self, transfer: Transfer, now: float) -> bool:
        """Whether the transfer is complete."""
        due = self._due_pages(transfer, now)
        if due > transfer.written:
            size = self._page_bytes
            content = transfer.contents[transfer.written * size : due * size]
            transfer.link.send(wire.write(transfer.pages[transfer.written : due], content))
            transfer.written = due
        return due == len(transfer.pages)

    def _due_pages(self, transfer: Transfer, now: float) -> int:
        options, total = self._options, len(transfer.pages)
        elapsed = (now - transfer.started) / max(self._faults.slow, 1e-9) - options.transfer_base
        if elapsed < 0:
            due = 0
        elif not options.transfer_byte:
            due = total
        else:
            due = min(total, int(elapsed / (self._page_bytes * options.transfer_byte) + 1e-6))
        if self._stalls(transfer):
            due = min(due, total // 2)
        return max(due, transfer.written)

    def _drained(self, room: int) -> None:
        self._under_way[room] -= 1
        if not self._under_way[room]:
            del self._under_way[room]
            for link, generation in self._confirmations.pop(room, ()):
                link.send(wire.abort_ack(room, generation))
