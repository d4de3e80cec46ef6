"""The frontend's side of one session's credits: what was asked for, granted, taken and given back."""

from __future__ import annotations

from kvbaton.v1 import session_pb2
from services.frontend.link.protocol import Credit

# Spares are kept when more than this share of the window is free, and given back when less than that one is.
_PLENTY, _SCARCE = 1 / 2, 1 / 4
# Of a smaller window a credit that nobody uses is too much.
_SMALLEST_WINDOW = 4
# One of so many slots, and no more than that: of a burst only the first requests gain by it.
_SPARED_SLOTS, _MOST_SPARES = 16, 8


class SessionCredits:
    """Counts since the beginning of one session; an earlier session's credits are void.

    `session` numbers the sessions of a link.

    While the worker has plenty of free slots, spare credits are kept in hand: the next requests go out at once, not
    after asking and being answered, and one message asks for several. They are given back when slots become scarce, or
    when somebody waits for one, which the worker says by telling of no free slot; then it takes another request to ask
    for new ones. Else frontends without requests would ask and give back in step, for ever.
    """

    def __init__(self, session: int) -> None:
        self.session = session
        self.window = 0
        self._free = 0
        self._wanted = 0
        # Whether requests have come since spares were last given back.
        self._busy = False
        self._spare = 0
        self._up_to = 0
        self._granted = 0
        self._taken = 0
        self._returned = 0
        self._told = (0, 0)

    @property
    def free_slots(self) -> int:
        """How many more legs the worker would take of us: nobody else gets the slots of spare credits."""
        return self._free + self._unused

    def heard(self, response: session_pb2.ConnectResponse) -> bool:
        """Takes the worker's word; True when credits have come, or the window or the free slots are others."""
        # Fewer free slots are news too: who asked here because there were some must ask elsewhere.
        came, before = response.credits_granted > self._granted, (self.window, self.free_slots)
        self._granted = response.credits_granted
        self.window, self._free = response.window, response.free_slots
        if self._free < _SCARCE * self.window:
            self._busy, self._spare = False, 0
        self._ask()
        changed = (self.window, self.free_slots) != before
        return changed or (came and self._takeable > 0) or self._unused > self._wanted + self._spare

    def ask(self, count: int) -> None:
        """See `WorkerLink`. A grant that is on its way counts against `count`: the worker adds them up as we do."""
        self._wanted = count
        self._busy |= count > 0
        self._ask()

    def take(self) -> Credit | None:
        """See `WorkerLink`. Spare ones come only to who has asked."""
        if not self._takeable:
            return None
        self._taken += 1
        self._wanted = max(0, self._wanted - 1)
        self._ask()
        return Credit(self.session)

    def give_back(self, credit: Credit) -> None:
        """See `WorkerLink`."""
        if credit.session == self.session:
            self._returned += 1

    @property
    def has_news(self) -> bool:
        """Whether there is something that the worker has not been told."""
        return (self._up_to, self._returned) != self._told

    def news(self) -> session_pb2.AskCredits | None:
        """What the worker has not been told yet."""
        if not self.has_news:
            return None
        self._told = (self._up_to, self._returned)
        return session_pb2.AskCredits(up_to=self._up_to, returned=self._returned)

    @property
    def _unused(self) -> int:
        return self._granted - self._taken

    @property
    def _takeable(self) -> int:
        return self._unused if self._wanted else max(0, self._unused - self._spare)

    def _ask(self) -> None:
        """For spares only when half of them are used."""
        if self._busy and self.window >= _SMALLEST_WINDOW and self._free > _PLENTY * self.window:
            self._spare = min(_MOST_SPARES, max(1, self.window // _SPARED_SLOTS))
        left = self._unused - self._wanted
        most = self._granted + max(0, self._spare - left)
        self._up_to = most if 2 * left < self._spare or self._up_to > most else max(self._up_to, self._granted)
