"""The window of a decode or aggregated worker, shared among the sessions of any number of frontends.

A credit is the promise of a slot. The worker grants one only while it has a slot that nobody was promised, to sessions
that ask for one, in turn: no frontend spends a prefill on a request that decode can't take, and none starves another.
"""

from __future__ import annotations

from collections.abc import Callable

import grpc

from kvbaton.errors import Reason, RequestError, invalid
from services.telemetry import metrics
from services.worker.legs import LiveLegs


class CreditWindow:
    """Slots are taken by live legs (of streams too, which need no credit), legs on their way in, and unused credits.

    Belongs to the serving loop.
    """

    def __init__(self, legs: LiveLegs) -> None:
        self.size = 0
        # Legs that have spent their credit and are not live yet.
        self.entering = 0
        self._legs = legs
        self._accounts: list[CreditAccount] = []
        legs.on_end = self.grant

    @property
    def free(self) -> int:
        """Slots that nobody has or was promised."""
        unused = sum(account.unused for account in self._accounts)
        return max(0, self.size - len(self._legs) - self.entering - unused)

    def open(self, size: int) -> None:
        """The engine is there and runs `size` legs at once."""
        self.size = size
        self.grant()

    def account(self, changed: Callable[[], None]) -> CreditAccount:
        """For a new session; `changed` is called when it was granted something."""
        account = CreditAccount(self, changed)
        self._accounts.append(account)
        return account

    def forget(self, account: CreditAccount) -> None:
        """The session is over: what it has not used is free."""
        self._accounts.remove(account)
        self.grant()

    def grant(self) -> None:
        """Gives free slots to those who ask, one each in turn."""
        free = self.free
        while free and (asking := next((account for account in self._accounts if account.asks), None)) is not None:
            asking.grant_one()
            free -= 1
            # To the end of the line.
            self._accounts.remove(asking)
            self._accounts.append(asking)
        if not free and any(account.asks for account in self._accounts):
            for account in self._accounts:
                account.told_of_need()
        if free:
            for account in self._accounts:
                account.told_of_room()
        metrics.WORKER_FREE_SLOTS.set(free)


class CreditAccount:
    """One session's part of the window. Counts are since the session's beginning."""

    def __init__(self, window: CreditWindow, changed: Callable[[], None]) -> None:
        self.granted = 0
        self._window = window
        self._changed = changed
        self._up_to = 0
        self._returned = 0
        self._spent = 0
        # A session that has been told nothing yet is about to be.
        self._told_free = 1

    @property
    def asks(self) -> bool:
        """Whether it wants one more."""
        return self.granted < self._up_to

    @property
    def unused(self) -> int:
        """Slots that are promised to this session."""
        return self.granted - self._returned - self._spent

    def ask(self, *, up_to: int, returned: int) -> None:
        """What the frontend says it wants and gives back. Raises RequestError for what it never had."""
        if not self._returned <= returned <= self.granted - self._spent:
            raise invalid("credits.returned", f"{returned}: {self.granted} were granted, {self._spent} were used")
        self._up_to, self._returned = up_to, returned
        self._window.grant()

    def grant_one(self) -> None:
        """One more slot is promised."""
        self.granted += 1
        self._changed()

    def told_of_need(self) -> None:
        """Somebody waits for a slot: whoever keeps a credit in hand hears that none is free, and gives it back."""
        if self.unused and not self.asks:
            self._changed()

    def told_of_room(self) -> None:
        """There are slots that nobody has asked for: requests may wait at frontends that have asked other workers."""
        if not self._told_free:
            self._changed()

    def tell_free(self) -> int:
        """What the session says now of the slots that nobody has or was promised."""
        self._told_free = self._window.free
        return self._told_free

    def spend(self) -> Entry:
        """One credit becomes a leg that is on its way in. Raises RequestError with NO_CREDIT."""
        if self.unused <= 0:
            raise RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.NO_CREDIT, "the session has no credit left for this leg"
            )
        self._spent += 1
        return Entry(self._window)

    def close(self) -> None:
        """The session is over."""
        self._window.forget(self)


class Entry:
    """A leg between its credit and its life in the engine."""

    def __init__(self, window: CreditWindow) -> None:
        self._window = window
        self._done = False
        window.entering += 1

    def done(self) -> None:
        """The leg is live, or will never be. Idempotent."""
        if not self._done:
            self._done = True
            self._window.entering -= 1
            self._window.grant()
