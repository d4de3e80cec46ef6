"""What a simulated engine does wrong, now and next; changed on command while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import StrEnum


class Phase(StrEnum):
    """Where a request can be held; the last in the decode role, the others in the prefill role."""

    BOOTSTRAPPING = "bootstrapping"
    """Decode has given it pages; prefill has not begun."""
    PREFILLING = "prefilling"
    """It has prefill's slot and pages, and nothing is computed."""
    TRANSFERRING = "transferring"
    """Half of its pages are written."""
    DECODING = "decoding"
    """It has some of its tokens."""


@dataclass(slots=True)
class EndFault:
    """The next `count` requests that have `after_tokens` output tokens end as told; 0 ends any live one."""

    count: int = 0
    after_tokens: int = 0
    status: int = 500
    message: str = ""

    def hits(self, produced: int) -> bool:
        """Whether a request with that many tokens is one of them; then it counts."""
        if not self.count or produced < self.after_tokens:
            return False
        self.count -= 1
        return True


@dataclass(slots=True)
class Hold:
    """The next `count` requests whose prompt begins with `token` stand still in `phase` until that is taken back."""

    phase: Phase | None = None
    token: int = -1
    count: int = 0
    after_tokens: int = 1
    """Output tokens that a request has when it is held while decoding."""
    seen: int = 0
    """Requests that begin with `token` and came since the hold was set."""
    held: set[str] = field(default_factory=set[str])
    """Engine ids."""

    def takes(self, phase: Phase, engine_id: str, prompt: list[int]) -> bool:
        """Whether this request stands still in this phase; one that is asked about for the first time counts."""
        if phase is not self.phase:
            return False
        if engine_id not in self.held:
            if not self.count or prompt[0] != self.token:
                return False
            self.count -= 1
            self.held.add(engine_id)
        return True

    def release(self) -> None:
        """All go on, and nobody else is held. `token` stays, for whoever counts its requests."""
        self.phase = None
        self.held.clear()


@dataclass(slots=True)
class Faults:
    """Everything at once is possible. Times in seconds."""

    frozen: bool = False
    """The scheduler and its transfers stand still; the host, its sockets and the bootstrap server don't."""
    slow: float = 1.0
    """Steps, chunks and transfers take this many times as long."""
    stalled: bool = False
    """Prefill writes the first half of every transfer's pages and then nothing."""
    silent: bool = False
    """The bootstrap server answers nothing, and the load can't be read: no heartbeat either way."""
    bootstrap_delay: float = 0.0
    """Hand-shake messages are handled this late: the table and the page indices."""
    wrong_first_tokens: int = 0
    """So many requests get a first token that is wrong."""
    finish_after_abort: bool = False
    """An aborted request ends with "length", as if nothing had happened."""
    hold: Hold = field(default_factory=Hold)
    """One request at a time stands still, where it is told to, and the others don't."""
    abort_chunk: EndFault = field(default_factory=EndFault)
    """Ends with an abort of the engine's own."""
    early_length: EndFault = field(default_factory=EndFault)
    """Ends with "length" before its length."""

    def reset(self) -> None:
        """Nothing is wrong any more. In place: the ranks hold this very object."""
        fresh = Faults()
        for each in fields(self):
            setattr(self, each.name, getattr(fresh, each.name))
