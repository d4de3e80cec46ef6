"""A request's timeline, from lines that the probe wrote in a run of real engines on a CPU.

`created` and `api_server_dispatch` were put in later, as long before `scheduler_recv` as in another such run.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.moments import MOMENTS, STAGES, complete, middle, moments, stages
from benchmarks.gpu.transfers import ProbeLines, moved

CAPTURED = Path(__file__).with_name("probe.jsonl")
SENT, FIRST = 1795411455.28, 1795411457.03


@pytest.fixture
def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in CAPTURED.read_text().splitlines()]


def test_every_moment_is_found(lines: list[dict[str, Any]]) -> None:
    found = moments(SENT, FIRST, 0.004, lines)
    assert list(found) == list(MOMENTS)
    assert found["dispatched"] == pytest.approx(4.0, abs=0.01)
    assert found["prefill_entered"] == pytest.approx(13.0, abs=0.1)
    assert found["prefill_received"] == pytest.approx(14.2, abs=0.1)
    assert found["first_token"] == pytest.approx(1750, abs=0.1)
    assert found["prefill_finished"] < found["transfer_finished"] < found["transfer_seen"] < found["decode_started"]


def test_the_stages_add_up_to_the_time_to_first_token(lines: list[dict[str, Any]]) -> None:
    assert sum(stages([moments(SENT, FIRST, None, lines)]).values()) == pytest.approx((FIRST - SENT) * 1e3)
    assert all(before[2] == after[1] for before, after in pairwise(STAGES))


def test_a_canary_is_not_the_request(lines: list[dict[str, Any]]) -> None:
    canary = [line for line in lines if line.get("room") == 0]
    assert canary
    assert not complete(canary)
    assert list(moments(SENT, FIRST, None, canary)) == ["first_token"]


def test_a_request_is_complete_when_both_engines_have_told(lines: list[dict[str, Any]]) -> None:
    assert complete(lines)
    assert not complete([line for line in lines if line.get("role") != "decode"])


def test_the_middle_is_of_moments_that_all_requests_have() -> None:
    requests = [{"prefill_started": 1.0, "first_token": 5.0}, {"first_token": 7.0}, {"first_token": 6.0}]
    assert middle(requests) == {"first_token": 6.0}
    assert middle([]) == {}


def test_what_a_request_moved(lines: list[dict[str, Any]]) -> None:
    found = moved(lines)
    assert found is not None
    # SmolLM2 in float32: 19 pages of 737 280 bytes, and the first token with what belongs to it.
    assert (found.writes, found.bytes, found.descriptors) == (2, 19 * 737_280 + 1600, 70)
    assert found.transfer_ms == pytest.approx(4.527)
    assert found.span_ms == pytest.approx(4.801, abs=0.001)
    assert found.gb_per_s == pytest.approx(3.09, abs=0.01)


def test_no_write_no_transfer(lines: list[dict[str, Any]]) -> None:
    assert moved([line for line in lines if line["event"] == "request"]) is None


def test_lines_are_read_once_and_whole(tmp_path: Path) -> None:
    probe, path = ProbeLines(tmp_path), tmp_path / "1.jsonl"
    path.write_text('{"event": "posted", "time": 1}\n{"event": "pos')
    assert [line["time"] for line in probe.new()] == [1]
    assert probe.new() == []
    with path.open("a") as file:
        file.write('ted", "time": 2}\n')
    assert [line["time"] for line in probe.new()] == [2]
