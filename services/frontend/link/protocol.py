"""The only way the frontend reaches a worker's engine: submit a leg, abort it, receive its events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self, TypeAlias

from kvbaton.errors import RequestError
from kvbaton.v1 import generate_pb2, session_pb2
from services.frontend.link.load import LegShare
from services.requests import TokenLogprob

# How a leg's tokens come: on a stream of their own, or among those of other legs.
LegMessage: TypeAlias = generate_pb2.GenerateResponse | session_pb2.LegUpdate


@dataclass(frozen=True, slots=True)
class LegAccepted:
    """The worker has checked the leg and handed it to its engine."""


class LegTokens(NamedTuple):
    """New tokens of a leg that goes on; with log probabilities, one for each, where the request asks for them."""

    token_ids: list[int]
    logprobs: Sequence[TokenLogprob] = ()

    @classmethod
    def of(cls, wire: LegMessage) -> Self:
        """What a worker says."""
        return cls(list(wire.token_ids), _logprobs(wire))


@dataclass(frozen=True, slots=True)
class LegFinished:
    """The good end of a leg, with its last tokens."""

    token_ids: list[int]
    finished: generate_pb2.Finished
    logprobs: Sequence[TokenLogprob] = ()

    @classmethod
    def of(cls, wire: LegMessage) -> Self:
        """What a worker says last."""
        return cls(list(wire.token_ids), wire.finished, _logprobs(wire))


@dataclass(frozen=True, slots=True)
class LegFailed:
    """The bad end of a leg."""

    error: RequestError


def _logprobs(wire: LegMessage) -> tuple[TokenLogprob, ...]:
    return tuple(map(TokenLogprob.from_proto, wire.logprobs)) if wire.logprobs else ()


GoodEvent = LegAccepted | LegTokens | LegFinished
LegEvent = GoodEvent | LegFailed
LegSink = Callable[[LegEvent], None]


class Leg(Protocol):
    """One submitted leg. Its sink gets one LegAccepted, any number of LegTokens, then
    exactly one LegFinished or LegFailed."""

    def abort(self) -> None:
        """Asks the worker to end it; the sink hears the end. Returns at once, idempotent, harmless after the end."""
        ...

    async def ended(self) -> None:
        """Returns once the worker has let go of the leg or is gone; without proof, after a release deadline."""
        ...


@dataclass(frozen=True, slots=True)
class Credit:
    """The worker's promise to take one leg. Spend it with `submit` or give it back. It ends with its `session`."""

    session: int


class WorkerLink(Protocol):
    """The connection to one incarnation of one worker.

    A decode (or aggregated) worker takes legs against credits: `ask` for them, `take` what has come.
    """

    @property
    def healthy(self) -> bool:
        """Whether the worker has shown lately that it is there; new legs go to healthy workers only."""
        ...

    @property
    def window(self) -> int:
        """Legs that the worker runs at once."""
        ...

    @property
    def free_slots(self) -> int:
        """How many more it would take, when it last said so."""
        ...

    def ask(self, count: int) -> None:
        """Asks for so many credits beside those that have come. The latest call counts."""
        ...

    def take(self) -> Credit | None:
        """A credit that has come, if there is one."""
        ...

    def give_back(self, credit: Credit) -> None:
        """It isn't needed."""
        ...

    def submit(
        self,
        request: generate_pb2.GenerateRequest,
        sink: LegSink,
        credit: Credit | None,
        trace_headers: Mapping[str, str],
        share: LegShare | None = None,
    ) -> Leg:
        """Sends one leg. `request.request_id` is 32 hex digits and fresh. Never raises: failures reach the sink.

        `credit` is spent by it; None for prefill legs. `trace_headers` are W3C's, empty without a trace. `share` is
        told how the leg gets on.
        """
        ...

    async def close(self) -> None:
        """Ends every leg that is left, and the connection."""
        ...
