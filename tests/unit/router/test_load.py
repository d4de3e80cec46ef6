"""What a frontend takes a worker's load to be: its last report and what was sent there since, nothing twice."""

from __future__ import annotations

from kvbaton.v1.health_pb2 import RankLoad
from kvbaton.v1.session_pb2 import LoadReport
from services.frontend.link.load import LegShare, WorkerLoad


def share(load: WorkerLoad, tokens: int = 100, *, rank: int = 0) -> LegShare:
    return LegShare(load, rank, prefill_tokens=tokens, kv_tokens=tokens)


def report(through: int, prefill: int = 0, used: int = 0, running: int = 0, waiting: int = 0) -> LoadReport:
    rank = RankLoad(running_requests=running, waiting_requests=waiting, used_tokens=used, prefill_tokens=prefill)
    return LoadReport(through_leg=through, ranks=[rank])


def state(load: WorkerLoad, rank: int = 0) -> tuple[int, int, int]:
    of = load.ranks[rank]
    return (of.prefill_tokens, of.kv_tokens, of.requests)


def test_a_leg_counts_from_the_choice_of_its_worker() -> None:
    load = WorkerLoad(1)
    share(load)
    share(load)
    assert state(load) == (200, 200, 2)


def test_a_report_covers_the_legs_that_the_worker_had() -> None:
    load = WorkerLoad(1)
    shares = [share(load) for _ in range(3)]
    for number, each in enumerate(shares, 1):
        each.sent(number)
    load.report(report(2, prefill=150, used=220, running=1, waiting=1))
    assert state(load) == (250, 320, 3), "the third is on its way"
    load.report(report(3, prefill=100, used=300, running=3))
    assert state(load) == (100, 300, 3)


def test_what_a_report_has_covered_ends_there_and_not_here() -> None:
    load = WorkerLoad(1)
    leg = share(load)
    leg.sent(1)
    load.report(report(1, used=100, running=1))
    leg.prefilled()
    leg.end()
    assert state(load) == (0, 100, 1)
    load.report(report(1))
    assert state(load) == (0, 0, 0)


def test_without_reports_a_leg_counts_until_it_ends() -> None:
    load = WorkerLoad(1)
    leg = share(load)
    leg.prefilled()
    leg.prefilled()
    assert state(load) == (0, 100, 1)
    leg.end()
    leg.end()
    assert state(load) == (0, 0, 0)


def test_one_that_was_never_sent_is_in_no_report() -> None:
    load = WorkerLoad(1)
    first, second = share(load), share(load)
    second.sent(1)
    load.report(report(1, prefill=100, used=100, running=1))
    assert state(load) == (200, 200, 2)
    first.end()
    assert state(load) == (100, 100, 1)


def test_a_new_session_begins_with_nothing_reported_and_keeps_what_waits_here() -> None:
    load = WorkerLoad(1)
    lost, waits = share(load), share(load)
    lost.sent(7)
    load.report(report(0, prefill=50, used=50, running=1))
    load.reset()
    lost.end()
    assert state(load) == (100, 100, 1)
    load.report(report(7))
    assert state(load) == (100, 100, 1), "numbers of another session cover nothing of this one"
    waits.end()
    assert state(load) == (0, 0, 0)


def test_ranks_are_told_apart_and_one_that_is_left_out_has_nothing_to_do() -> None:
    load = WorkerLoad(2)
    share(load, 10, rank=1)
    load.report(LoadReport(ranks=[RankLoad(dp_rank=0, prefill_tokens=5), RankLoad(dp_rank=1, prefill_tokens=7)]))
    assert (state(load, 0)[0], state(load, 1)[0]) == (5, 17)
    load.report(LoadReport(ranks=[RankLoad(dp_rank=1, prefill_tokens=1), RankLoad(dp_rank=9, prefill_tokens=1)]))
    assert (state(load, 0)[0], state(load, 1)[0]) == (0, 11)
