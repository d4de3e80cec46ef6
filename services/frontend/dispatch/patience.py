"""Retries whose last possible workers have gone, or are going: they wait here for those that take their place.

Outside the line, where each of them would be looked at for every credit that is none for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from services.frontend.dispatch.line import Ticket
from services.frontend.router.placement import Target, incarnation_of


class PatientTickets:
    """Of all models. Each waits for `timeout` seconds; `gave_up` is then told of it."""

    def __init__(self, timeout: float, gave_up: Callable[[Ticket], None]) -> None:
        self._timeout = timeout
        self._gave_up = gave_up
        self._timers: dict[str, dict[Ticket, asyncio.TimerHandle]] = {}

    def add(self, ticket: Ticket) -> bool:
        """It waits from now on; False where nobody does."""
        if not self._timeout:
            return False
        timers = self._timers.setdefault(ticket.model, {})
        timers[ticket] = asyncio.get_running_loop().call_later(self._timeout, self._end, ticket)
        return True

    def remove(self, ticket: Ticket) -> bool:
        """It waits no more; False if it did not wait here."""
        timer = self._timers.get(ticket.model, {}).pop(ticket, None)
        if timer is None:
            return False
        timer.cancel()
        if not self._timers[ticket.model]:
            del self._timers[ticket.model]
        return True

    def count(self, model: str) -> int:
        """How many of the model wait."""
        return len(self._timers.get(model, ()))

    def models(self) -> list[str]:
        """Those of its tickets."""
        return list(self._timers)

    def served(self, model: str, targets: Collection[Target]) -> list[Ticket]:
        """Takes out those that one of the model's targets can serve now, most urgent first.

        An excluded worker that was away and is back counts as any other: it was the connection that had broken.
        """
        here = {incarnation_of(worker) for target in targets for worker in target.workers}
        served: list[Ticket] = []
        for ticket in sorted(self._timers.get(model, ())):
            returned = ticket.away & here
            ticket.away |= ticket.excluded - here
            ticket.excluded -= returned
            if any(map(ticket.fits, targets)):
                served.append(ticket)
        for ticket in served:
            self.remove(ticket)
        return served

    def _end(self, ticket: Ticket) -> None:
        self.remove(ticket)
        self._gave_up(ticket)
