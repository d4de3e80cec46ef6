"""A stage's outcome says everything that was seen, however the stage ends."""

import asyncio
import json
from pathlib import Path

from benchmarks.gpu.outcome import Outcome


async def nothing() -> None:
    """A part that does nothing."""


async def broken() -> None:
    raise RuntimeError("no engine")


async def test_a_part_that_breaks_is_a_failed_check_and_the_next_one_runs() -> None:
    outcome = Outcome("parity")
    await outcome.part("first", broken())
    await outcome.part("second", nothing())
    outcome.check("third", True)
    assert [(each["name"], each["ok"]) for each in outcome.checks] == [("first", False), ("third", True)]
    assert "no engine" in outcome.checks[0]["said"]
    assert not outcome.ok


async def test_a_part_without_time_left_is_skipped_with_its_reason() -> None:
    outcome = Outcome("parity", limit=40.0)
    await outcome.part("long", nothing(), needs=60)
    (check,) = outcome.checks
    assert check["ok"] is None
    assert "it needs 60" in check["said"]


async def test_a_part_that_hangs_is_ended() -> None:
    outcome = Outcome("parity", limit=0.0)
    await outcome.part("forever", asyncio.sleep(3600), needs=-100)
    assert outcome.checks[0]["ok"] is False


def test_nothing_checked_is_no_success() -> None:
    outcome = Outcome("timeline")
    outcome.skip("everything", "no GPU")
    assert not outcome.ok
    assert "skipped" in outcome.text()


def test_the_file_has_checks_numbers_and_where_it_ran(tmp_path: Path) -> None:
    outcome = Outcome("bench")
    outcome.check("rows", True, "3")
    outcome.data["rows"] = [1]
    outcome.write(tmp_path / "bench.json", device="cpu")
    written = json.loads((tmp_path / "bench.json").read_text())
    assert (written["stage"], written["ok"], written["device"], written["rows"]) == ("bench", True, "cpu", [1])
    assert written["checks"] == [{"name": "rows", "ok": True, "said": "3"}]


def test_every_check_is_kept_at_once(tmp_path: Path) -> None:
    outcome = Outcome("parity")
    outcome.keep = lambda: outcome.write(tmp_path / "parity.json")
    outcome.check("first", True)
    outcome.skip("second", "no GPU")
    written = json.loads((tmp_path / "parity.json").read_text())
    assert [each["name"] for each in written["checks"]] == ["first", "second"]
