"""What an owner hears, and whom it tells."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvbaton.errors import RequestError
from services.frontend.dispatch.line import Ticket
from services.frontend.link.protocol import LegEvent
from services.frontend.request.attempt import Attempt
from services.frontend.request.deadlines import DeadlineClock
from services.frontend.request.mailbox import Mailbox
from services.frontend.router.placement import Placement
from services.requests import Role


@dataclass(frozen=True, slots=True)
class End:
    """Somebody other than the legs ends the request: the client, or a shutdown."""

    error: RequestError


class EndedError(Exception):
    """Carries an `End` out; no RequestError, so that no retry takes it for an attempt's failure."""

    def __init__(self, error: RequestError) -> None:
        super().__init__(str(error))
        self.error = error


class FromLeg(NamedTuple):
    """What a leg of some attempt says."""

    attempt: Attempt
    role: Role
    event: LegEvent


@dataclass(frozen=True, slots=True)
class FromQueue:
    """Workers, or that there will be none."""

    ticket: Ticket
    result: Placement | RequestError


class Inbox:
    """What one owner hears, in order. `close` it."""

    def __init__(self, clock: DeadlineClock) -> None:
        self._clock = clock
        self._items: Mailbox[FromLeg | FromQueue | End] = Mailbox()
        # One timer for many items: tokens move the deadline, and the timer finds that out when it fires.
        self._timer: asyncio.TimerHandle | None = None
        self._fires_at = 0.0

    def put(self, item: FromLeg | FromQueue | End) -> None:
        """It is heard behind all that came before."""
        self._items.put(item)

    async def get(self) -> FromLeg | FromQueue:
        """The next one. Raises EndedError where somebody ends the request."""
        item = await self._items.get()
        if isinstance(item, End):
            raise EndedError(item.error)
        return item

    async def get_in_time(self) -> FromLeg | FromQueue:
        """The same within the request's deadlines. Raises RequestError where one passes."""
        while not self._items:
            deadline = self._clock.deadline
            if self._timer is None or deadline < self._fires_at:
                self._wake_at(deadline)
            await self._items.wait()
        return await self.get()

    def close(self) -> None:
        """Nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake_at(self, deadline: float) -> None:
        """Raises RequestError when it has passed."""
        self.close()
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise self._clock.expired()
        self._fires_at = deadline
        self._timer = asyncio.get_running_loop().call_later(remaining, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._items.wake()


class Progress(Protocol):
    """Whom an owner tells how far it has come."""

    def choice_prefilled(self) -> None:
        """The prompt has been computed; more than once."""
        ...

    def choice_failed(self, error: RequestError) -> None:
        """There will be no answer; its legs are being ended."""
        ...

    def choice_ended(self) -> None:
        """Every leg is gone; the last call."""
        ...
