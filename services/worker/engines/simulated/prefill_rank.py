"""The prefill role: waits for decode's pages, computes, writes, and answers with one token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from services.worker.engines.kv_events import KvEvent
from services.worker.engines.protocol import Finish
from services.worker.engines.simulated import wire
from services.worker.engines.simulated.faults import Phase
from services.worker.engines.simulated.pages import Mask
from services.worker.engines.simulated.prompt_rank import PromptRank
from services.worker.engines.simulated.rank import Forward
from services.worker.engines.simulated.request import Request
from services.worker.engines.simulated.sender import PrefillLink, Sender, Transfer


class PrefillRank(PromptRank):
    """See `Rank`; implements `RegistrationEvents`."""

    def __init__(self, *arguments: Any, tell: Callable[[KvEvent], None], incarnation: bytes) -> None:
        super().__init__(*arguments, tell=tell)
        self.links: set[PrefillLink] = set()
        self._incarnation = incarnation
        self._sender = Sender(
            self.options, self.faults, self.array.page_bytes, stalls=self._stalls, complete=self._transferred
        )
        self._rooms: dict[int, Request] = {}
        self._bootstrapping: dict[int, Request] = {}
        self._registrations: dict[int, tuple[PrefillLink, list[int]]] = {}
        self._told_to_wait: list[Request] = []

    def link_opened(self, link: PrefillLink) -> None:
        """See `RegistrationEvents`."""
        self.links.add(link)

    def link_closed(self, link: PrefillLink) -> None:
        """See `RegistrationEvents`."""
        self.links.discard(link)
        self._post(0.0, self._forget_link, link)

    def registered(self, link: PrefillLink, room: int, pages: list[int]) -> None:
        """See `RegistrationEvents`."""
        self._post(self.faults.bootstrap_delay, self._register, link, room, pages)

    def abandoned(self, link: PrefillLink, room: int, generation: int) -> None:
        """See `RegistrationEvents`."""
        self._post(0.0, self._abandon, link, room, generation)

    def progress(self, now: float) -> None:
        """See `Rank`."""
        self._sender.advance(now)

    def _enqueue(self, request: Request) -> None:
        if request.pretends:
            self._waiting.append(request)
            return
        room, ranks = request.room_id, self.options.dp_size
        if room % ranks != self.index:
            self._fail_bootstrap(
                request,
                f"follow_bootstrap_room conflict: dispatched to dp_rank {self.index} but bootstrap_room {room}"
                f" implies dp_rank {room % ranks}",
            )
        elif room in self._rooms:
            self._fail_bootstrap(request, "Duplicate or cancelled bootstrap room")
        else:
            self._rooms[room] = request
            self._bootstrapping[room] = request
            if room in self._registrations:
                self._bootstrapped(request)

    def _bootstrapped(self, request: Request) -> None:
        """Decode has pages for it."""
        if self._stands_still(Phase.BOOTSTRAPPING, request):
            self._told_to_wait.append(request)
        else:
            del self._bootstrapping[request.room_id]
            self._waiting.append(request)

    def _register(self, link: PrefillLink, room: int, pages: list[int]) -> None:
        if not link.is_open:
            return
        self._registrations[room] = (link, pages)
        if (request := self._bootstrapping.get(room)) is not None:
            self._bootstrapped(request)

    def _abandon(self, link: PrefillLink, room: int, generation: int) -> None:
        if (request := self._rooms.get(room)) is not None and room in self._registrations:
            self._fail_transfer(request, "Aborted by decode-side abort notification.")
        self._registrations.pop(room, None)
        self._sender.confirm_when_drained(link, room, generation)

    def _forget_link(self, link: PrefillLink) -> None:
        for room in [room for room, (owner, _) in self._registrations.items() if owner is link]:
            del self._registrations[room]
            if (request := self._rooms.get(room)) is not None:
                self._fail_transfer(request, "nixlRemoteDisconnectError: NIXL_ERR_REMOTE_DISCONNECT")

    def _admit(self, now: float) -> None:
        waiting, self._told_to_wait = self._told_to_wait, []
        for request in waiting:
            if self._bootstrapping.get(request.room_id) is request:
                self._bootstrapped(request)
        while self._bootstrapping:
            request = next(iter(self._bootstrapping.values()))
            waited = now - request.arrived
            if waited < self.options.bootstrap_timeout:
                break
            room = request.room_id
            self._fail_bootstrap(request, f"Request {room} timed out after {waited:.1f}s in KVPoll.Bootstrapping")

    def _dues(self, now: float) -> Iterable[float | None]:
        yield self._sender.next_due()
        for request in self._bootstrapping.values():
            yield request.arrived + self.options.bootstrap_timeout
            break

    def _next_forward(self, start: float) -> Forward | None:
        return self._next_chunk(start)

    def _complete(self, forward: Forward, now: float) -> None:
        self._complete_chunk(forward, now)

    def _output_room(self, request: Request) -> int:
        return 0

    def _chunk_computed(self, request: Request, now: float) -> None:
        """Sends every page that is full, and the last one when it is all that is left."""
        if request.pretends:
            if request.table is not None:
                self._answer(request)
            return
        room, size = request.room_id, self.options.page_size
        link, theirs = self._registrations[room]
        if request.mask is None:
            request.mask = Mask(room, self._incarnation, link.decode_incarnation)
        last = request.table is not None
        first, end = request.sent_pages, -(-request.computed // size) if last else request.computed // size
        if end > first:
            content = self.array.gather(request.pages[first:end])
            masked = request.mask.apply(content, first * self.array.page_bytes)
            self._sender.start(Transfer(link, room, theirs[first:end], masked, last, now))
            request.sent_pages = end

    def _stalls(self, transfer: Transfer) -> bool:
        request = self._rooms.get(transfer.room)
        return self.faults.stalled or (request is not None and self._stands_still(Phase.TRANSFERRING, request))

    def _transferred(self, transfer: Transfer) -> None:
        request = self._rooms.get(transfer.room)
        registration = self._registrations.get(transfer.room)
        if request is None or request.table is None or registration is None or registration[0] is not transfer.link:
            return
        transfer.link.send(wire.done(transfer.room))
        self._answer(request)

    def _answer(self, request: Request) -> None:
        assert request.table is not None
        context = request.table.context()
        request.table.close()
        request.table = None
        self._emit(request, context)

    def _finish(self, request: Request, token: int) -> Finish | None:
        return Finish.LENGTH  # whatever the token is, as SGLang

    def _drop(self, request: Request, reason: str) -> None:
        self._unqueue(request)
        if request.room is not None and self._rooms.get(request.room_id) is request:
            room = request.room_id
            del self._rooms[room]
            self._bootstrapping.pop(room, None)
            self._registrations.pop(room, None)
        self._let_go(request)

    def _fail_bootstrap(self, request: Request, reason: str) -> None:
        self._fail("bootstrap", request, reason)

    def _fail_transfer(self, request: Request, reason: str) -> None:
        self._fail("transfer", request, reason)

    def _fail(self, what: str, request: Request, reason: str) -> None:
        room = request.room_id
        self.fail(
            request,
            f"Prefill {what} failed for request rank=0 req.rid={request.engine_id!r} req.bootstrap_room={room}"
            f" with exception KVTransferError(bootstrap_room={room}): {reason}",
        )
