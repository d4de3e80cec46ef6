"""The frontend's side of one session's credits: what was asked for, granted, taken and given back."""

from __future__ import annotations

from kvbaton.v1 import session_pb2
from services.frontend.link.protocol import Credit


class SessionCredits:
    """Counts since the beginning of one session; an earlier session's credits are void.

    `session` numbers the sessions of a link.
    """

    def __init__(self, session: int) -> None:
        self.session = session
        self.window = 0
        self.free_slots = 0
        self._up_to = 0
        self._granted = 0
        self._taken = 0
        self._returned = 0
        self._told = (0, 0)

    def heard(self, response: session_pb2.ConnectResponse) -> bool:
        """Takes the worker's word; True when credits have come, or the free slots are others."""
        # Fewer free slots are news too: who asked here because there were some must ask elsewhere.
        news = response.credits_granted > self._granted or response.free_slots != self.free_slots
        self._granted = response.credits_granted
        self.window, self.free_slots = response.window, response.free_slots
        return news

    def ask(self, count: int) -> None:
        """See `WorkerLink`. A grant that is on its way counts against `count`: the worker adds them up as we do."""
        self._up_to = self._granted + count

    def take(self) -> Credit | None:
        """See `WorkerLink`."""
        if self._taken == self._granted:
            return None
        self._taken += 1
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
