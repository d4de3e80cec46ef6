"""What is promised of a request for each phase that it is in and each fault that comes then.

One table for `tests/chaos/test_matrix.py`, which asserts it, and for `scripts/gen_faults_docs.py`, which writes
docs/faults.md from it and from what the test has measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kvbaton.errors import Reason


class Phase(StrEnum):
    """Where the request is when the fault comes."""

    QUEUED = "queued"
    BOOTSTRAPPING = "bootstrapping"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"


MEANINGS = {
    Phase.QUEUED: "every decode slot is taken; it waits for a credit in the frontend",
    Phase.BOOTSTRAPPING: "both workers have their leg, decode has given it pages, prefill has not begun",
    Phase.PREFILLING: "prefill computes",
    Phase.TRANSFERRING: "half of its KV pages are written into decode's memory",
    Phase.DECODING: "the client has its first tokens",
}


class Fault(StrEnum):
    """What happens to a process or a connection of the request."""

    PREFILL_KILLED = "prefill killed"
    PREFILL_FROZEN = "prefill frozen"
    DECODE_KILLED = "decode killed"
    DECODE_FROZEN = "decode frozen"
    FRONTEND_KILLED = "frontend killed"
    SESSION_BLACK_HOLED = "link frontend-decode black-holed"
    SESSION_RESET = "link frontend-decode reset"
    KV_BLACK_HOLED = "link prefill-decode black-holed"
    KV_RESET = "link prefill-decode reset"
    ETCD_KILLED = "etcd killed"
    ETCD_FROZEN = "etcd frozen"
    CLIENT_GONE = "client gone"
    DEADLINE = "deadline"


class Slot(StrEnum):
    """From when on the time counts until the surviving leg has let go of slot and pages."""

    NONE = ""
    FAULT = "after the fault"
    REPAIR = "after the thaw or repair"
    """Until then the other side may still write into the pages, or can't be reached."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What becomes of the request."""

    outcome: str
    succeeds: bool = False
    attempts: int | None = None
    reason: Reason | None = None
    slot: Slot = Slot.NONE
    survivors: tuple[str, ...] = ()
    """Roles whose legs must let go."""
    quick: bool = True
    """Whether whoever is to notice does so within the time that is promised for kills."""
    meaningless: bool = False

    def asks_slots_of(self, *survivors: str, slot: Slot = Slot.FAULT) -> Promise:
        """The same, and legs that let go."""
        return Promise(self.outcome, self.succeeds, self.attempts, self.reason, slot, survivors, self.quick)


UNTOUCHED = Promise("succeeds, undisturbed", succeeds=True, attempts=1)
RETRIED = Promise("succeeds on other workers", succeeds=True, attempts=2)
MIGRATED = Promise("succeeds, goes on elsewhere behind its last token", succeeds=True, attempts=2)
CANCELLED = Promise("is ended for the client that has left", reason=Reason.CANCELLED)
CONNECTION_LOST = Promise("UNAVAILABLE from the client's own gRPC", reason=Reason.UNTYPED)
NO_PAIR_YET = Promise("does not apply: no pair is chosen yet", meaningless=True)

_BEFORE_FIRST_TOKEN = (Phase.BOOTSTRAPPING, Phase.PREFILLING, Phase.TRANSFERRING)
_BOTH = ("prefill", "decode")


def _deadline(reason: Reason) -> Promise:
    return Promise(f"DEADLINE_EXCEEDED {reason}", reason=reason)


def _queued() -> dict[Fault, Promise]:
    return dict.fromkeys(Fault, UNTOUCHED) | {
        Fault.FRONTEND_KILLED: CONNECTION_LOST,
        Fault.KV_BLACK_HOLED: NO_PAIR_YET,
        Fault.KV_RESET: NO_PAIR_YET,
        Fault.CLIENT_GONE: CANCELLED,
        Fault.DEADLINE: _deadline(Reason.DEADLINE_QUEUE),
    }


def _before_the_first_token() -> dict[Fault, Promise]:
    return {
        Fault.PREFILL_KILLED: RETRIED.asks_slots_of("decode"),
        Fault.PREFILL_FROZEN: RETRIED.asks_slots_of("decode", slot=Slot.REPAIR),
        Fault.DECODE_KILLED: RETRIED.asks_slots_of("prefill"),
        Fault.DECODE_FROZEN: RETRIED.asks_slots_of("prefill"),
        Fault.FRONTEND_KILLED: CONNECTION_LOST.asks_slots_of(*_BOTH),
        Fault.SESSION_BLACK_HOLED: RETRIED.asks_slots_of("prefill"),
        Fault.SESSION_RESET: RETRIED.asks_slots_of(*_BOTH),
        Fault.KV_BLACK_HOLED: RETRIED.asks_slots_of("decode", slot=Slot.REPAIR),
        Fault.KV_RESET: RETRIED.asks_slots_of(*_BOTH),
        Fault.ETCD_KILLED: UNTOUCHED,
        Fault.ETCD_FROZEN: UNTOUCHED,
        Fault.CLIENT_GONE: CANCELLED.asks_slots_of(*_BOTH),
        Fault.DEADLINE: _deadline(Reason.DEADLINE_PREFILL).asks_slots_of(*_BOTH),
    }


def _decoding() -> dict[Fault, Promise]:
    return dict.fromkeys(Fault, UNTOUCHED) | {
        Fault.DECODE_KILLED: MIGRATED,
        Fault.DECODE_FROZEN: MIGRATED,
        Fault.FRONTEND_KILLED: CONNECTION_LOST.asks_slots_of("decode"),
        Fault.SESSION_BLACK_HOLED: MIGRATED.asks_slots_of("decode", slot=Slot.REPAIR),
        Fault.SESSION_RESET: MIGRATED.asks_slots_of("decode"),
        Fault.CLIENT_GONE: CANCELLED.asks_slots_of("decode"),
        Fault.DEADLINE: _deadline(Reason.DEADLINE_TOKEN_GAP).asks_slots_of("decode"),
    }


PROMISES: dict[tuple[Phase, Fault], Promise] = {
    **{(Phase.QUEUED, fault): promise for fault, promise in _queued().items()},
    **{
        (phase, fault): promise for phase in _BEFORE_FIRST_TOKEN for fault, promise in _before_the_first_token().items()
    },
    **{(Phase.DECODING, fault): promise for fault, promise in _decoding().items()},
}
"""Every cell of the matrix."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run of a cell has shown; seconds."""

    phase: str
    fault: str
    noticed: float | None
    """From the fault until the frontend's first word of it, or the client's error; never negative."""
    ended: float | None
    """From the fault until the client had its answer or error; None where the test decides it by letting go."""
    slot_free: float | None
    """By the promise's `slot`: from the fault or the repair until the surviving legs' slots and pages were free."""
