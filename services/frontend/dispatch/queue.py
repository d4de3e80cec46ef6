"""Requests wait here for a decode worker's credit.

No prefill is spent on a request that decode can't take: a request gets its workers together with the credit of one of
them. While workers have free slots, the frontend asks as many of them as it has requests; when none has, it asks every
worker for as many as wait, and gives back what came too much.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import grpc

from kvbaton.errors import Reason, RequestError
from services.frontend.dispatch.line import Line, Ticket
from services.frontend.dispatch.pair_checks import PairChecks, PairState
from services.frontend.link.protocol import Credit
from services.frontend.router.placement import Placement, Router, Target
from services.frontend.router.worker import Worker
from services.telemetry import metrics

# Seconds that a refused client is told to wait: as long as the oldest request in the queue has, within these.
_SHORTEST_WAIT, _LONGEST_WAIT = 1.0, 30.0


class DispatchQueue:
    """Belongs to the event loop. Told by `workers_changed` and `credits_came`; all its methods return at once."""

    def __init__(self, router: Router, pairs: PairChecks, *, limit: int, ready_timeout: float) -> None:
        """At most `limit` requests of a model wait, and for `ready_timeout` seconds while there are no workers."""
        self._router = router
        self._pairs = pairs
        self._limit = limit
        self._ready_timeout = ready_timeout
        # By model without workers.
        self._giving_up: dict[str, asyncio.TimerHandle] = {}
        self._lines: dict[str, Line] = {}
        self._numbers = itertools.count()
        # By model: those that wait or are held, by priority.
        self._priorities: defaultdict[str, Counter[int]] = defaultdict(Counter)
        # By model, until workers or pairs change.
        self._usable: dict[str, dict[Worker, Target]] = {}
        self._kept: dict[str, list[Target]] = {}
        # By decode worker: which of its prefill workers is next.
        self._prefill_turns: dict[str, int] = {}
        pairs.on_change(self._serve_all)

    def __len__(self) -> int:
        return sum(priorities.total() for priorities in self._priorities.values())

    def enter(self, model: str, *, priority: int = 0) -> Ticket:
        """A place in the line. Raises RequestError: RESOURCE_EXHAUSTED when full, UNAVAILABLE when nobody can serve."""
        return self.enter_all(model, 1, priority=priority)[0]

    def enter_all(self, model: str, count: int, *, priority: int = 0) -> list[Ticket]:
        """So many places one behind the other, or none; all but the first are held until `release`.

        Raises RequestError as `enter`.
        """
        if not self._possible(model):
            raise self._router.no_worker(model)
        self._make_room(model, count, priority)
        tickets = [
            Ticket(model, priority=priority, number=next(self._numbers), held=index > 0, leave=self._left)
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

    def enter_again(self, ticket: Ticket, excluded: frozenset[str]) -> Ticket | None:
        """After a failed attempt: at its old place, for workers without `excluded`. None when there are none."""
        if not any(target.possible(excluded) for target in self._possible(ticket.model)):
            return None
        return self._add(
            Ticket(ticket.model, priority=ticket.priority, number=ticket.number, excluded=excluded, leave=self._left)
        )

    def workers_changed(self) -> None:
        """Some worker came, went, or can't be routed to any more."""
        self._pairs.keep_only({worker.record.incarnation.uuid for worker in self._router.known()})
        streaming = {worker.instance_id for worker in self._router.streaming()}
        self._prefill_turns = {name: turn for name, turn in self._prefill_turns.items() if name in streaming}
        in_reach = {target.decode for model in self._lines for target in self._router.targets(model)}
        for worker in self._router.streaming():
            if worker not in in_reach:
                worker.want_no_credits()
        self._serve_all()

    def credits_came(self, worker: Worker) -> None:
        """The worker has granted credits, or its free slots have changed."""
        line = self._lines.get(worker.record.model.name)
        if line and worker in self._targets(worker.record.model.name):
            self._serve(worker.record.model.name, line)
        else:
            worker.want_no_credits()

    def _add(self, ticket: Ticket) -> Ticket:
        line = self._lines.setdefault(ticket.model, Line())
        line.add(ticket)
        self._count(ticket, +1)
        self._serve(ticket.model, line)
        return ticket

    def _left(self, ticket: Ticket) -> None:
        self._count(ticket, -1)
        if ticket.held:
            return
        line = self._lines[ticket.model]
        line.removed(ticket)
        self._serve(ticket.model, line)

    def _settle(self, ticket: Ticket, result: Placement | RequestError) -> None:
        ticket.settle(result)
        self._lines[ticket.model].removed(ticket)
        self._count(ticket, -1)

    def _count(self, ticket: Ticket, change: int) -> None:
        priorities = self._priorities[ticket.model]
        priorities[ticket.priority] += change
        if not priorities[ticket.priority]:
            del priorities[ticket.priority]
        metrics.QUEUED_REQUESTS.labels(ticket.model).set(priorities.total())

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

    def _serve_all(self) -> None:
        self._usable.clear()
        self._kept.clear()
        for model, line in self._lines.items():
            if line:
                self._end_hopeless(model, line)
                self._serve(model, line)

    def _end_hopeless(self, model: str, line: Line) -> None:
        """Retries whose last possible workers have gone while others of the model are there."""
        targets = self._possible(model)
        for ticket in line.picky if targets else ():
            if not any(target.possible(ticket.excluded) for target in targets):
                self._settle(ticket, self._router.no_worker(model))

    def _possible(self, model: str) -> list[Target]:
        """Without pairs that decode has refused for good; one that failed may recover."""
        if model not in self._kept:
            lasting = frozenset(PairState) - {PairState.REFUSED}
            kept = [self._with_pairs(target, lasting) for target in self._router.targets(model)]
            self._kept[model] = [target for target in kept if target.aggregated or target.prefills]
        return self._kept[model]

    def _with_pairs(self, target: Target, states: frozenset[PairState]) -> Target:
        state = self._pairs.state
        return replace(target, prefills=tuple(p for p in target.prefills if state(p, target.decode) in states))

    def _serve(self, model: str, line: Line) -> None:
        """Hands out what has come, then asks for what is still needed; a stream's credits come at once."""
        if not self._possible(model):
            if line and model not in self._giving_up:
                loop = asyncio.get_running_loop()
                self._giving_up[model] = loop.call_later(self._ready_timeout, self._give_up, model)
            return
        if (timer := self._giving_up.pop(model, None)) is not None:
            timer.cancel()
        self._hand_out(model, line)
        while True:
            self._ask(model, line)
            if not self._hand_out(model, line):
                return

    def _give_up(self, model: str) -> None:
        del self._giving_up[model]
        error = self._router.no_worker(model)
        for ticket in list(self._lines[model]):
            self._settle(ticket, error)

    def _hand_out(self, model: str, line: Line) -> bool:
        """Gives every credit that has come to the most urgent request; True when there were any."""
        came = False
        for decode in _from(list(self._targets(model)), line.turn):
            while (credit := decode.link.take()) is not None:
                came = True
                if not self._use(line, self._targets(model)[decode], credit):
                    decode.link.give_back(credit)
        return came

    def _use(self, line: Line, target: Target, credit: Credit) -> bool:
        """Spends the credit on a request, or on the proof of its pair."""
        began = time.monotonic()
        ticket = line.first_for(target)
        if ticket is None:
            return False
        line.turn += 1
        if target.aggregated:
            self._settle(ticket, Placement(target.decode, credit=credit, routing=time.monotonic() - began))
            return True
        prefill = self._next_prefill(target, ticket)
        placement = Placement(target.decode, prefill, credit, routing=time.monotonic() - began)
        if self._pairs.state(prefill, target.decode) is PairState.PROVEN:
            self._settle(ticket, placement)
        else:
            # The request stays in the line: it gets the next credit, of this pair or of another.
            self._pairs.begin(placement)
            self._usable.clear()
        return True

    def _next_prefill(self, target: Target, ticket: Ticket) -> Worker:
        """The preferred one, or in turn; each decode worker begins with another, so that one round uses many."""
        prefills = [prefill for prefill in target.prefills if prefill.instance_id not in ticket.excluded]
        decode = target.decode
        for prefill in prefills:
            if prefill.instance_id == ticket.prefers and self._pairs.state(prefill, decode) is PairState.PROVEN:
                return prefill
        turn = self._prefill_turns.get(decode.instance_id)
        if turn is None:
            turn = list(self._targets(decode.record.model.name)).index(decode)
        self._prefill_turns[decode.instance_id] = turn + 1
        return prefills[turn % len(prefills)]

    def _ask(self, model: str, line: Line) -> None:
        wanted = {decode: self._wanted(line, target) for decode, target in self._targets(model).items()}
        free = {worker: min(count, worker.link.free_slots) for worker, count in wanted.items()}
        if sum(free.values()) < len(line):
            for worker, count in wanted.items():
                worker.link.ask(min(count, worker.link.window))
            return
        asks = dict.fromkeys(wanted, 0)
        left = len(line)
        while left:
            for worker in _from(list(wanted), line.turn):
                if left and asks[worker] < free[worker]:
                    asks[worker] += 1
                    left -= 1
        for worker, count in asks.items():
            worker.link.ask(count)

    def _wanted(self, line: Line, target: Target) -> int:
        """Credits that could be used there."""
        count = line.count_for(target)
        if target.aggregated or not count:
            return count
        states = [self._pairs.state(prefill, target.decode) for prefill in target.prefills]
        # Without a proven pair each credit goes into a proof.
        return count if PairState.PROVEN in states else min(count, len(states))

    def _targets(self, model: str) -> dict[Worker, Target]:
        """By decode worker; of its prefill workers those that have handed over to it, or may try to."""
        if model not in self._usable:
            usable = frozenset({PairState.PROVEN, PairState.UNKNOWN})
            self._usable[model] = {
                target.decode: self._with_pairs(target, usable) for target in self._router.targets(model)
            }
        return self._usable[model]


def _from(workers: Sequence[Worker], turn: int) -> list[Worker]:
    start = turn % len(workers) if workers else 0
    return [*workers[start:], *workers[:start]]
