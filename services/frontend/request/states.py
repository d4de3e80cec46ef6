"""The states of a request, and every step between them that is allowed; any other is a bug and raises."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where a request is. The last three are ends."""

    ADMITTED = "admitted"
    """Waits for workers; after a failed attempt for others, which a client that has tokens already doesn't notice."""
    PAIRED = "paired"
    BOOTSTRAPPING = "bootstrapping"
    """The legs are on their way; not all workers have accepted theirs."""
    PREFILLING = "prefilling"
    """Every worker has its leg: hand-shake, prefill's queue and computation."""
    TRANSFERRING = "transferring"
    """Prefill has given its token; decode has not given its first yet."""
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Step(StrEnum):
    """What moves a request on."""

    PAIR_CHOSEN = "pair chosen"
    DISPATCHED = "dispatched"
    LEGS_ACCEPTED = "legs accepted"
    PREFILL_ENDED = "prefill ended"
    FIRST_TOKEN = "first token"
    COMPLETE = "complete"
    RETRY = "retry"
    MIGRATE = "migrate"
    ERROR = "error"
    CANCEL = "cancel"


ENDS = frozenset({State.FINISHED, State.FAILED, State.CANCELLED})
_BEFORE_FIRST_TOKEN = (State.PAIRED, State.BOOTSTRAPPING, State.PREFILLING, State.TRANSFERRING)

TRANSITIONS: dict[tuple[State, Step], State] = {
    (State.ADMITTED, Step.PAIR_CHOSEN): State.PAIRED,
    (State.PAIRED, Step.DISPATCHED): State.BOOTSTRAPPING,
    (State.BOOTSTRAPPING, Step.LEGS_ACCEPTED): State.PREFILLING,
    (State.PREFILLING, Step.PREFILL_ENDED): State.TRANSFERRING,
    (State.TRANSFERRING, Step.FIRST_TOKEN): State.DECODING,
    # Decode's first token may overtake prefill's end: they come over different connections.
    (State.PREFILLING, Step.FIRST_TOKEN): State.DECODING,
    (State.DECODING, Step.PREFILL_ENDED): State.DECODING,
    (State.DECODING, Step.COMPLETE): State.FINISHED,
    # The attempt has given the client nothing, so another pair can start where it started.
    **{(state, Step.RETRY): State.ADMITTED for state in _BEFORE_FIRST_TOKEN},
    # Another pair goes on behind what the client has.
    (State.DECODING, Step.MIGRATE): State.ADMITTED,
    **{(state, Step.ERROR): State.FAILED for state in State if state not in ENDS},
    **{(state, Step.CANCEL): State.CANCELLED for state in State if state not in ENDS},
}


class IllegalTransitionError(Exception):
    """A step that the table doesn't have."""


class RequestState:
    """The state of one request."""

    def __init__(self) -> None:
        self.now = State.ADMITTED
        self.ended_in: State | None = None
        """Where it was when it ended."""

    @property
    def ended(self) -> bool:
        """Whether nothing can happen to it any more."""
        return self.now in ENDS

    def take(self, step: Step) -> State:
        """Goes on; returns the new state. Raises IllegalTransitionError."""
        if (self.now, step) not in TRANSITIONS:
            raise IllegalTransitionError(f"{step!s} is no step from {self.now!s}")
        before, self.now = self.now, TRANSITIONS[self.now, step]
        if self.ended:
            self.ended_in = before
        return self.now
