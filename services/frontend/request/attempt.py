"""One attempt at a request: the same request sent to one pair, its two legs, and how they are ended."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Callable

import grpc
import structlog
from opentelemetry.trace import Span

from kvbaton import token_ids
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import generate_pb2
from services.frontend.link.protocol import Leg, LegEvent, LegFailed, LegFinished, LegTokens
from services.frontend.request.blame import Blame, Verdict
from services.frontend.request.prepare import PreparedRequest
from services.frontend.router.placement import Placement
from services.frontend.router.worker import Worker
from services.requests import ROOM_LIMIT, Role, Room
from services.telemetry import tracing

log = structlog.get_logger()

# Seconds that a complete answer waits for prefill's own token and end.
PREFILL_END_TIMEOUT = 5.0


class Attempt:
    """Sends both legs when told. `sink` gets the events of both, tagged with the attempt and the role.

    Room, request ids, pair and `span` belong to this attempt alone; a retry is another attempt. It ends the span.
    """

    def __init__(
        self,
        prepared: PreparedRequest,
        placement: Placement,
        sink: Callable[[Attempt, Role, LegEvent], None],
        span: Span,
        *,
        proof: bool = False,
    ) -> None:
        """A `proof` of the pair is a page long: its answer says of decode only that a KV cache came over."""
        self.placement = placement
        self.room = _fresh_room(placement)
        self._blame = Blame(placement)
        self.hand_over = HandOver(self._blame, expected=placement.prefill is not None)
        self._proof = proof
        self._prepared = prepared
        self._sink = sink
        self._span = span
        self._legs: dict[Role, Leg] = {}
        self._open: set[Role] = set()
        self._waiting_for: set[Role] = set()

    def dispatch(self) -> None:
        """The same request to both legs at once: decode reserves pages while prefill computes."""
        for worker in reversed(self.placement.workers):
            worker.request_began()
            self._open.add(worker.role)
            self._waiting_for.add(worker.role)
        self._describe()
        self._blame.sent()
        trace_headers = tracing.headers_of(self._span)
        for worker in reversed(self.placement.workers):
            credit = self.placement.credit if worker is self.placement.decode else None
            request, sink = self._request(worker), self._leg_sink(worker.role)
            share = self.placement.share_of(worker)
            self._legs[worker.role] = worker.link.submit(request, sink, credit, trace_headers, share)

    @property
    def accepted(self) -> bool:
        """Whether every worker has its leg."""
        return not self._waiting_for

    @property
    def room_number(self) -> int:
        """0 for an aggregated worker."""
        return 0 if self.room is None else self.room.room

    def verdict(self, error: RequestError) -> Verdict:
        """By whom the attempt has failed."""
        return self._blame.verdict(error)

    async def close(
        self, *, answered: bool, error: RequestError | None = None, fault: RequestError | None = None
    ) -> None:
        """Ends what still runs, prefill first. `error` is why, for the trace; `fault` is the attempt's own failure.

        NIXL writes are one-sided: while the prefill leg lives it may write into decode's pages, so decode must not let
        go of them (and give them to another request) before prefill has ended or can't be reached any more. After a
        complete answer (`answered`) prefill gets the moment that it needs to end by itself.
        """
        self._blame.ended(answered=answered and not self._proof, error=fault)
        try:
            await self._end_legs(answered=answered)
        finally:
            # They hold this attempt by their sinks: without the circle a request's memory is free when it ends.
            self._legs.clear()
            for worker in self.placement.workers:
                worker.request_ended()
            tracing.set_outcome(self._span, error)
            self._span.end()

    async def _end_legs(self, *, answered: bool) -> None:
        prefill = self._legs.get(Role.PREFILL)
        if prefill is not None:
            if answered and Role.PREFILL in self._open:
                await self._await_end(prefill)
            # Also one that has failed for us: it may still run there.
            prefill.abort()
            await prefill.ended()
        for leg in self._legs.values():
            leg.abort()
            await leg.ended()

    def _describe(self) -> None:
        if not self._span.is_recording():
            return
        # Hexadecimal, as SGLang writes it: an attribute's numbers are signed, and rooms are longer than a double.
        self._span.set_attribute("kvbaton.room", f"{self.room_number:#x}")
        for worker in self.placement.workers:
            self._span.set_attribute(f"kvbaton.{worker.role}.worker", worker.instance_id)

    async def _await_end(self, prefill: Leg) -> None:
        try:
            async with asyncio.timeout(PREFILL_END_TIMEOUT):
                await prefill.ended()
        except TimeoutError:
            log.warning("prefill leg outlives its request", request_id=self._prepared.request_id)

    def _leg_sink(self, role: Role) -> Callable[[LegEvent], None]:
        def sink(event: LegEvent) -> None:
            self._waiting_for.discard(role)
            if isinstance(event, LegFinished | LegFailed):
                self._open.discard(role)
            self._sink(self, role, event)

        return sink

    def _request(self, worker: Worker) -> generate_pb2.GenerateRequest:
        request = generate_pb2.GenerateRequest(
            request_id=uuid.uuid4().hex,
            model=self._prepared.model,
            token_ids=token_ids.pack(self._prepared.token_ids),
            sampling=self._prepared.sampling.to_proto(),
            logprobs=self._prepared.logprobs,
            cache_salt=self._prepared.cache_salt,
        )
        if self.room is not None:
            request.bootstrap.CopyFrom(self.room.to_proto())
        if worker is self.placement.decode and len(worker.ranks) > 1 and self.placement.decode_rank is not None:
            request.dp_rank = self.placement.decode_rank
        return request


class HandOver:
    """Compares prefill's one token with decode's first, whichever comes first.

    They are the same token, sent two ways: over gRPC, and with the KV cache. If they differ, decode reads pages that
    are not this request's.
    """

    def __init__(self, blame: Blame, *, expected: bool) -> None:
        self._blame = blame
        self._expected = expected
        self._prefill: int | None = None
        self._decode: int | None = None

    def give_up(self) -> None:
        """There will be nothing to compare with."""
        self._expected = False

    @property
    def settled(self) -> bool:
        """Whether both tokens were compared, or there is no hand-over."""
        return not self._expected or (self._prefill is not None and self._decode is not None)

    def take(self, role: Role, event: LegTokens | LegFinished) -> None:
        """Raises RequestError when the tokens differ."""
        if not event.token_ids:
            return
        if role is Role.PREFILL and self._prefill is None:
            self._prefill = event.token_ids[0]
        elif role is not Role.PREFILL and self._decode is None:
            self._decode = event.token_ids[0]
            self._blame.handed_over()
        else:
            return
        if self._prefill is None or self._decode is None:
            return
        if self._prefill != self._decode:
            raise RequestError(
                grpc.StatusCode.DATA_LOSS,
                Reason.FIRST_TOKEN_MISMATCH,
                f"prefill generated token {self._prefill} first, decode {self._decode}:"
                " the KV cache is not this request's",
            )
        self._blame.proven()


def _fresh_room(placement: Placement) -> Room | None:
    """A room nobody has used: SGLang takes `room % dp_size` as the prefill rank, and 0 for "not landed"."""
    if placement.prefill is None:
        return None
    endpoint, ranks = placement.prefill.record.bootstrap, len(placement.prefill.ranks)
    rank = placement.prefill_rank if placement.prefill_rank is not None else secrets.randbelow(ranks)
    return Room(endpoint.host, endpoint.port, ranks * (1 + secrets.randbelow(ROOM_LIMIT // ranks - 2)) + rank)
