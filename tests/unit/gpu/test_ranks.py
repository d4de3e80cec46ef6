"""Which rank had which rooms, from the probe's lines."""

from typing import Any

from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.ranks import DATA, TENSOR, TWO_PAIRS, check_rooms, processes, rooms_by_process


def line(process: str, role: str, room: int) -> dict[str, Any]:
    return {"event": "request", "process": process, "role": role, "room": room}


def test_the_ranks_of_a_plan() -> None:
    assert [(plan.tp, plan.dp, plan.workers) for plan in (TWO_PAIRS, TENSOR, DATA)] == [(1, 1, 2), (2, 1, 1), (1, 2, 1)]


def test_rooms_are_told_by_role_and_process_without_canaries() -> None:
    lines = [
        line("1", "prefill", 4),
        line("1", "prefill", 0),
        line("2", "decode", 4),
        {"event": "written", "process": "3"},
    ]
    assert rooms_by_process(lines) == {"prefill": {"1": [4]}, "decode": {"2": [4]}}
    assert processes(lines, "written") == {"3"}


def test_rooms_at_the_wrong_rank_and_ranks_without_any_are_failures() -> None:
    decode = [line("3", "decode", 5), line("4", "decode", 6)]
    good = [line("1", "prefill", 5), line("1", "prefill", 7), line("2", "prefill", 6), *decode]
    for lines, verdicts in (
        (good, [True, True]),
        ([*good, line("2", "prefill", 9)], [False, True]),
        ([line("1", "prefill", 5), *decode], [False, False]),
    ):
        outcome = Outcome("ranks")
        check_rooms(DATA, lines, outcome)
        assert [each["ok"] for each in outcome.checks] == verdicts
