"""What a key uses, counted by several processes: in files here, as they would."""

from __future__ import annotations

from pathlib import Path

from services.frontend.access.rates import RequestRate
from services.frontend.access.usage import SharedUsages, forget_usage


def test_what_runs_in_one_process_counts_in_the_other(tmp_path: Path) -> None:
    one, two = SharedUsages(tmp_path, 1, 2)("team-a"), SharedUsages(tmp_path, 2, 2)("team-a")
    one.add(1)
    two.add(2)
    assert (one.running, two.running) == (3, 3)
    one.add(-1)
    assert two.running == 2
    assert SharedUsages(tmp_path, 1, 2)("team-b").running == 0


def test_a_process_that_takes_anothers_place_runs_nothing_yet(tmp_path: Path) -> None:
    one, two = SharedUsages(tmp_path, 1, 2)("a"), SharedUsages(tmp_path, 2, 2)("a")
    one.add(3)
    two.add(1)
    assert SharedUsages(tmp_path, 2, 2)("a").running == 3


def test_what_ran_in_a_process_that_has_ended_does_not_wait_for_its_successor(tmp_path: Path) -> None:
    one, two = SharedUsages(tmp_path, 1, 2)("a"), SharedUsages(tmp_path, 2, 2)("a")
    one.add(3)
    two.add(1)
    forget_usage(tmp_path, 1)
    assert two.running == 1
    forget_usage(tmp_path / "nobody's", 1)


def test_a_key_that_comes_back_still_has_what_runs(tmp_path: Path) -> None:
    usages = SharedUsages(tmp_path, 1, 1)
    usages("a").add(1)
    assert usages("a").running == 1


def test_a_rate_is_one_bucket(tmp_path: Path) -> None:
    one, two = (RequestRate(4, SharedUsages(tmp_path, number, 2)("a").full_at) for number in (1, 2))
    now = 1e6
    assert [each.take(now) for each in (one, two, one, two)] == [0.0] * 4
    assert one.remaining(now) == 0
    assert two.take(now) > 0
    assert two.take(now + 15) == 0.0
    assert one.take(now + 15) > 0
