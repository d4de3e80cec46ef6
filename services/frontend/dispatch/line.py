"""The requests of one model that wait, most urgent first."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator

from kvbaton.errors import RequestError
from services.frontend.link.load import LegShare
from services.frontend.router.hints import NO_HINTS, Hints
from services.frontend.router.placement import Incarnation, Placement, Target
from services.frontend.router.policies.policy import Prompt
from services.frontend.router.worker import Worker, WorkerRank

# What a ticket delivers: workers, or why there will be none.
Delivery = Callable[[Placement | RequestError], None]


# Workers that are asked for the tickets in the open: each is told whenever their number changes. A slot that falls free
# elsewhere is heard of, and asked for, then.
_ASKED_OPENLY = 8


class Ticket:
    """One request's place in the line; then its placement, until that is spent or given back."""

    def __init__(
        self,
        model: str,
        *,
        priority: int,
        number: int,
        excluded: frozenset[Incarnation] = frozenset(),
        held: bool = False,
        hints: Hints = NO_HINTS,
        ready: Callable[[Ticket], None],
        leave: Callable[[Ticket], None],
    ) -> None:
        """`excluded` are workers that the request must do without, `hints` name those that it must have.

        A `held` ticket has a place but no turn.
        """
        self.model = model
        self.priority = priority
        self.number = number
        self.excluded = excluded
        self.away: frozenset[Incarnation] = frozenset()
        """Those of them that have been seen to be away."""
        self.held = held
        self.prefers = ""
        """The prefill worker to take before others: its cache has the prompt."""
        self.hints = hints
        self.entered = time.monotonic()
        self.prompt: Prompt | None = None
        """None while it is being tokenized: the ticket keeps its place, and gets no workers yet."""
        self.waiting = True
        self.seat: Seats | None = None
        """Where it stands in its line; None without a prompt, and when it waits no longer."""
        self.rank: WorkerRank | None = None
        """Who is asked for a credit for it; None: everybody who could serve it."""
        self.share: LegShare | None = None
        """Its part of that rank's load."""
        self.routing = 0.0
        """Seconds that choosing for it has taken so far."""
        self._ready = ready
        self._leave = leave
        self._result: Placement | RequestError | None = None
        self._deliver: Delivery | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Smaller is more urgent."""
        return (-self.priority, self.number)

    def __lt__(self, other: Ticket) -> bool:
        return self.order < other.order

    @property
    def picky(self) -> bool:
        """Whether some target may be no good for it."""
        return bool(self.excluded or self.hints)

    def fits(self, target: Target) -> bool:
        """Whether the target can serve it."""
        return target.possible(self.excluded, self.hints)

    def prefills(self, target: Target) -> Iterator[Worker]:
        """The target's prefill workers that can serve it."""
        return target.prefills_for(self.excluded, self.hints)

    def describe(self, prompt: Prompt) -> None:
        """The prompt is known: from now on it may get workers. The first call counts."""
        if self.prompt is None:
            self.prompt = prompt
            if self.waiting:
                self._ready(self)

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
        elif isinstance(self._result, Placement):
            self._result.give_back()
        self._result = self._deliver = None


class Seats:
    """Tickets, each in one such place at a time. Those that have left are dropped when they come up."""

    def __init__(self) -> None:
        self._heap: list[Ticket] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def take(self, ticket: Ticket) -> None:
        """In its order; it leaves where it was."""
        if ticket.seat is not None:
            ticket.seat.lose(ticket)
        ticket.seat = self
        heapq.heappush(self._heap, ticket)
        self._count += 1

    def lose(self, ticket: Ticket) -> None:
        """It stands elsewhere, or waits no longer."""
        ticket.seat = None
        self._count -= 1
        if len(self._heap) > 2 * self._count + 64:
            self._heap = [each for each in self._heap if each.seat is self]
            heapq.heapify(self._heap)

    def first(self, fits: Callable[[Ticket], bool]) -> Ticket | None:
        """The most urgent one of those; it stays."""
        passed: list[Ticket] = []
        found: Ticket | None = None
        while self._heap:
            ticket = self._heap[0]
            if ticket.seat is self and fits(ticket):
                found = ticket
                break
            heapq.heappop(self._heap)
            if ticket.seat is self:
                passed.append(ticket)
        for ticket in passed:
            heapq.heappush(self._heap, ticket)
        return found

    def all(self) -> list[Ticket]:
        """Most urgent first."""
        return sorted({ticket for ticket in self._heap if ticket.seat is self})


class Line:
    """Tickets of one model.

    A ticket with a prompt stands either with the one worker that is asked for its credit, because it was chosen and
    has a free slot, or in the open, where the first worker that has a credit for it gets it. For those in the open some
    workers are asked, and for one that can't go everywhere all that can serve it.

    It remembers what was found out of workers, so that not all of them are looked at for every request.
    """

    def __init__(self) -> None:
        self.open = Seats()
        self.room: dict[Worker, int] = {}
        """How many more tickets may stand with each worker; without those that have room for none."""
        self.changed: dict[Worker, None] = {}
        """Those to look at again, in the order in which their credits, slots, pairs or seats have changed."""
        self.stale = True
        """All of them are to be looked at again."""
        self.asks_some = False
        """Whether others could be asked for the tickets in the open than those that are."""
        self._chosen: dict[Worker, Seats] = {}
        self._tickets: dict[Ticket, None] = {}
        # Those that some target can't serve.
        self._picky: set[Ticket] = set()
        # The widest window that any worker had: nobody is asked for more than that.
        self._widest = 0
        # Who is asked for those in the open, and for how many they were asked last; None: it was not the same for all.
        self._openly: frozenset[Worker] = frozenset()
        self._asked_openly: int | None = None
        # Whether so many stand in the open that all are asked, and for the widest window.
        self._crowded = False

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._tickets)

    @property
    def picky(self) -> list[Ticket]:
        """Those that must do without some worker, or must have a certain one."""
        return list(self._picky)

    def add(self, ticket: Ticket) -> None:
        """It waits."""
        self._tickets[ticket] = None
        if ticket.picky:
            self._picky.add(ticket)
        if ticket.prompt is not None:
            self.open.take(ticket)

    def removed(self, ticket: Ticket) -> None:
        """It doesn't wait any more; called once for each. Its share of a load is the caller's."""
        del self._tickets[ticket]
        self._picky.discard(ticket)
        if ticket.rank is not None:
            self.changed[ticket.rank.worker] = None
        if ticket.seat is not None:
            ticket.seat.lose(ticket)

    def choose(self, ticket: Ticket, rank: WorkerRank, share: LegShare) -> None:
        """It is that rank's worker that is asked; it has room."""
        worker = rank.worker
        self._chosen.setdefault(worker, Seats()).take(ticket)
        ticket.rank, ticket.share = rank, share
        self.changed[worker] = None
        self.room[worker] -= 1
        if not self.room[worker]:
            del self.room[worker]

    def reopen(self, ticket: Ticket) -> None:
        """Whoever can may serve it."""
        if ticket.share is not None:
            ticket.share.end()
        ticket.rank = ticket.share = None
        self.open.take(ticket)

    def forget(self) -> None:
        """Workers or pairs are others: nothing that was found out counts any more, and all go back into the open."""
        self.reopen_all()
        self.stale = True
        self.room.clear()
        self.changed.clear()
        self.ask_others()

    def look_again(self, workers: Iterable[Worker]) -> None:
        """They are all that there are."""
        self.stale = False
        self.changed = dict.fromkeys(workers)

    def found(self, worker: Worker, room: int) -> None:
        """So many tickets may stand with the worker; those beyond them, the least urgent, go back into the open."""
        self.reopen_all(worker, keep=room)
        if (left := room - self.chosen(worker)) > 0:
            self.room[worker] = left
        else:
            self.room.pop(worker, None)

    def to_ask(self, workers: Collection[Worker]) -> list[Worker]:
        """Those of all `workers` of whom others are `wanted` than before, perhaps."""
        changed, self.changed = self.changed, {}
        self._choose_whom_to_ask(workers)
        before = self._asked_openly
        self._asked_openly = None if self._picky else self._asked_for()
        if before is None or self._asked_openly is None:
            changed = dict.fromkeys(workers)
        elif before != self._asked_openly:
            changed |= dict.fromkeys(worker for worker in workers if worker in self._openly)
        if not self.open:
            self._openly, self.asks_some = frozenset(), False
        return [worker for worker in changed if worker in workers]

    def _choose_whom_to_ask(self, workers: Collection[Worker]) -> None:
        """A few of many; all while so many wait that each is asked for all that it has, which need not be told anew."""
        some = len(workers) > _ASKED_OPENLY
        many = max(self._widest, _ASKED_OPENLY)
        crowded = some and not self._picky and len(self.open) >= (many / 2 if self._crowded else many)
        if self.open and (not self._openly or crowded != self._crowded):
            self.asks_some = some and not crowded
            self._openly = frozenset(_sample(workers) if self.asks_some else workers)
            self._asked_openly = None
        self._crowded = crowded

    def _asked_for(self) -> int:
        """For how many in the open."""
        return self._widest if self._crowded else min(len(self.open), self._widest)

    def ask_others(self) -> None:
        """Those that are asked for the tickets in the open have had their time."""
        self._openly, self._asked_openly = frozenset(), None

    def wanted(self, target: Target) -> int:
        """How many tickets the target's worker is asked for."""
        if target.decode in self._openly:
            return self.chosen(target.decode) + (self._widest if self._crowded else self.open_for(target))
        picky = sum(ticket.seat is self.open and ticket.fits(target) for ticket in self._picky)
        return self.chosen(target.decode) + picky

    def asked(self, window: int) -> None:
        """A worker with this window was."""
        if window > self._widest:
            self._widest, self._asked_openly = window, None

    def chosen(self, worker: Worker) -> int:
        """How many stand with it."""
        seats = self._chosen.get(worker)
        return 0 if seats is None else len(seats)

    def reopen_all(self, worker: Worker | None = None, *, keep: int = 0) -> None:
        """All that stand with the worker, or with any, but for the `keep` most urgent ones."""
        for each in [worker] if worker is not None else list(self._chosen):
            # Seats that are to be empty go, or they would keep a worker that leaves.
            seats = self._chosen.get(each) if keep else self._chosen.pop(each, None)
            if seats is None or len(seats) <= keep:
                continue
            for ticket in seats.all()[keep:]:
                self.reopen(ticket)

    def first_for(self, target: Target) -> Ticket | None:
        """The most urgent one that a credit of the target may serve; it stays."""
        seats = self._chosen.get(target.decode)
        chosen = None if seats is None else seats.first(lambda ticket: ticket.fits(target))
        anybody = self.open.first(lambda ticket: ticket.fits(target))
        return min(filter(None, (chosen, anybody)), default=None)

    def open_for(self, target: Target) -> int:
        """How many in the open the target can serve."""
        return len(self.open) - sum(ticket.seat is self.open and not ticket.fits(target) for ticket in self._picky)


def _sample(workers: Collection[Worker]) -> list[Worker]:
    return random.sample(list(workers), _ASKED_OPENLY)
