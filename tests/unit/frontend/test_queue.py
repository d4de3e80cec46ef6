"""Requests wait for credits: by priority and arrival, never for a worker that can't serve them, never twice."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import worker_pb2
from services.frontend.dispatch.line import Ticket
from services.frontend.dispatch.pair_checks import PairChecks, PairState
from services.frontend.dispatch.queue import DispatchQueue
from services.frontend.link.protocol import Credit
from services.frontend.router.placement import Placement, Router, Target
from services.requests import Role

MODEL = "m"


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


class FakeWorker:
    def __init__(self, name: str, role: Role, free: int = 0, window: int = 4, model: str = MODEL) -> None:
        self.instance_id, self.role = name, role
        self.record = worker_pb2.WorkerRecord(instance_id=name, incarnation=worker_pb2.Incarnation(uuid=name))
        self.record.model.name = model
        self.link = FakeLink(free, window)

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


class FakePairs:
    """Pairs are proven unless the test says otherwise."""

    def __init__(self) -> None:
        self.states: dict[tuple[str, str], PairState] = {}
        self.begun: list[Placement] = []
        self.changed = lambda: None

    def on_change(self, listener: Any) -> None:
        self.changed = listener

    def state(self, prefill: FakeWorker, decode: FakeWorker) -> PairState:
        return self.states.get((prefill.instance_id, decode.instance_id), PairState.PROVEN)

    def begin(self, placement: Placement) -> None:
        assert placement.prefill is not None
        self.begun.append(placement)
        self.set(placement.prefill.instance_id, placement.decode.instance_id, PairState.CHECKING)

    def set(self, prefill: str, decode: str, state: PairState) -> None:
        self.states[prefill, decode] = state

    def keep_only(self, _: set[str]) -> None:
        pass


class House:
    """A queue in front of some decode workers, which all pair with all prefill workers."""

    def __init__(self, *decodes: FakeWorker, prefills: int = 1, limit: int = 100, ready_timeout: float = 0.0) -> None:
        self.decodes = list(decodes)
        self.prefills = [FakeWorker(f"p{number}", Role.PREFILL) for number in range(prefills)]
        targets = [Target(cast("Any", decode), tuple(cast("Any", self.prefills))) for decode in decodes]
        self.router, self.pairs = FakeRouter(targets), FakePairs()
        router, pairs = cast("Router", self.router), cast("PairChecks", self.pairs)
        self.queue = DispatchQueue(router, pairs, limit=limit, ready_timeout=ready_timeout)

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


def decode(name: str = "d0", *, model: str = MODEL, **values: int) -> FakeWorker:
    return FakeWorker(name, Role.DECODE, model=model, **values)


def test_a_credit_goes_to_the_most_urgent_then_to_the_oldest() -> None:
    house = House(worker := decode())
    first, second = house.queue.enter(MODEL), house.queue.enter(MODEL)
    urgent = house.queue.enter(MODEL, priority=5)
    served: list[Ticket] = []
    for _ in range(3):
        house.grant(worker)
        served += [t for t in (first, second, urgent) if not t.waiting and t not in served]
    assert served == [urgent, first, second]
    assert isinstance(result(urgent), Placement)


def test_free_workers_are_asked_for_as_many_as_wait() -> None:
    house = House(decode("d0", free=2), decode("d1", free=2))
    house.queue.enter(MODEL)
    assert sum(house.asked()) == 1
    house.queue.enter(MODEL)
    house.queue.enter(MODEL)
    assert sum(house.asked()) == 3


def test_full_workers_are_all_asked_up_to_their_windows() -> None:
    house = House(decode("d0"), decode("d1"))
    for _ in range(6):
        house.queue.enter(MODEL)
    assert house.asked() == [4, 4]


def test_credits_that_nobody_needs_any_more_go_back() -> None:
    house = House(d0 := decode("d0"), d1 := decode("d1"))
    house.queue.enter(MODEL)
    house.grant(d0)
    house.grant(d1)
    assert (d0.link.given_back, d1.link.given_back) == (0, 1)
    assert house.asked() == [0, 0]


def test_one_that_leaves_the_line_is_not_asked_for() -> None:
    house = House(worker := decode())
    ticket = house.queue.enter(MODEL)
    ticket.leave()
    ticket.leave()
    assert (len(house.queue), worker.link.asked) == (0, 0)
    house.grant(worker)
    assert worker.link.given_back == 1


def test_one_that_leaves_with_its_credit_gives_it_back_unless_spent() -> None:
    house = House(worker := decode())
    left, spent = house.queue.enter(MODEL), house.queue.enter(MODEL)
    house.grant(worker, 2)
    left.leave()
    spent.spend()
    spent.leave()
    assert worker.link.given_back == 1


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again() -> None:
    house = House(decode(), limit=2)
    for _ in range(2):
        house.queue.enter(MODEL)
    with pytest.raises(RequestError) as caught:
        house.queue.enter(MODEL)
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.retry_after is not None
    assert len(house.queue) == 2


def test_a_more_urgent_request_takes_the_place_of_the_least_urgent() -> None:
    house = House(decode(), limit=2)
    older, younger = house.queue.enter(MODEL), house.queue.enter(MODEL)
    urgent = house.queue.enter(MODEL, priority=1)
    lost = result(younger)
    assert isinstance(lost, RequestError)
    assert lost.reason is Reason.QUEUE_FULL
    assert (older.waiting, urgent.waiting, len(house.queue)) == (True, True, 2)


def test_one_models_full_line_is_not_anothers() -> None:
    house = House(decode(), other := decode("d1", model="other"), limit=2)
    crowd = [house.queue.enter(MODEL, priority=-1) for _ in range(2)]
    ticket = house.queue.enter("other", priority=5)
    house.grant(other)
    assert isinstance(result(ticket), Placement)
    assert all(each.waiting for each in crowd), "nobody leaves for a request of another model"
    with pytest.raises(RequestError, match="2 requests for model 'm' wait"):
        house.queue.enter(MODEL, priority=-1)


def test_places_are_given_all_or_none() -> None:
    house = House(decode(), limit=4)
    house.queue.enter(MODEL)
    with pytest.raises(RequestError) as caught:
        house.queue.enter_all(MODEL, 4)
    assert caught.value.reason is Reason.QUEUE_FULL
    assert len(house.queue) == 1
    assert len(house.queue.enter_all(MODEL, 3)) == 3
    assert len(house.queue) == 4
    with pytest.raises(RequestError):
        house.queue.enter(MODEL)


def test_an_urgent_request_for_several_places_takes_so_many_or_none() -> None:
    house = House(decode(), limit=4)
    low = [house.queue.enter(MODEL) for _ in range(2)]
    equal = [house.queue.enter(MODEL, priority=1) for _ in range(2)]
    with pytest.raises(RequestError):
        house.queue.enter_all(MODEL, 3, priority=1)
    assert all(ticket.waiting for ticket in (*low, *equal))
    house.queue.enter_all(MODEL, 2, priority=1)
    assert [ticket.waiting for ticket in (*low, *equal)] == [False, False, True, True]


def test_a_held_place_counts_but_has_no_turn_until_it_is_released() -> None:
    house = House(worker := decode(free=4), limit=3)
    first, *held = house.queue.enter_all(MODEL, 3)
    assert worker.link.asked == 1
    with pytest.raises(RequestError):
        house.queue.enter(MODEL)
    house.grant(worker)
    later = house.queue.enter(MODEL)
    for ticket in held:
        house.queue.release(ticket)
    assert worker.link.asked == 3
    house.grant(worker, 2)
    assert [ticket.waiting for ticket in (first, *held, later)] == [False, False, False, True], "at its old place"


def test_a_held_place_that_is_left_is_free_and_stays_out_of_line() -> None:
    house = House(worker := decode(), limit=2)
    _, held = house.queue.enter_all(MODEL, 2)
    held.leave()
    held.leave()
    assert len(house.queue) == 1
    house.queue.release(held)
    assert (len(house.queue), worker.link.asked) == (1, 1)


def test_a_preferred_prefill_worker_is_taken_while_its_pair_works() -> None:
    house = House(worker := decode(), prefills=3)
    _, *held = house.queue.enter_all(MODEL, 5)
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
    first = house.queue.enter(MODEL)
    house.grant(d0)
    later = house.queue.enter(MODEL)
    again = house.queue.enter_again(first, frozenset({"d0"}))
    assert again is not None
    assert house.asked() == [1, 2], "the excluded worker is not asked for it"
    house.grant(d0)
    assert (later.waiting, again.waiting) == (False, True)
    house.grant(d1)
    assert not again.waiting


def test_there_is_no_retry_when_nobody_is_left() -> None:
    house = House(worker := decode())
    ticket = house.queue.enter(MODEL)
    house.grant(worker)
    assert house.queue.enter_again(ticket, frozenset({"d0"})) is None
    assert house.queue.enter_again(ticket, frozenset({"p0"})) is None


async def test_everybody_who_waits_is_told_when_the_last_worker_goes() -> None:
    house = House(decode())
    ticket = house.queue.enter(MODEL)
    house.router.all = []
    house.queue.workers_changed()
    await asyncio.sleep(0.01)
    gone = result(ticket)
    assert isinstance(gone, RequestError)
    assert gone.reason is Reason.NO_WORKER


async def test_a_worker_that_comes_back_in_time_gets_who_waits() -> None:
    house = House(worker := decode(), ready_timeout=0.05)
    ticket = house.queue.enter(MODEL)
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
            ticket = house.queue.enter(MODEL)
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
    tickets = [house.queue.enter(MODEL) for _ in range(3)]
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
        ticket = house.queue.enter(MODEL)
        house.grant(worker)
        placement = result(ticket)
        assert isinstance(placement, Placement)
        assert placement.prefill is not None
        assert placement.prefill.instance_id == "p1"


def test_requests_wait_while_their_only_pair_has_failed() -> None:
    house = House(worker := decode())
    house.pairs.set("p0", "d0", PairState.FAILED)
    ticket = house.queue.enter(MODEL)
    assert (ticket.waiting, worker.link.asked) == (True, 0)
    house.pairs.set("p0", "d0", PairState.UNKNOWN)
    house.pairs.changed()
    assert worker.link.asked == 1


def test_a_retry_that_can_not_use_the_only_proven_pair_does_not_spin() -> None:
    house = House(worker := decode(free=4), prefills=2)
    house.pairs.set("p1", "d0", PairState.CHECKING)
    first = house.queue.enter(MODEL)
    house.grant(worker)
    again = house.queue.enter_again(first, frozenset({"p0"}))
    assert again is not None
    assert worker.link.asked == 0
    house.grant(worker)
    assert again.waiting
    assert worker.link.given_back == 1


def test_a_retry_whose_last_possible_worker_goes_is_told() -> None:
    house = House(d0 := decode("d0"), decode("d1"))
    first = house.queue.enter(MODEL)
    house.grant(d0)
    again = house.queue.enter_again(first, frozenset({"d0"}))
    assert again is not None
    house.router.all = house.router.all[:1]
    house.queue.workers_changed()
    assert isinstance(result(again), RequestError)


def test_pairs_that_decode_refuses_for_good_are_no_pairs() -> None:
    house = House(decode())
    house.pairs.set("p0", "d0", PairState.REFUSED)
    house.pairs.changed()
    with pytest.raises(RequestError) as caught:
        house.queue.enter(MODEL)
    assert caught.value.reason is Reason.NO_WORKER


def test_credits_of_a_worker_that_is_no_target_any_more_go_back() -> None:
    house = House(d0 := decode("d0"), d1 := decode("d1"))
    house.queue.enter(MODEL)
    house.router.all = house.router.all[1:]
    house.queue.workers_changed()
    house.grant(d0)
    assert d0.link.given_back == 1
    assert d1.link.asked == 1
