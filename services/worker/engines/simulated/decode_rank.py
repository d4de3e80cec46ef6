"""The decode role: hands its pages to prefill, waits until they are written, and reads its tokens from them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from services.worker.engines.simulated import wire
from services.worker.engines.simulated.faults import Phase
from services.worker.engines.simulated.pages import BlockTable, Mask
from services.worker.engines.simulated.peers import Address, DataLink, Peer
from services.worker.engines.simulated.rank import Forward, Rank
from services.worker.engines.simulated.request import Request


@dataclass(slots=True)
class Handover:
    """A request with a peer, and from its registration on with the connection that its pages come over."""

    request: Request
    peer: Peer
    link: DataLink | None = None


@dataclass(slots=True)
class HeldBack:
    """An ended request whose pages its prefill may still write into."""

    request: Request
    link: DataLink
    until: float


class DecodeRank(Rank):
    """See `Rank`; implements `TransferEvents`."""

    def __init__(
        self, *arguments: Any, incarnation: bytes, find_peer: Callable[[Address], Peer], clock: Callable[[], float]
    ) -> None:
        super().__init__(*arguments)
        self._incarnation = incarnation
        self._find_peer = find_peer
        self._clock = clock
        self._rooms: dict[int, Handover] = {}
        self._handshaking: dict[int, Handover] = {}
        self._waiting: deque[Request] = deque()
        self._transferring: dict[int, Handover] = {}
        self._running: dict[Request, None] = {}
        self._held_back: dict[tuple[int, int], HeldBack] = {}
        self._abort_generation = 0

    @property
    def held_back(self) -> int:
        """See `Rank`."""
        return len(self._held_back)

    def room_done(self, room: int) -> None:
        """See `TransferEvents`."""
        self._post(0.0, self._begin, room)

    def abort_confirmed(self, room: int, generation: int) -> None:
        """See `TransferEvents`."""
        self._post(0.0, self._release_held, room, generation)

    def link_closed(self, link: DataLink) -> None:
        """See `TransferEvents`."""
        if self.options.release_on_disconnect:
            self._post(0.0, self._release_of, link)

    def peer_lost(self, peer: Peer) -> None:
        """See `TransferEvents`."""
        self._post(0.0, self._fail_transfers_of, peer)

    def _enqueue(self, request: Request) -> None:
        if request.pretends:
            self._waiting.append(request)
            return
        room = request.room_id
        if room in self._rooms:
            self._fail("handshake", request, "Duplicate decode bootstrap room")
            return
        handover = Handover(request, self._find_peer(request.bootstrap_address))
        self._rooms[room] = self._handshaking[room] = handover

    def _admit(self, now: float) -> None:
        for room, handover in list(self._handshaking.items()):
            self._shake_hands(room, handover, now)
        self._end_waits(now)
        while self._waiting and self._allocate(self._waiting[0], now):
            pass

    def _shake_hands(self, room: int, handover: Handover, now: float) -> None:
        request, peer = handover.request, handover.peer
        waited = now - request.arrived
        if peer.error:
            self._fail("handshake", request, peer.error)
        elif peer.table is not None:
            del self._handshaking[room]
            self._waiting.append(request)
        elif waited >= self.options.bootstrap_timeout:
            self._fail("handshake", request, f"Request {room} timed out after {waited:.1f}s in KVPoll.Bootstrapping")

    def _end_waits(self, now: float) -> None:
        """Transfers that take too long, and pages held back for long enough; both stand in the order of their ends."""
        while self._transferring:
            room, handover = next(iter(self._transferring.items()))
            waited = now - handover.request.registered_at
            if waited < self.options.waiting_timeout:
                break
            reason = f"Request {room} timed out after {waited:.1f}s in KVPoll.WaitingForInput"
            self._fail("transfer", handover.request, reason)
        while self._held_back:
            (room, generation), held = next(iter(self._held_back.items()))
            if now < held.until:
                break
            self._release_held(room, generation)

    def _allocate(self, request: Request, now: float) -> bool:
        """Slot and pages for the first request of the queue; False when it has to wait."""
        options = self.options
        handover = None if request.pretends else self._rooms[request.room_id]
        if handover is not None and self._find_peer(request.bootstrap_address) is not handover.peer:
            self._fail("handshake", request, self._down(request))
            return True
        if self.holding >= options.max_running_requests:
            return False
        pages = self.allocator.allocate(-(-(len(request.prompt) + request.max_new_tokens) // options.page_size))
        if pages is None:
            return False
        self._waiting.popleft()
        self._hold(request, pages)
        if handover is None:
            self._run(request)
            return True
        room = request.room_id
        link = handover.link = handover.peer.link(self.index, room)
        request.registered_at = now
        self._transferring[room] = handover
        prompt_pages = pages[: -(-len(request.prompt) // options.page_size)]
        if self.faults.bootstrap_delay:
            self._post(self.faults.bootstrap_delay, self._register_late, handover, prompt_pages)
        else:
            link.send(wire.register(room, prompt_pages))
        return True

    def _register_late(self, handover: Handover, pages: list[int]) -> None:
        room = handover.request.room_id
        if self._transferring.get(room) is handover and handover.link is not None:
            handover.link.send(wire.register(room, pages))

    def _begin(self, room: int) -> None:
        """Its pages are written; the first token is there without a step. Room 0 never lands, as in SGLang."""
        if not room or (handover := self._transferring.pop(room, None)) is None:
            return
        assert handover.peer.table is not None
        request = handover.request
        request.mask = Mask(room, handover.peer.table.incarnation, self._incarnation)
        self._run(request)

    def _run(self, request: Request) -> None:
        request.table = BlockTable(self.array, request.pages, len(request.prompt), request.mask)
        self._running[request] = None
        self._step([request])

    def _next_forward(self, start: float) -> Forward | None:
        running = [request for request in self._running if not self._is_told_to_wait(request)]
        if not running:
            return None
        return Forward(start + self.options.decode_step * self.faults.slow, running)

    def _is_told_to_wait(self, request: Request) -> bool:
        after = self.faults.hold.after_tokens
        return request.produced >= after and self._stands_still(Phase.DECODING, request)

    def _complete(self, forward: Forward, now: float) -> None:
        self._step(forward.requests)

    def _dues(self, now: float) -> Iterable[float | None]:
        options = self.options
        for handover in self._handshaking.values():
            yield handover.request.arrived + options.bootstrap_timeout
        for handover in self._transferring.values():
            yield handover.request.registered_at + options.waiting_timeout
            break
        for held in self._held_back.values():
            yield held.until
            break

    def _abort(self, request: Request) -> None:
        if request.room is not None and request.room_id in self._transferring:
            self._fail("transfer", request, "Aborted by AbortReq.")
        else:
            super()._abort(request)

    def _drop(self, request: Request, reason: str) -> None:
        self._running.pop(request, None)
        if not request.pages and request in self._waiting:
            self._waiting.remove(request)
        if request.room is None or request.pretends:
            self._let_go(request)
            return
        room = request.room_id
        handover = self._rooms.get(room)
        if handover is None or handover.request is not request:
            self._let_go(request)
            return
        del self._rooms[room]
        self._handshaking.pop(room, None)
        if self._transferring.pop(room, None) is None or handover.link is None:
            self._let_go(request)
        else:
            self._stop_transfer(request, handover.link)

    def _stop_transfer(self, request: Request, link: DataLink) -> None:
        """Tells prefill; what it may still write keeps the pages from being reused until it says that it won't."""
        options = self.options
        self._abort_generation += 1
        link.send(wire.abort(request.room_id, self._abort_generation))
        if not options.deferred_release or (options.release_on_disconnect and not link.is_open):
            self._let_go(request)
            return
        held = HeldBack(request, link, self._clock() + options.release_timeout)
        self._held_back[request.room_id, self._abort_generation] = held

    def _release_held(self, room: int, generation: int) -> None:
        if (held := self._held_back.pop((room, generation), None)) is not None:
            self._let_go(held.request)

    def _release_of(self, link: DataLink) -> None:
        for room, generation in [key for key, held in self._held_back.items() if held.link is link]:
            self._release_held(room, generation)

    def _fail_transfers_of(self, peer: Peer) -> None:
        host, port = peer.address
        reason = f"Lost connection with prefill instance (bootstrap_addr: {host}:{port})"
        for handover in list(self._transferring.values()):
            if handover.peer is peer:
                self._fail("transfer", handover.request, reason)

    def _down(self, request: Request) -> str:
        host, port = request.bootstrap_address
        return (
            f"Prefill server with bootstrap_addr: {host}:{port} is healthy before, but now it is down."
            f" Request (bootstrap_room: {request.room_id}) has been marked as failed."
        )

    def _fail(self, what: str, request: Request, reason: str) -> None:
        room = request.room_id
        self.fail(
            request,
            f"Decode {what} failed for request rank=0 decode_req.req.rid={request.engine_id!r}"
            f" decode_req.req.bootstrap_room={room} with exception KVTransferError(bootstrap_room={room}): {reason}",
        )
