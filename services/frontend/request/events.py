"""What an owner hears, and whom it tells."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from kvbaton.errors import RequestError
from services.frontend.dispatch.line import Ticket
from services.frontend.link.protocol import LegEvent
from services.frontend.request.attempt import Attempt
from services.frontend.request.deadlines import DeadlineClock
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


@dataclass(frozen=True, slots=True)
class FromLeg:
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
    """What one owner hears, in order."""

    def __init__(self, clock: DeadlineClock) -> None:
        self._clock = clock
        self._items: asyncio.Queue[FromLeg | FromQueue | End] = asyncio.Queue()

    def put(self, item: FromLeg | FromQueue | End) -> None:
        """It is heard behind all that came before."""
        self._items.put_nowait(item)

    async def get(self) -> FromLeg | FromQueue:
        """The next one. Raises EndedError where somebody ends the request."""
        item = await self._items.get()
        if isinstance(item, End):
            raise EndedError(item.error)
        return item

    async def get_in_time(self) -> FromLeg | FromQueue:
        """The same within the request's deadlines. Raises RequestError where one passes."""
        if not self._items.empty():
            return await self.get()
        try:
            async with asyncio.timeout(self._clock.remaining()):
                return await self.get()
        except TimeoutError:
            raise self._clock.expired() from None


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
