"""The requests of one model that wait, most urgent first."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator

from kvbaton.errors import RequestError
from services.frontend.router.placement import Placement, Target

# What a ticket delivers: workers, or why there will be none.
Delivery = Callable[[Placement | RequestError], None]


class Ticket:
    """One request's place in the line; then its placement, until that is spent or given back."""

    def __init__(
        self,
        model: str,
        *,
        priority: int,
        number: int,
        excluded: frozenset[str] = frozenset(),
        held: bool = False,
        leave: Callable[[Ticket], None],
    ) -> None:
        """`excluded` are instance ids that the request must do without; a `held` ticket has a place but no turn."""
        self.model = model
        self.priority = priority
        self.number = number
        self.excluded = excluded
        self.held = held
        self.prefers = ""
        """The prefill worker to take before others: its cache has the prompt."""
        self.entered = time.monotonic()
        self.waiting = True
        self._leave = leave
        self._result: Placement | RequestError | None = None
        self._deliver: Delivery | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Smaller is more urgent."""
        return (-self.priority, self.number)

    def __lt__(self, other: Ticket) -> bool:
        return self.order < other.order

    def deliver_to(self, deliver: Delivery) -> None:
        """Who hears of the result, once; at once when it is there."""
        self._deliver = deliver
        if self._result is not None:
            deliver(self._result)

    def settle(self, result: Placement | RequestError) -> None:
        """The wait is over."""
        self.waiting = False
        self._result = result
        if self._deliver is not None:
            self._deliver(result)
            self._deliver = None  # it knows the ticket, and the ticket should not outlive its request

    def spend(self) -> None:
        """The placement's credit goes out with the legs."""
        self._result = None

    def leave(self) -> None:
        """The request wants no workers any more: out of the line, or the credit back. Idempotent."""
        if self.waiting:
            self.waiting = False
            self._leave(self)
        elif isinstance(self._result, Placement) and self._result.credit is not None:
            self._result.decode.link.give_back(self._result.credit)
        self._result = self._deliver = None


class Line:
    """Tickets of one model. Those that have left are dropped when they come up."""

    def __init__(self) -> None:
        # Whose turn it is among the targets.
        self.turn = 0
        self._heap: list[Ticket] = []
        self._count = 0
        # Those that some target can't serve.
        self._picky: set[Ticket] = set()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Ticket]:
        return (ticket for ticket in self._heap if ticket.waiting)

    @property
    def picky(self) -> list[Ticket]:
        """Those that must do without some worker."""
        return list(self._picky)

    def add(self, ticket: Ticket) -> None:
        """In its place."""
        heapq.heappush(self._heap, ticket)
        self._count += 1
        if ticket.excluded:
            self._picky.add(ticket)

    def removed(self, ticket: Ticket) -> None:
        """It doesn't wait any more; called once for each."""
        self._count -= 1
        self._picky.discard(ticket)
        if len(self._heap) > 2 * self._count + 64:
            self._heap = [ticket for ticket in self._heap if ticket.waiting]
            heapq.heapify(self._heap)

    def count_for(self, target: Target) -> int:
        """How many of them the target can serve."""
        return self._count - sum(not target.possible(ticket.excluded) for ticket in self._picky)

    def first_for(self, target: Target) -> Ticket | None:
        """The most urgent one that the target can serve; it stays in the line."""
        passed: list[Ticket] = []
        found: Ticket | None = None
        while self._heap:
            ticket = self._heap[0]
            if ticket.waiting and target.possible(ticket.excluded):
                found = ticket
                break
            heapq.heappop(self._heap)
            if ticket.waiting:
                passed.append(ticket)
        for ticket in passed:
            heapq.heappush(self._heap, ticket)
        return found
