"""Requests wait for credits: by priority and arrival, never for a worker that can't serve them, never twice."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import worker_pb2
from services.frontend.dispatch import queue
from services.frontend.dispatch.line import Ticket
from services.frontend.dispatch.pair_checks import PairChecks, PairState
from services.frontend.dispatch.queue import DispatchQueue
from services.frontend.link.load import WorkerLoad
from services.frontend.link.protocol import Credit
from services.frontend.router.hints import NO_HINTS, Hints
from services.frontend.router.kv.index import Holder
from services.frontend.router.placement import Placement, Router, Target
from services.frontend.router.policies.direct import Direct
from services.frontend.router.policies.make import Policies
from services.frontend.router.policies.policy import Candidate, Choice, Policy, Prompt
from services.frontend.router.policies.round_robin import RoundRobin
from services.frontend.router.worker import WorkerRank
from services.requests import Role
from services.telemetry import metrics
from tests.support.waiting import eventually

MODEL = "m"
PROMPT = Prompt([1, 2, 3])


class FakeLink:
    """A worker that grants when the test says so."""

    def __init__(self, free: int, window: int) -> None:
        self.free_slots, self.window = free, window
        self.asked = 0
        self.granted = 0
        self.given_back = 0

    def ask(self, count: int) -> None:
        self.asked = count

    def take(self) -> Credit | None:
        if not self.granted:
            return None
        self.granted -= 1
        return Credit(1)

    def give_back(self, credit: Credit) -> None:
        self.given_back += 1


class EagerLink(FakeLink):
    """A worker whose credits are there as soon as they are asked for, as those of streams and spare ones are."""

    def take(self) -> Credit | None:
        self.granted, self.asked = (1, self.asked - 1) if self.asked else (0, 0)
        return super().take()


class FakeWorker:
    def __init__(
        self, name: str, role: Role, free: int = 0, window: int = 4, model: str = MODEL, dp_size: int = 1
    ) -> None:
        self.instance_id, self.role = name, role
        self.record = worker_pb2.WorkerRecord(
            instance_id=name, incarnation=worker_pb2.Incarnation(uuid=f"{role}/{name}")
        )
        self.record.model.name = model
        self.link = FakeLink(free, window)
        self.load = WorkerLoad(dp_size)
        self.ejected = False
        self.ranks = [
            WorkerRank(cast("Any", self), name, rank, 16, None if role is Role.DECODE else Holder(name, rank), load)
            for rank, load in enumerate(self.load.ranks)
        ]

    def want_no_credits(self) -> None:
        self.link.ask(0)
        while (credit := self.link.take()) is not None:
            self.link.give_back(credit)


class FakeRouter:
    def __init__(self, targets: list[Target]) -> None:
        self.all = targets

    def targets(self, model: str) -> list[Target]:
        return [target for target in self.all if target.decode.record.model.name == model]

    def known(self) -> list[Any]:
        return [worker for target in self.all for worker in target.workers]

    def streaming(self) -> list[Any]:
        return [target.decode for target in self.all]

    def no_worker(self, model: str) -> RequestError:
        return RequestError(cast("Any", None), Reason.NO_WORKER, "none")

    def unmet(self, model: str, hints: Hints) -> RequestError:
        return RequestError(cast("Any", None), Reason.WORKER_NOT_FOUND if hints else Reason.NO_WORKER, "none")


class FakePairs:
    """Pairs are proven unless the test says otherwise."""

    def __init__(self) -> None:
        self.states: dict[tuple[str, str], PairState] = {}
        self.begun: list[Placement] = []
        self.decodes: Callable[[], list[FakeWorker]] = list
        self.listener: Callable[[FakeWorker], None] = lambda decode: None

    def on_change(self, listener: Any) -> None:
        self.listener = listener

    def changed(self) -> None:
        for decode in self.decodes():
            self.listener(decode)

    def state(self, prefill: FakeWorker, decode: FakeWorker) -> PairState:
        return self.states.get((prefill.instance_id, decode.instance_id), PairState.PROVEN)

    def begin(self, placement: Placement) -> None:
        assert placement.prefill is not None
        self.begun.append(placement)
        self.set(placement.prefill.instance_id, placement.decode.instance_id, PairState.CHECKING)

    def set(self, prefill: str, decode: str, state: PairState) -> None:
        self.states[prefill, decode] = state

    def doubt(self, _: set[str]) -> None:
        pass

    def keep_only(self, _: set[str]) -> None:
        pass


class House:
    """A queue in front of some decode workers, which all pair with all prefill workers."""

    def __init__(
        self,
        *decodes: FakeWorker,
        prefills: int = 1,
        limit: int = 100,
        ready_timeout: float = 0.0,
        prefill_policy: Policy | None = None,
        decode_policy: Policy | None = None,
    ) -> None:
        self.decodes = list(decodes)
        self.prefills = [FakeWorker(f"p{number}", Role.PREFILL) for number in range(prefills)]
        targets = [
            Target(cast("Any", decode), () if decode.role is Role.AGGREGATED else tuple(cast("Any", self.prefills)))
            for decode in decodes
        ]
        self.router, self.pairs = FakeRouter(targets), FakePairs()
        self.pairs.decodes = lambda: self.decodes
        router, pairs = cast("Router", self.router), cast("PairChecks", self.pairs)
        policies = Policies(prefill_policy or RoundRobin(), decode_policy or RoundRobin())
        self.queue = DispatchQueue(router, pairs, policies, limit=limit, ready_timeout=ready_timeout)

    def enter(self, model: str = MODEL, *, priority: int = 0, hints: Hints = NO_HINTS) -> Ticket:
        """A request whose prompt needs no tokenizing."""
        return self.enter_all(model, 1, priority=priority, hints=hints)[0]

    def enter_all(
        self, model: str = MODEL, count: int = 1, *, priority: int = 0, hints: Hints = NO_HINTS
    ) -> list[Ticket]:
        """Choices of such a request."""
        tickets = self.queue.enter_all(model, count, priority=priority, hints=hints)
        for ticket in tickets:
            ticket.describe(PROMPT)
        return tickets

    def grant(self, decode: FakeWorker, count: int = 1) -> None:
        decode.link.granted += count
        self.queue.credits_came(cast("Any", decode))

    def asked(self) -> list[int]:
        return [decode.link.asked for decode in self.decodes]


def result(ticket: Ticket) -> Placement | RequestError | None:
    results: list[Placement | RequestError] = []
    ticket.deliver_to(results.append)
    return results[0] if results else None


def placed(ticket: Ticket) -> Placement:
    placement = result(ticket)
    assert isinstance(placement, Placement)
    return placement


def queued() -> float:
    """As the metrics say it."""
    return metrics.QUEUED_REQUESTS.labels(MODEL)._value.get()


def decode(name: str = "d0", *, model: str = MODEL, **values: int) -> FakeWorker:
    return FakeWorker(name, Role.DECODE, model=model, **values)


def test_a_credit_goes_to_the_most_urgent_then_to_the_oldest() -> None:
    house = House(worker := decode())
    first, second = house.enter(), house.enter()
    urgent = house.enter(priority=5)
    served: list[Ticket] = []
    for _ in range(3):
        house.grant(worker)
        served += [t for t in (first, second, urgent) if not t.waiting and t not in served]
    assert served == [urgent, first, second]
    assert isinstance(result(urgent), Placement)


def test_free_workers_are_asked_for_as_many_as_wait() -> None:
    house = House(decode("d0", free=2), decode("d1", free=2))
    house.enter()
    assert sum(house.asked()) == 1
    house.enter()
    house.enter()
    assert sum(house.asked()) == 3


def test_full_workers_are_all_asked_up_to_their_windows() -> None:
    house = House(decode("d0"), decode("d1"))
    for _ in range(6):
        house.enter()
    assert house.asked() == [4, 4]


def test_credits_that_nobody_needs_any_more_go_back() -> None:
    house = House(d0 := decode("d0"), d1 := decode("d1"))
    house.enter()
    house.grant(d0)
    house.grant(d1)
    assert (d0.link.given_back, d1.link.given_back) == (0, 1)
    assert house.asked() == [0, 0]


def test_one_that_leaves_the_line_is_not_asked_for() -> None:
    house = House(worker := decode())
    ticket = house.enter()
    ticket.leave()
    ticket.leave()
    assert (len(house.queue), worker.link.asked) == (0, 0)
    house.grant(worker)
    assert worker.link.given_back == 1


def test_one_that_leaves_with_its_credit_gives_it_back_unless_spent() -> None:
    house = House(worker := decode())
    left, spent = house.enter(), house.enter()
    house.grant(worker, 2)
    left.leave()
    spent.spend()
    spent.leave()
    assert worker.link.given_back == 1


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again() -> None:
    house = House(decode(), limit=2)
    for _ in range(2):
        house.enter()
    with pytest.raises(RequestError) as caught:
        house.enter()
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.retry_after is not None
    assert len(house.queue) == 2


def test_a_more_urgent_request_takes_the_place_of_the_least_urgent() -> None:
    house = House(decode(), limit=2)
    older, younger = house.enter(), house.enter()
    urgent = house.enter(priority=1)
    lost = result(younger)
    assert isinstance(lost, RequestError)
    assert lost.reason is Reason.QUEUE_FULL
    assert (older.waiting, urgent.waiting, len(house.queue)) == (True, True, 2)


def test_one_models_full_line_is_not_anothers() -> None:
    house = House(decode(), other := decode("d1", model="other"), limit=2)
    crowd = [house.enter(priority=-1) for _ in range(2)]
    ticket = house.enter("other", priority=5)
    house.grant(other)
    assert isinstance(result(ticket), Placement)
    assert all(each.waiting for each in crowd), "nobody leaves for a request of another model"
    with pytest.raises(RequestError, match="2 requests for model 'm' wait"):
        house.enter(priority=-1)


def test_places_are_given_all_or_none() -> None:
    house = House(decode(), limit=4)
    house.enter()
    with pytest.raises(RequestError) as caught:
        house.enter_all(MODEL, 4)
    assert caught.value.reason is Reason.QUEUE_FULL
    assert len(house.queue) == 1
    assert len(house.enter_all(MODEL, 3)) == 3
    assert len(house.queue) == 4
    with pytest.raises(RequestError):
        house.enter()


def test_an_urgent_request_for_several_places_takes_so_many_or_none() -> None:
    house = House(decode(), limit=4)
    low = [house.enter() for _ in range(2)]
    equal = [house.enter(priority=1) for _ in range(2)]
    with pytest.raises(RequestError):
        house.enter_all(MODEL, 3, priority=1)
    assert all(ticket.waiting for ticket in (*low, *equal))
    house.enter_all(MODEL, 2, priority=1)
    assert [ticket.waiting for ticket in (*low, *equal)] == [False, False, True, True]


def test_a_held_place_counts_but_has_no_turn_until_it_is_released() -> None:
    house = House(worker := decode(free=4), limit=3)
    first, *held = house.enter_all(MODEL, 3)
    assert worker.link.asked == 1
    with pytest.raises(RequestError):
        house.enter()
    house.grant(worker)
    later = house.enter()
    for ticket in held:
        house.queue.release(ticket)
    assert worker.link.asked == 3
    house.grant(worker, 2)
    assert [ticket.waiting for ticket in (first, *held, later)] == [False, False, False, True], "at its old place"


def test_a_held_place_that_is_left_is_free_and_stays_out_of_line() -> None:
    house = House(worker := decode(), limit=2)
    _, held = house.enter_all(MODEL, 2)
    held.leave()
    held.leave()
    assert len(house.queue) == 1
    house.queue.release(held)
    assert (len(house.queue), worker.link.asked) == (1, 1)


def test_a_preferred_prefill_worker_is_taken_while_its_pair_works() -> None:
    house = House(worker := decode(), prefills=3)
    _, *held = house.enter_all(MODEL, 5)
    house.grant(worker)
    for ticket in held[:3]:
        house.queue.release(ticket, prefers="p1")
        house.grant(worker)
    house.pairs.set("p1", "d0", PairState.FAILED)
    house.pairs.changed()
    house.queue.release(held[3], prefers="p1")
    house.grant(worker)
    chosen = [placement.prefill.instance_id for ticket in held if (placement := placed(ticket)).prefill]
    assert chosen[:3] == ["p1"] * 3
    assert chosen[3] != "p1"


def test_a_retry_waits_at_its_old_place_for_other_workers() -> None:
    house = House(d0 := decode("d0"), d1 := decode("d1"))
    first = house.enter()
    house.grant(d0)
    later = house.enter()
    again = house.queue.enter_again(first, frozenset({"decode/d0"}))
    assert again is not None
    assert house.asked() == [1, 2], "the excluded worker is not asked for it"
    house.grant(d0)
    assert (later.waiting, again.waiting) == (False, True)
    house.grant(d1)
    assert not again.waiting


def test_there_is_no_retry_when_nobody_is_left() -> None:
    house = House(worker := decode())
    ticket = house.enter()
    house.grant(worker)
    assert house.queue.enter_again(ticket, frozenset({"decode/d0"})) is None
    assert house.queue.enter_again(ticket, frozenset({"prefill/p0"})) is None


def test_one_instance_id_in_two_roles_is_two_workers() -> None:
    house = House(worker := decode("p0"))
    ticket = house.enter()
    house.grant(worker)
    assert house.queue.enter_again(ticket, frozenset({"prefill/p1", "decode/d0"})) is not None
    assert house.queue.enter_again(ticket, frozenset({"prefill/p0"})) is None
    assert house.queue.enter_again(ticket, frozenset({"decode/p0"})) is None
    house = House(worker := decode("p0"), decode("d1"))
    ticket = house.enter()
    house.grant(worker)
    assert house.queue.enter_again(ticket, frozenset({"decode/p0"})) is not None


async def test_a_patient_retry_waits_for_the_process_that_takes_the_workers_place() -> None:
    house = House(worker := decode(), prefills=1, ready_timeout=5.0)
    ticket = house.enter()
    house.grant(worker)
    again = house.queue.enter_again(ticket, frozenset({"decode/d0"}), patient=True)
    assert again is not None
    house.queue.workers_changed()
    assert again.waiting, "the one that is still here is on its way out"
    successor = decode(free=1)
    successor.record.incarnation.uuid = "another"
    house.decodes[0] = successor
    house.router.all = [Target(cast("Any", successor), tuple(cast("Any", house.prefills)))]
    house.queue.workers_changed()
    house.grant(successor)
    assert placed(again).decode.record.incarnation.uuid == "another"


async def test_one_whose_worker_was_away_and_is_back_waits_no_longer() -> None:
    """It was the connection that had broken, not the process."""
    house = House(worker := decode(), ready_timeout=5.0)
    ticket = house.enter()
    house.grant(worker)
    every = house.router.all
    house.router.all = []
    house.queue.workers_changed()
    again = house.queue.enter_again(ticket, frozenset({"decode/d0"}), patient=True)
    assert again is not None
    assert result(again) is None
    house.router.all = every
    house.queue.workers_changed()
    house.grant(worker)
    assert placed(again).decode.instance_id == "d0"


async def test_patient_retries_cost_others_nothing() -> None:
    house = House(worker := decode(), other := decode("d1"), ready_timeout=5.0)
    tickets = [house.enter(hints=Hints(decode="d0")) for _ in range(20)]
    house.grant(worker, 20)
    patient = [house.queue.enter_again(each, frozenset({"decode/d0"}), patient=True) for each in tickets]
    assert all(each is not None for each in patient)
    looked = 0
    possible = Target.possible

    def counting(self: Target, *args: Any) -> bool:
        nonlocal looked
        looked += 1
        return possible(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "possible", counting)
        ticket = house.enter()
        house.grant(other)
    assert placed(ticket).decode.instance_id == "d1"
    assert looked < 20, "none of those that wait is asked about the credit"
    assert len(house.queue) == 0


async def test_others_do_not_cut_its_patience_short() -> None:
    house = House(worker := decode(), ready_timeout=1.0)
    first, second = house.enter(), house.enter()
    house.grant(worker)
    house.router.all = []
    house.queue.workers_changed()
    assert result(second) is None
    await asyncio.sleep(0.6)
    again = house.queue.enter_again(first, frozenset({"decode/d0"}), patient=True)
    assert again is not None
    await eventually(lambda: not second.waiting)
    assert isinstance(result(second), RequestError)
    assert again.waiting
    again.leave()


async def test_its_patience_ends() -> None:
    house = House(worker := decode(), ready_timeout=0.05)
    ticket = house.enter()
    house.grant(worker)
    again = house.queue.enter_again(ticket, frozenset({"decode/d0"}), patient=True)
    assert again is not None
    await eventually(lambda: not again.waiting)
    assert isinstance(result(again), RequestError)
    assert (len(house.queue), queued()) == (0, 0)


async def test_a_patient_retry_that_leaves_is_forgotten() -> None:
    house = House(worker := decode(), ready_timeout=5.0)
    ticket = house.enter()
    house.grant(worker)
    assert queued() == 0
    again = house.queue.enter_again(ticket, frozenset({"decode/d0"}), patient=True)
    assert again is not None
    assert queued() == 1
    again.leave()
    assert queued() == 0
    house.router.all = [Target(cast("Any", decode("d1", free=1)), tuple(cast("Any", house.prefills)))]
    house.queue.workers_changed()
    assert result(again) is None
    assert len(house.queue) == 0


async def test_everybody_who_waits_is_told_when_the_last_worker_goes() -> None:
    house = House(decode())
    ticket = house.enter()
    house.router.all = []
    house.queue.workers_changed()
    await asyncio.sleep(0.01)
    gone = result(ticket)
    assert isinstance(gone, RequestError)
    assert gone.reason is Reason.NO_WORKER


async def test_a_worker_that_comes_back_in_time_gets_who_waits() -> None:
    house = House(worker := decode(), ready_timeout=0.05)
    ticket = house.enter()
    targets, house.router.all = house.router.all, []
    house.queue.workers_changed()
    house.router.all = targets
    house.queue.workers_changed()
    await asyncio.sleep(0.1)
    assert ticket.waiting
    house.grant(worker)
    assert not ticket.waiting


def test_every_pair_is_used_in_time() -> None:
    house = House(d0 := decode("d0"), d1 := decode("d1"), prefills=2)
    pairs: list[tuple[str, str]] = []
    for _ in range(4):
        for worker in (d0, d1):
            ticket = house.enter()
            house.grant(worker)
            placement = result(ticket)
            assert isinstance(placement, Placement)
            assert placement.prefill is not None
            pairs.append((placement.prefill.instance_id, placement.decode.instance_id))
    assert len(set(pairs[:2])) == 2
    assert {prefill for prefill, _ in pairs[:2]} == {"p0", "p1"}
    assert len(set(pairs)) == 4


def test_the_first_credit_of_an_unknown_pair_proves_it_and_the_request_gets_the_next() -> None:
    house = House(worker := decode())
    house.pairs.set("p0", "d0", PairState.UNKNOWN)
    tickets = [house.enter() for _ in range(3)]
    assert worker.link.asked == 1, "one credit for the proof"
    house.grant(worker)
    assert len(house.pairs.begun) == 1
    assert all(ticket.waiting for ticket in tickets)
    assert worker.link.asked == 0, "while it is checked nothing can go there"
    house.pairs.set("p0", "d0", PairState.PROVEN)
    house.pairs.changed()
    assert worker.link.asked == 3
    house.grant(worker, 3)
    assert not any(ticket.waiting for ticket in tickets)


def test_a_failed_pair_is_left_alone_while_others_work() -> None:
    house = House(worker := decode(), prefills=2)
    house.pairs.set("p0", "d0", PairState.FAILED)
    for _ in range(4):
        ticket = house.enter()
        house.grant(worker)
        placement = result(ticket)
        assert isinstance(placement, Placement)
        assert placement.prefill is not None
        assert placement.prefill.instance_id == "p1"


def test_requests_wait_while_their_only_pair_has_failed() -> None:
    house = House(worker := decode())
    house.pairs.set("p0", "d0", PairState.FAILED)
    ticket = house.enter()
    assert (ticket.waiting, worker.link.asked) == (True, 0)
    house.pairs.set("p0", "d0", PairState.UNKNOWN)
    house.pairs.changed()
    assert worker.link.asked == 1


def test_a_retry_that_can_not_use_the_only_proven_pair_does_not_spin() -> None:
    house = House(worker := decode(free=4), prefills=2)
    house.pairs.set("p1", "d0", PairState.CHECKING)
    first = house.enter()
    house.grant(worker)
    again = house.queue.enter_again(first, frozenset({"prefill/p0"}))
    assert again is not None
    assert worker.link.asked == 0
    house.grant(worker)
    assert again.waiting
    assert worker.link.given_back == 1


def test_a_retry_whose_last_possible_worker_goes_is_told() -> None:
    house = House(d0 := decode("d0"), decode("d1"))
    first = house.enter()
    house.grant(d0)
    again = house.queue.enter_again(first, frozenset({"decode/d0"}))
    assert again is not None
    house.router.all = house.router.all[:1]
    house.queue.workers_changed()
    assert isinstance(result(again), RequestError)


def test_pairs_that_decode_refuses_for_good_are_no_pairs() -> None:
    house = House(decode())
    house.pairs.set("p0", "d0", PairState.REFUSED)
    house.pairs.changed()
    with pytest.raises(RequestError) as caught:
        house.enter()
    assert caught.value.reason is Reason.NO_WORKER


def test_credits_of_a_worker_that_is_no_target_any_more_go_back() -> None:
    house = House(d0 := decode("d0"), d1 := decode("d1"))
    house.enter()
    house.router.all = house.router.all[1:]
    house.queue.workers_changed()
    house.grant(d0)
    assert d0.link.given_back == 1
    assert d1.link.asked == 1


class Prefer(Policy):
    """Whoever stands first in the list."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.routes: list[str] = []

    def choose(self, candidates: Any, prompt: Prompt, *, partner: str = "") -> Choice:
        return Choice(min(candidates, key=lambda each: (self.names.index(each.instance_id), each.dp_rank)), 2)

    def routed(self, candidate: Candidate, prompt: Prompt) -> None:
        self.routes.append(candidate.instance_id)


class Idlest(Policy):
    """Whoever has the least to do, and of those the first."""

    def choose(self, candidates: Any, prompt: Prompt, *, partner: str = "") -> Choice:
        return Choice(min(candidates, key=lambda each: each.load.tokens))


def test_the_policy_chooses_among_the_workers_that_have_a_free_slot() -> None:
    house = House(decode("d0", free=1), decode("d1", free=1), decode("d2"), decode_policy=Prefer("d2", "d1", "d0"))
    house.enter()
    assert house.asked() == [0, 1, 0]
    house.enter()
    assert house.asked() == [1, 1, 0]


def test_a_chosen_worker_that_has_lost_its_slot_to_others_is_replaced_by_another() -> None:
    house = House(d0 := decode("d0", free=1), d1 := decode("d1", free=1), decode_policy=Prefer("d0", "d1"))
    ticket = house.enter()
    assert house.asked() == [1, 0]
    d0.link.free_slots = 0
    house.grant(d0, 0)
    assert house.asked() == [0, 1]
    d1.link.free_slots = 0
    house.grant(d1, 0)
    assert house.asked() == [1, 1], "nobody is free: the first slot anywhere will do"
    house.grant(d1)
    assert placed(ticket).decode.instance_id == "d1"


def test_a_credit_goes_to_the_request_that_it_was_asked_for() -> None:
    house = House(d0 := decode("d0", free=1), d1 := decode("d1", free=1), decode_policy=Prefer("d0", "d1"))
    first, second = house.enter(), house.enter()
    house.grant(d1)
    assert (first.waiting, second.waiting) == (True, False)
    house.grant(d0)
    assert placed(first).decode.instance_id == "d0"


def test_a_more_urgent_request_takes_a_credit_that_another_one_was_waiting_for() -> None:
    house = House(worker := decode("d0", free=1))
    first = house.enter()
    urgent = house.enter(priority=1)
    worker.link.free_slots = 0
    house.grant(worker)
    assert (first.waiting, urgent.waiting) == (True, False)
    assert house.asked() == [1]


def test_one_whose_prompt_is_being_tokenized_keeps_its_place_and_holds_nobody_up() -> None:
    house = House(worker := decode(free=4), limit=2)
    slow = house.queue.enter(MODEL)
    assert worker.link.asked == 0
    quick = house.enter()
    with pytest.raises(RequestError):
        house.enter()
    house.grant(worker)
    assert (slow.waiting, quick.waiting) == (True, False)
    slow.describe(PROMPT)
    after = house.enter()
    house.grant(worker)
    assert (slow.waiting, after.waiting) == (False, True), "by arrival"


def test_one_that_leaves_before_it_has_a_prompt_is_gone() -> None:
    house = House(worker := decode(free=4))
    ticket = house.queue.enter(MODEL)
    ticket.leave()
    ticket.describe(PROMPT)
    assert (len(house.queue), worker.link.asked) == (0, 0)


def test_an_idle_worker_that_leaves_is_forgotten() -> None:
    worker = decode(free=1)
    house, gone = House(worker), weakref.ref(worker)
    ticket = house.enter()
    house.grant(worker)
    placed(ticket).give_back()
    house.router.all, house.decodes = [], []
    house.queue.workers_changed()
    del worker, ticket
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("news", ["a leg has ended there", "its pair has been proven"])
def test_news_of_a_worker_that_has_left_keeps_nothing_of_it(news: str) -> None:
    """Its link stays open until its last leg has ended."""
    worker, other = decode(free=1), decode("d1", free=1)
    house, gone = House(worker, other), weakref.ref(worker)
    ticket = house.enter()
    house.grant(worker)
    placed(ticket).give_back()
    del house.router.all[0], house.decodes[0]
    house.queue.workers_changed()
    if news == "a leg has ended there":
        house.grant(worker, 0)
    else:
        house.pairs.listener(worker)
    del worker, ticket
    gc.collect()
    assert gone() is None


async def test_nothing_is_kept_of_a_worker_that_was_asked_and_has_left() -> None:
    worker = decode()
    house, gone = House(worker, ready_timeout=5.0), weakref.ref(worker)
    ticket = house.enter()
    assert worker.link.asked == 1
    house.router.all, house.decodes = [], []
    house.queue.workers_changed()
    ticket.leave()
    del worker
    gc.collect()
    assert gone() is None


def test_what_was_asked_for_a_request_that_had_to_go_is_asked_for_no_longer() -> None:
    house = House(worker := decode(free=2), limit=2)
    for _ in range(2):
        house.enter()
    assert worker.link.asked == 2
    house.queue.enter(MODEL, priority=1)  # its prompt is not known yet
    assert worker.link.asked == 1


def test_a_burst_between_two_reports_spreads() -> None:
    decodes = [decode(f"d{number}", free=32, window=32) for number in range(4)]
    house = House(*decodes, prefills=4, prefill_policy=Idlest(), decode_policy=Idlest())
    tickets = [house.enter() for _ in range(32)]
    assert house.asked() == [8, 8, 8, 8], "before any credit has come"
    for worker in decodes:
        house.grant(worker, 8)
    used = [placed(ticket) for ticket in tickets]
    for count in range(4):
        assert sum(each.prefill is house.prefills[count] for each in used) == 8
        assert sum(each.decode is decodes[count] for each in used) == 8


def test_load_is_counted_once_for_each_leg_and_goes_when_the_request_goes() -> None:
    house = House(worker := decode(free=4), prefill_policy=Prefer("p0"))
    prefill = house.prefills[0]
    ticket = house.enter()
    assert (worker.load.ranks[0].prefill_tokens, worker.load.ranks[0].kv_tokens) == (0, 3)
    house.grant(worker)
    assert worker.load.ranks[0].kv_tokens == 3
    assert (prefill.load.ranks[0].prefill_tokens, prefill.load.ranks[0].kv_tokens) == (1, 3), "two are in the cache"
    ticket.leave()
    assert worker.load.ranks[0].tokens == prefill.load.ranks[0].tokens == 0
    waiting = house.enter()
    waiting.leave()
    assert worker.load.ranks[0].requests == 0


def test_load_follows_a_request_from_the_chosen_worker_to_the_one_that_takes_it() -> None:
    house = House(d0 := decode("d0", free=1), d1 := decode("d1"), decode_policy=Prefer("d0", "d1"))
    house.enter()
    d0.link.free_slots = 0
    house.grant(d0, 0)
    assert (d0.load.ranks[0].requests, d1.load.ranks[0].requests) == (0, 0)
    house.grant(d1)
    assert (d0.load.ranks[0].requests, d1.load.ranks[0].requests) == (0, 1)


def test_a_rank_is_chosen_with_its_worker() -> None:
    class Last(Policy):
        def choose(self, candidates: Any, prompt: Prompt, *, partner: str = "") -> Choice:
            return Choice(candidates[-1])

    house = House(worker := decode(free=4, dp_size=3), prefill_policy=Last(), decode_policy=Last())
    house.prefills[0].__init__("p0", Role.PREFILL, dp_size=2)
    ticket = house.enter()
    house.grant(worker)
    assert (placed(ticket).prefill_rank, placed(ticket).decode_rank) == (1, 2)


def test_policies_hear_of_what_really_goes_where() -> None:
    prefill, streaming = Prefer("p1", "p0"), Prefer("d0")
    house = House(worker := decode(free=4), prefills=2, prefill_policy=prefill, decode_policy=streaming)
    house.pairs.set("p1", "d0", PairState.UNKNOWN)
    house.enter()
    house.grant(worker)
    assert prefill.routes == [], "the credit went into the proof of the pair"
    house.grant(worker)
    assert (prefill.routes, streaming.routes) == (["p0"], ["d0"])


def test_an_aggregated_worker_is_chosen_by_the_decode_policy() -> None:
    agg = FakeWorker("a0", Role.AGGREGATED, free=4)
    house = House(decode("d0", free=4), agg, prefills=1, decode_policy=Prefer("a0", "d0"))
    ticket = house.enter()
    house.grant(agg)
    assert placed(ticket).prefill is None
    assert (agg.load.ranks[0].prefill_tokens, agg.load.ranks[0].kv_tokens) == (1, 3)


def test_named_workers_are_taken_under_every_policy() -> None:
    house = House(
        decode("d0", free=4),
        d1 := decode("d1", free=4),
        prefills=2,
        prefill_policy=Prefer("p0", "p1"),
        decode_policy=Prefer("d0", "d1"),
    )
    ticket = house.enter(hints=Hints("p1", "d1"))
    assert house.asked() == [0, 1]
    house.grant(d1)
    placement = placed(ticket)
    assert placement.prefill is not None
    assert (placement.prefill.instance_id, placement.decode.instance_id) == ("p1", "d1")


def test_one_that_names_a_full_worker_waits_for_that_one_alone() -> None:
    house = House(decode("d0", free=4), d1 := decode("d1"))
    ticket = house.enter(hints=Hints(decode="d1"))
    other = house.enter()
    assert house.asked() == [1, 1]
    house.grant(house.decodes[0])
    assert (ticket.waiting, other.waiting) == (True, False)
    house.grant(d1)
    assert not ticket.waiting


def test_a_name_that_nobody_has_is_refused_at_once() -> None:
    house = House(decode("d0", free=4))
    with pytest.raises(RequestError) as caught:
        house.enter(hints=Hints(prefill="p7"))
    assert caught.value.reason is Reason.WORKER_NOT_FOUND
    assert len(house.queue) == 0


def test_one_whose_named_worker_goes_while_it_waits_is_told() -> None:
    house = House(decode("d0"), decode("d1"))
    ticket = house.enter(hints=Hints(decode="d1"))
    house.router.all = house.router.all[:1]
    house.queue.workers_changed()
    assert isinstance(result(ticket), RequestError)


def test_one_whose_named_worker_went_while_it_was_held_is_told_at_its_turn() -> None:
    house = House(decode("d0"), decode("d1"))
    _, held = house.enter_all(count=2, hints=Hints(decode="d0"))
    del house.router.all[0]
    house.queue.workers_changed()
    house.queue.release(held)
    error = result(held)
    assert isinstance(error, RequestError)
    assert error.reason is Reason.WORKER_NOT_FOUND
    assert len(house.queue) == 0


def test_a_named_worker_that_has_failed_a_request_is_not_replaced() -> None:
    house = House(d0 := decode("d0", free=4), decode("d1", free=4))
    ticket = house.enter(hints=Hints(decode="d0"))
    house.grant(d0)
    assert house.queue.enter_again(ticket, frozenset({"decode/d0"})) is None


def test_under_the_policy_direct_every_request_names_its_workers() -> None:
    direct = Direct(random.Random(0))
    house = House(worker := decode(free=4), prefills=2, prefill_policy=direct, decode_policy=direct)
    for hints, field in ((NO_HINTS, "decode_worker"), (Hints(decode="d0"), "prefill_worker")):
        with pytest.raises(RequestError) as caught:
            house.enter(hints=hints)
        assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, field)
    ticket = house.enter(hints=Hints("p1", "d0"))
    house.grant(worker)
    assert not ticket.waiting


class Slots:
    """What really happens at some workers, with other frontends beside this one."""

    def __init__(self, house: House, each: int) -> None:
        self.house, self.each = house, each
        self.taken = dict.fromkeys(house.decodes, 0)

    def free(self, worker: FakeWorker) -> int:
        return self.each - self.taken[worker]

    def settle(self) -> None:
        """Every worker says what is free and grants what it is asked for, until nothing is left to say."""
        for _ in range(10):
            for worker in self.house.decodes:
                granted = min(worker.link.asked, self.free(worker))
                worker.link.asked -= granted
                self.taken[worker] += granted
                worker.link.free_slots = self.free(worker)
                self.house.grant(worker, granted)
                self.taken[worker] -= worker.link.given_back
                worker.link.given_back = 0


def up_to_date(house: House) -> None:
    """Nothing is left to plan or to ask for, also at workers that weren't looked at this time."""
    line = house.queue._lines[MODEL]
    assert len(line._openly) == (
        (len(house.decodes) if line._crowded else min(8, len(house.decodes))) if line.open else 0
    )
    for worker, usable in house.queue._targets.usable(MODEL).items():
        room = usable.within(worker.link.free_slots) - line.chosen(worker)
        fitting = [ticket for ticket in line.open.all() if ticket.fits(usable.target)]
        assert room >= 0
        assert not (room and fitting)
        asked_for = [ticket for ticket in fitting if ticket.picky or worker in line._openly]
        wanted = usable.within(line.chosen(worker) + (line._widest if line._crowded else len(asked_for)))
        assert cast("Any", worker.link).asked == min(wanted, worker.link.window)


class Life:
    """What can happen to a queue, at random: requests, slots, credits and pairs."""

    def __init__(self, rng: random.Random, workers: int) -> None:
        self.rng = rng
        windows = [rng.choice((1, 2, 2, 5, 20)) for _ in range(workers)]
        self.decodes = [decode(f"d{n}", free=rng.randrange(wide + 1), window=wide) for n, wide in enumerate(windows)]
        for worker in self.decodes:
            if rng.random() < 0.3:
                worker.link = EagerLink(worker.link.free_slots, worker.link.window)
        self.house = House(*self.decodes, prefills=2, limit=1000)
        self.waiting: list[Ticket] = []
        for worker in self.decodes:
            for prefill in self.house.prefills:
                state = rng.choice((PairState.PROVEN, PairState.PROVEN, PairState.UNKNOWN, PairState.FAILED))
                self.house.pairs.set(prefill.instance_id, worker.instance_id, state)

    def step(self) -> None:
        self.rng.choice(
            (self.enter, self.enter, self.name, self.again, self.leave, self.slots, self.grant, self.pair)
        )()
        self.waiting = [ticket for ticket in self.waiting if ticket.waiting]

    def enter(self) -> None:
        crowd = 30 if self.rng.random() < 0.02 else 3
        self.waiting += [self.house.enter(priority=self.rng.randrange(2)) for _ in range(self.rng.randrange(crowd))]

    def name(self) -> None:
        hints = Hints(self.rng.choice(("", "p0", "p1")), self.rng.choice(self.decodes).instance_id)
        with contextlib.suppress(RequestError):  # they may never pair
            self.waiting.append(self.house.enter(hints=hints))

    def again(self) -> None:
        if self.waiting:
            failed = self.waiting.pop()
            without = frozenset({f"{Role.DECODE}/{self.rng.choice(self.decodes).instance_id}"})
            again = self.house.queue.enter_again(failed, without)
            self.waiting += [] if again is None else [again]
            failed.leave()

    def leave(self) -> None:
        if self.waiting:
            self.waiting.pop(self.rng.randrange(len(self.waiting))).leave()

    def slots(self) -> None:
        worker = self.rng.choice(self.decodes)
        worker.link.free_slots = self.rng.randrange(worker.link.window + 1)
        self.house.grant(worker, 0)

    def grant(self) -> None:
        """More than it was asked for, sometimes."""
        worker = self.rng.choice(self.decodes)
        granted = self.rng.randrange(worker.link.asked + 2)
        worker.link.asked = max(0, worker.link.asked - granted)
        self.house.grant(worker, granted)

    def pair(self) -> None:
        worker, prefill = self.rng.choice(self.decodes), self.rng.choice(self.house.prefills)
        failed = (
            self.rng.choice((PairState.FAILED, PairState.REFUSED)) if prefill.instance_id == "p1" else PairState.FAILED
        )
        state = self.rng.choice((PairState.PROVEN, PairState.UNKNOWN, failed))
        self.house.pairs.set(prefill.instance_id, worker.instance_id, state)
        self.house.pairs.listener(worker)


async def test_whatever_happens_every_worker_is_asked_for_what_could_go_there() -> None:
    rng = random.Random(11)
    for workers in 30 * [5, 12]:
        life = Life(rng, workers)
        for _ in range(80):
            life.step()
            assert len(life.house.queue) == len(life.waiting)
            if life.waiting:
                up_to_date(life.house)
        for ticket in life.waiting:
            ticket.leave()
        assert (len(life.house.queue), sum(life.house.asked())) == (0, 0)


def test_workers_that_have_not_changed_are_not_looked_at() -> None:
    """There may be hundreds, and many requests a second."""
    house = House(*(decode(f"d{n}", free=8, window=8) for n in range(50)))
    house.enter().leave()
    asked: list[FakeLink] = []
    for worker in house.decodes:
        worker.link.ask = partial(lambda link, count: asked.append(link), worker.link)  # type: ignore[method-assign]
    ticket = house.enter()
    assert len(asked) == 1
    ticket.leave()
    assert asked == [asked[0]] * 2


async def test_of_many_full_workers_a_few_are_asked() -> None:
    """Each is told of every request that comes or goes."""
    house = House(*(decode(f"d{n}", window=8) for n in range(30)))
    first, second = house.enter(), house.enter()
    asked = [worker for worker in house.decodes if worker.link.asked]
    assert (len(asked), sum(house.asked())) == (8, 16)
    house.grant(asked[0])
    assert placed(first).decode is asked[0]
    assert sum(house.asked()) == 8
    second.leave()
    assert sum(house.asked()) == 0


async def test_all_of_many_full_workers_are_asked_while_a_crowd_waits() -> None:
    """For all that they have: then nobody has to be told when one more comes or goes."""
    house = House(*(decode(f"d{n}", window=10) for n in range(30)), limit=1000)
    waiting = [house.enter() for _ in range(9)]
    assert sum(worker.link.asked > 0 for worker in house.decodes) == 8
    waiting.append(house.enter())
    assert house.asked() == [10] * 30
    house.grant(house.decodes[0])
    for ticket in waiting[1:5]:
        ticket.leave()
    assert house.asked() == [10] * 30
    waiting[5].leave()
    assert sorted(house.asked()) == [0] * 22 + [4] * 8
    for ticket in waiting[6:]:
        ticket.leave()
    assert sum(house.asked()) == 0


async def test_others_get_their_turn_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_TURN_SECONDS", 0.01)
    house = House(*(decode(f"d{n}", window=8) for n in range(30)))
    ticket = house.enter()
    seen: set[str] = set()

    def all_seen() -> bool:
        asked = [worker.instance_id for worker in house.decodes if worker.link.asked]
        assert len(asked) == 8
        seen.update(asked)
        return len(seen) == 30

    await eventually(all_seen)
    ticket.leave()
    assert sum(house.asked()) == 0
    await asyncio.sleep(0.05)
    assert not house.queue._turns, "nobody waits"


async def test_a_slot_that_falls_free_where_nobody_asked_is_used() -> None:
    house = House(*(decode(f"d{n}", window=8) for n in range(30)))
    ticket = house.enter()
    other = next(worker for worker in house.decodes if not worker.link.asked)
    other.link.free_slots = 1
    house.grant(other, 0)
    assert [worker for worker in house.decodes if worker.link.asked] == [other]
    house.grant(other)
    assert placed(ticket).decode is other


async def test_whom_a_request_names_is_asked_among_many() -> None:
    house = House(*(decode(f"d{n}", window=8) for n in range(30)))
    anywhere = [house.enter() for _ in range(2)]
    other = next(worker for worker in house.decodes if not worker.link.asked)
    named = house.enter(hints=Hints(decode=other.instance_id))
    assert other.link.asked == 1
    assert sum(house.asked()) == 17
    house.grant(other)
    assert (named.waiting, [ticket.waiting for ticket in anywhere]) == (True, [False, True]), "the older one took it"
    assert other.link.asked == 1
    house.grant(other, 2)
    assert placed(named).decode is other


def test_no_slot_idles_while_a_request_waits_whatever_happens() -> None:
    rng = random.Random(7)
    for _ in range(20):
        house = House(*(decode(f"d{n}", free=3) for n in range(3)), prefill_policy=Idlest(), decode_policy=Idlest())
        slots, waiting = Slots(house, 3), list[Ticket]()
        for _ in range(60):
            worker = rng.choice(house.decodes)
            match rng.choice(("enter", "enter", "leave", "a request has ended", "another frontend was quicker")):
                case "enter":
                    waiting.append(house.enter(priority=rng.randrange(2)))
                case "leave" if waiting:
                    waiting.pop(rng.randrange(len(waiting))).leave()
                case "a request has ended" if slots.taken[worker]:
                    slots.taken[worker] -= 1
                case "another frontend was quicker" if slots.free(worker):
                    slots.taken[worker] += 1
                case _:
                    pass
            slots.settle()
            waiting = [ticket for ticket in waiting if ticket.waiting]
            assert not (waiting and any(map(slots.free, house.decodes)))
            assert len(house.queue) == len(waiting)
        for ticket in waiting:
            ticket.leave()
        assert (len(house.queue), house.asked()) == (0, [0, 0, 0])
