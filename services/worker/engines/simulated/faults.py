"""What a simulated engine does wrong, now and next; changed on command while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


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
    abort_chunk: EndFault = field(default_factory=EndFault)
    """Ends with an abort of the engine's own."""
    early_length: EndFault = field(default_factory=EndFault)
    """Ends with "length" before its length."""

    def reset(self) -> None:
        """Nothing is wrong any more. In place: the ranks hold this very object."""
        fresh = Faults()
        for each in fields(self):
            setattr(self, each.name, getattr(fresh, each.name))
