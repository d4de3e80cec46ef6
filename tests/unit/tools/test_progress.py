"""What is shown while a cluster starts."""

import io

from services.tools.progress import Board, Row, line, lines, show
from services.tools.terminal import columns, duration


def test_one_line_per_change_of_phase_and_none_for_the_same_phase_again():
    stream = io.StringIO()
    board = lines(stream)
    for phase in ("starting", "starting", "loading", "loading"):
        board.set("prefill", phase, "pid 7")
    written = stream.getvalue().splitlines()
    assert [text.split("] ")[1].split() for text in written] == [
        ["prefill", "starting", "pid", "7"],
        ["prefill", "loading", "pid", "7"],
    ]


def test_a_stream_that_is_no_terminal_gets_plain_lines():
    stream = io.StringIO()
    with show(stream) as board:
        board.set("etcd", "serving", done=True)
    assert "\x1b" not in stream.getvalue()
    assert "etcd" in stream.getvalue()


def test_a_line_says_since_when_and_how_long():
    row = Row("decode", "routable", "gRPC 127.0.0.1:50062", began=100.0, ended=112.5)
    assert line(row, 13.0, 200.0) == "[  13.0 s] decode       routable after 12.5 s  gRPC 127.0.0.1:50062"


def test_the_clock_stops_when_done_and_starts_again_with_the_next_phase():
    board = Board()
    board.set("frontend", "serving", done=True)
    row = board.rows["frontend"]
    assert row.seconds(row.began + 1000) < 1
    board.set("frontend", "stopping")
    assert row.ended is None
    assert row.seconds(row.began + 7) == 7


def test_the_clock_of_something_that_is_over_at_once_never_runs_backwards():
    board = Board()
    board.set("etcd", "serving", done=True)
    board.set("etcd", "stopped", done=True)
    assert board.rows["etcd"].seconds(0.0) >= 0


def test_a_closed_terminal_stops_nothing():
    stream = io.StringIO()
    stream.close()
    lines(stream).set("prefill", "starting")


def test_columns_are_aligned_without_trailing_blanks():
    assert columns([["a", "bb", ""], ["ccc", "d", "e"]]) == ["a    bb", "ccc  d   e"]
    assert columns([]) == []


def test_durations_for_people():
    assert [duration(seconds) for seconds in (0.4, 59, 61, 7500, 100_000)] == [
        "0 s", "59 s", "1 m 1 s", "2 h 5 m", "1 d 3 h",
    ]  # fmt: skip
