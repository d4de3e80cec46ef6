"""A bench's rows: goodput counts what finished in time, of all that was asked."""

from array import array

import pytest

from benchmarks.gpu.load import OBJECTIVES
from benchmarks.gpu.rows import Measured, Round, goodput_share, table
from services.tools.bench.results import Results
from services.tools.bench.samples import Kind, Outcome, Sample


def sample(index: int, ttft: float, gap: float, kind: Kind = Kind.FINISHED) -> Sample:
    times = [ttft + gap * number for number in range(4)]
    return Sample(
        index,
        start=0.0,
        ended=times[-1],
        times=array("d", times),
        tokens=array("I", [1, 1, 1, 1]),
        outcome=Outcome(kind),
    )


def turn(*samples: Sample) -> Round:
    measured = Round(Results(OBJECTIVES))
    measured.results.begin(0.0)
    for each in samples:
        measured.results.add(each)
        measured.samples.append(each)
    return measured


def test_good_requests_are_soon_and_steady_ones_that_finished() -> None:
    good, late, jerky = sample(0, 0.5, 0.01), sample(1, 1.5, 0.01), sample(2, 0.5, 0.06)
    failed = sample(3, 0.5, 0.01, Kind.ERROR)
    row = Measured("500/4 c=1", "baton", [turn(good, late, jerky, failed)]).row()
    assert row["goodput_share"] == pytest.approx(1 / 4)
    assert row["good_per_second"] == pytest.approx(1 / 1.53)
    assert (row["finished"], row["failed"]) == (3, 1)


def test_without_requests_nothing_is_good() -> None:
    assert goodput_share([]) == 0


def test_the_table_has_a_line_for_each_row() -> None:
    row = Measured("500/4 c=1", "baton", [turn(sample(0, 0.5, 0.01))]).row()
    heading, line = table([row]).splitlines()
    assert heading.split()[:3] == ["load", "system", "req/s"]
    assert line.startswith("500/4 c=1")
