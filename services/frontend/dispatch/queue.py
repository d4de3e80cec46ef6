"""Requests wait here for a decode worker's credit.

No prefill is spent on a request that decode can't take: a request gets its workers together with the credit of one of
them. While workers have free slots, the policy chooses among those, and the chosen one is asked for a credit. When it
turns out to have none, another one is chosen. For requests for which none is free a few of the workers that could
serve them are asked, and a slot that falls free there is theirs at once; of one that falls free elsewhere the queue
hears, and asks for it. What comes too much is given back.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator

import grpc

from kvbaton.errors import Reason, RequestError
from services.frontend.dispatch.chooser import Chooser
from services.frontend.dispatch.line import Line, Ticket
from services.frontend.dispatch.pair_checks import PairChecks
from services.frontend.dispatch.patience import PatientTickets
from services.frontend.dispatch.targets import Targets
from services.frontend.link.protocol import Credit
from services.frontend.router.hints import NO_HINTS, Hints
from services.frontend.router.placement import Incarnation, Placement, Router, Target
from services.frontend.router.policies.make import Policies
from services.frontend.router.policies.policy import Prompt
from services.frontend.router.worker import Worker
from services.telemetry import metrics

# Seconds that a refused client is told to wait: as long as the oldest request in the queue has, within these.
_SHORTEST_WAIT, _LONGEST_WAIT = 1.0, 30.0
# Seconds for which the same few of many full workers are asked; they may be slow, and others' slots go to others.
_TURN_SECONDS = 2.0


class DispatchQueue:
    """Belongs to the event loop. Told by `workers_changed` and `credits_came`; all its methods return at once."""

    def __init__(
        self, router: Router, pairs: PairChecks, policies: Policies, *, limit: int, ready_timeout: float
    ) -> None:
        """At most `limit` requests of a model wait, and for `ready_timeout` seconds while there are no workers."""
        self._router = router
        self._pairs = pairs
        self._targets = Targets(router, pairs)
        self._chooser = Chooser(policies, pairs)
        self._limit = limit
        self._ready_timeout = ready_timeout
        self._patient = PatientTickets(ready_timeout, self._end_patience)
        # By model without workers.
        self._giving_up: dict[str, asyncio.TimerHandle] = {}
        # By model of which some workers are asked: when it is the turn of others.
        self._turns: dict[str, asyncio.TimerHandle] = {}
        self._lines: dict[str, Line] = {}
        self._numbers = itertools.count()
        # By model: those that wait or are held, by priority.
        self._priorities: defaultdict[str, Counter[int]] = defaultdict(Counter)
        pairs.on_change(self._pairs_changed)

    def __len__(self) -> int:
        return sum(priorities.total() for priorities in self._priorities.values())

    def enter(self, model: str, *, priority: int = 0, hints: Hints = NO_HINTS) -> Ticket:
        """A place in the line, for a request that gets workers once its ticket has been told the prompt.

        Raises RequestError: RESOURCE_EXHAUSTED when full, UNAVAILABLE when nobody can serve, and what is wrong with the
        hints.
        """
        return self.enter_all(model, 1, priority=priority, hints=hints)[0]

    def enter_all(self, model: str, count: int, *, priority: int = 0, hints: Hints = NO_HINTS) -> list[Ticket]:
        """So many places one behind the other, or none; all but the first are held until `release`.

        Raises RequestError as `enter`.
        """
        self._check(model, hints)
        self._make_room(model, count, priority)
        tickets = [
            Ticket(
                model,
                priority=priority,
                number=next(self._numbers),
                held=index > 0,
                hints=hints,
                ready=self._described,
                leave=self._left,
            )
            for index in range(count)
        ]
        for ticket in tickets[1:]:
            self._count(ticket, +1)
        self._add(tickets[0])
        return tickets

    def release(self, ticket: Ticket, *, prefers: str = "") -> None:
        """A held ticket gets its turn, if it has not left; on the prefill worker of this instance id, if it can."""
        if not (ticket.waiting and ticket.held):
            return
        ticket.held, ticket.prefers = False, prefers
        self._count(ticket, -1)
        self._add(ticket)
        if ticket.waiting:
            # Those that it names may have gone while it was held.
            self._end_hopeless(ticket.model, [ticket])

    def enter_again(
        self,
        ticket: Ticket,
        excluded: frozenset[Incarnation],
        prompt: Prompt | None = None,
        *,
        patient: bool = False,
    ) -> Ticket | None:
        """After a failed attempt: at its old place, for workers without `excluded`. None when there are none.

        A `patient` one then waits for them, as new requests do for workers. `prompt` takes the place of the old one.
        """
        again = Ticket(
            ticket.model,
            priority=ticket.priority,
            number=ticket.number,
            excluded=excluded,
            hints=ticket.hints,
            ready=self._described,
            leave=self._left,
        )
        again.prompt = prompt or ticket.prompt
        targets = self._targets.possible(ticket.model)
        if any(map(again.fits, targets)):
            return self._add(again)
        if not patient or not self._patient.add(again):
            return None
        self._measure(ticket.model)
        self._enter_served(ticket.model, targets)
        return again

    def workers_changed(self) -> None:
        """Some worker came, went, or can't be routed to any more."""
        known = self._router.known()
        self._pairs.keep_only({worker.record.incarnation.uuid for worker in known})
        # When they come back it is not a client's request that shows whether they can hand over again.
        self._pairs.doubt({worker.record.incarnation.uuid for worker in known if worker.ejected})
        in_reach = {target.decode for model in self._lines for target in self._router.targets(model)}
        for worker in self._router.streaming():
            if worker not in in_reach:
                worker.want_no_credits()
        self._serve_all()

    def credits_came(self, worker: Worker) -> None:
        """The worker has granted credits, or its window or its free slots have changed."""
        model = worker.record.model.name
        line = self._lines.get(model)
        if line is not None and worker in self._targets.usable(model):
            line.changed[worker] = None
            if line:
                self._serve(model, line)
                return
        worker.want_no_credits()

    def _add(self, ticket: Ticket) -> Ticket:
        line = self._lines.setdefault(ticket.model, Line())
        line.add(ticket)
        self._count(ticket, +1)
        if ticket.prompt is not None:
            self._serve(ticket.model, line)
        return ticket

    def _check(self, model: str, hints: Hints) -> None:
        """Raises RequestError for a request that nobody could serve."""
        targets = self._targets.possible(model)
        if not targets:
            raise self._router.no_worker(model)
        if hints:
            targets = [target for target in targets if target.possible(frozenset(), hints)]
            if not targets:
                raise self._router.unmet(model, hints)
        self._chooser.require_hints(hints, targets)

    def _described(self, ticket: Ticket) -> None:
        if ticket.held:
            return
        line = self._lines[ticket.model]
        line.open.take(ticket)
        self._serve(ticket.model, line)

    def _left(self, ticket: Ticket) -> None:
        if self._patient.remove(ticket):
            self._measure(ticket.model)
            return
        if ticket.held:
            self._count(ticket, -1)
            return
        self._remove(ticket)
        if ticket.share is not None:
            ticket.share.end()
        self._serve(ticket.model, self._lines[ticket.model])

    def _settle(self, ticket: Ticket, result: Placement | RequestError) -> None:
        if ticket.share is not None and isinstance(result, RequestError):
            ticket.share.end()
        self._remove(ticket)
        ticket.settle(result)

    def _remove(self, ticket: Ticket) -> None:
        line = self._lines[ticket.model]
        line.removed(ticket)
        if not line and (timer := self._giving_up.pop(ticket.model, None)) is not None:
            timer.cancel()
        self._count(ticket, -1)

    def _count(self, ticket: Ticket, change: int) -> None:
        priorities = self._priorities[ticket.model]
        priorities[ticket.priority] += change
        if not priorities[ticket.priority]:
            del priorities[ticket.priority]
        self._measure(ticket.model)

    def _measure(self, model: str) -> None:
        waiting = self._priorities[model].total() + self._patient.count(model)
        metrics.QUEUED_REQUESTS.labels(model).set(waiting)

    def _make_room(self, model: str, count: int, priority: int) -> None:
        """The model's least urgent requests leave for more urgent ones. Raises RequestError when that is not enough."""
        queued = self._priorities[model].total()
        lacking = queued + count - self._limit
        if lacking <= 0:
            return
        line = self._lines.get(model, ())
        outranks = priority > min(self._priorities[model], default=priority)
        outranked = sorted(ticket for ticket in line if ticket.priority < priority) if outranks else []
        oldest = min((ticket.entered for ticket in line), default=time.monotonic())
        error = RequestError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            Reason.QUEUE_FULL,
            f"{queued} requests for model {model!r} wait for workers, --max-queued-requests is {self._limit}",
            retry_after=min(max(time.monotonic() - oldest, _SHORTEST_WAIT), _LONGEST_WAIT),
        )
        if len(outranked) < lacking:
            raise error
        for ticket in outranked[-lacking:]:
            self._settle(ticket, error)
        self._serve(model, self._lines[model])

    def _pairs_changed(self, decode: Worker) -> None:
        """Pairs of one decode worker have been proven, or have failed."""
        model = decode.record.model.name
        line = self._lines.get(model)
        if self._targets.pairs_changed(decode):
            self._serve_all()
        elif line is not None and decode in self._targets.usable(model):
            line.changed[decode] = None
            if line:
                self._serve(model, line)

    def _serve_all(self) -> None:
        self._targets.changed()
        for line in self._lines.values():
            line.forget()
        for model in self._patient.models():
            self._enter_served(model, self._targets.possible(model))
        for model, line in self._lines.items():
            if line:
                self._end_hopeless(model, line.picky)
                self._serve(model, line)

    def _end_hopeless(self, model: str, tickets: Iterable[Ticket]) -> None:
        """Requests whose last possible workers have gone while others of the model are there."""
        targets = self._targets.possible(model)
        for ticket in tickets if targets else ():
            if not any(map(ticket.fits, targets)):
                self._settle(ticket, self._router.unmet(model, ticket.hints))

    def _enter_served(self, model: str, targets: Collection[Target]) -> None:
        for ticket in self._patient.served(model, targets):
            self._add(ticket)

    def _end_patience(self, ticket: Ticket) -> None:
        self._measure(ticket.model)
        ticket.settle(self._router.no_worker(ticket.model))

    def _serve(self, model: str, line: Line) -> None:
        """Hands out what has come, then asks for what is still needed.

        Of workers only those that have changed are looked at; there may be hundreds.
        """
        if not self._targets.possible(model):
            if line and model not in self._giving_up:
                loop = asyncio.get_running_loop()
                self._giving_up[model] = loop.call_later(self._ready_timeout, self._give_up, model)
            return
        if (timer := self._giving_up.pop(model, None)) is not None:
            timer.cancel()
        if line.stale:
            line.look_again(self._targets.usable(model))
        self._hand_out(model, line, list(line.changed))
        while True:
            self._plan(model, line)
            # A stream's credits come at once, and so do a session's spare ones.
            if not self._hand_out(model, line, self._ask(model, line)):
                break
        if line.asks_some and model not in self._turns:
            loop = asyncio.get_running_loop()
            self._turns[model] = loop.call_later(_TURN_SECONDS, self._ask_others, model)

    def _ask_others(self, model: str) -> None:
        del self._turns[model]
        self._lines[model].ask_others()
        self._serve(model, self._lines[model])

    def _give_up(self, model: str) -> None:
        del self._giving_up[model]
        error = self._router.no_worker(model)
        for ticket in list(self._lines[model]):
            self._settle(ticket, error)

    def _hand_out(self, model: str, line: Line, workers: Iterable[Worker]) -> bool:
        """Gives every credit of theirs to the most urgent request that it is for; True when there were any."""
        came = False
        for decode in workers:
            while (usable := self._targets.usable(model).get(decode)) and (credit := decode.link.take()) is not None:
                came = True
                if not self._use(line, usable.target, credit):
                    decode.link.give_back(credit)
        return came

    def _use(self, line: Line, target: Target, credit: Credit) -> bool:
        """Spends the credit on a request, or on the proof of its pair."""
        ticket = line.first_for(target)
        if ticket is None:
            return False
        placement = self._chooser.place(ticket, target, credit)
        if placement.decode_share is not None:
            self._settle(ticket, placement)
        else:
            # The request stays in the line: it gets the next credit, of this pair or of another.
            self._pairs.begin(placement)
            self._targets.pairs_changed(target.decode)
            line.changed[target.decode] = None
            line.reopen_all(target.decode)
        return True

    def _plan(self, model: str, line: Line) -> None:
        """Lets the policy choose for every request that some worker has a free slot for, most urgent first."""
        targets = self._targets.usable(model)
        for worker in list(line.changed):
            usable = targets.get(worker)
            line.found(worker, 0 if usable is None else usable.within(worker.link.free_slots))

        def free_for(ticket: Ticket) -> Iterator[Worker]:
            if not ticket.picky:
                return iter(line.room)
            return (worker for worker in line.room if ticket.fits(targets[worker].target))

        def fits(ticket: Ticket) -> bool:
            return any(True for _ in free_for(ticket))

        while line.room and (ticket := line.open.first(fits)) is not None:
            assert ticket.prompt is not None
            began = time.monotonic()
            rank, share = self._chooser.streaming(ticket.prompt, free_for(ticket))
            line.choose(ticket, rank, share)
            ticket.routing += time.monotonic() - began

    def _ask(self, model: str, line: Line) -> list[Worker]:
        """Each worker for those that stand with it, some for those that anybody may serve; returns whom for any."""
        usable = self._targets.usable(model)
        asked: list[Worker] = []
        for worker in line.to_ask(usable):
            window = worker.link.window
            worker.link.ask(wanted := min(usable[worker].within(line.wanted(usable[worker].target)), window))
            line.asked(window)
            if wanted:
                asked.append(worker)
        return asked
