"""scripts/loadgen.sh and what it reads out of the generators' reports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.tools import tool
from tests.unit.deploy.conftest import ROOT

SCRIPT = ROOT / "scripts" / "loadgen.sh"
RESULTS = ROOT / "scripts" / "loadgen_results.py"
REQUESTS = 40

Report = dict[str, Any]


def aiperf(answered: int, **more: object) -> Report:
    report: Report = {
        "request_count": {"avg": float(answered)},
        "request_throughput": {"avg": 12.5},
        "time_to_first_token": {"p50": 30.0, "p99": 90.0},
        "inter_token_latency": {"p50": 2.0},
        "error_summary": [],
        "is_complete": True,
        "was_cancelled": False,
    }
    return report | more


def guidellm(successful: int, errored: int = 0, incomplete: int = 0) -> Report:
    totals = {"successful": successful, "errored": errored, "incomplete": incomplete}
    times = {"successful": {"median": 30.0, "mean": 12.5, "percentiles": {"p99": 90.0}}}
    metrics = {
        "request_totals": totals,
        "requests_per_second": times,
        "time_to_first_token_ms": times,
        "inter_token_latency_ms": times,
    }
    failures = [{"info": {"error": "400 Bad Request"}}] * errored
    return {"benchmarks": [{"metrics": metrics, "requests": {"errored": failures}}]}


def results(tmp_path: Path, generator: str, report: Report | str, status: int = 0) -> subprocess.CompletedProcess[str]:
    name = "profile_export_aiperf.json" if generator == "aiperf" else "report.json"
    (tmp_path / name).write_text(report if isinstance(report, str) else json.dumps(report))
    command = [sys.executable, RESULTS, generator, tmp_path, f"--requests={REQUESTS}", f"--status={status}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run([tool("shellcheck"), "-x", SCRIPT], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "arguments",
    [[], ["--help", "aiperf"], ["locust"], ["aiperf", "--url", "http://h:1"], ["aiperf", "--requests", "0"]],
)
def test_it_says_how_it_is_used(arguments: list[str]) -> None:
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == (0 if "--help" in arguments else 2 if not arguments or arguments == ["locust"] else 1)
    assert done.stdout or done.stderr


@pytest.mark.parametrize("generator", ["aiperf", "guidellm"])
def test_the_versions_are_the_same_everywhere(generator: str) -> None:
    found = re.search(rf"{generator.upper()}=([\d.]+)", SCRIPT.read_text())
    assert found is not None
    pinned = f"{generator}=={found[1]}"
    for suffix in ("in", "txt"):
        assert pinned in (ROOT / "requirements" / f"loadgen-{generator}.{suffix}").read_text()
    assert f"{generator} {found[1]}" in (ROOT / "docs" / "load-generators.md").read_text()


@pytest.mark.parametrize(("generator", "report"), [("aiperf", aiperf(REQUESTS)), ("guidellm", guidellm(REQUESTS))])
def test_a_run_without_failures_is_a_line_of_numbers(tmp_path: Path, generator: str, report: Report) -> None:
    done = results(tmp_path, generator, report)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[1:6] == ["40", "0", "12.5", "30.0", "90.0"]


@pytest.mark.parametrize(
    ("generator", "report", "status", "said"),
    [
        ("aiperf", aiperf(39, error_summary=[{"count": 1, "error_details": {"code": 400}}]), 0, "1 x {'code': 400}"),
        ("aiperf", aiperf(REQUESTS, was_cancelled=True), 0, "incomplete"),
        ("aiperf", aiperf(REQUESTS - 1), 0, "39 of 40"),
        ("aiperf", aiperf(REQUESTS), 1, "exit status 1"),
        ("aiperf", "{", 1, "no usable profile_export_aiperf.json"),
        ("guidellm", guidellm(0, errored=REQUESTS), 0, "400 Bad Request"),
        ("guidellm", guidellm(38, incomplete=2), 0, "38 of 40"),
        ("guidellm", {"benchmarks": []}, 0, "no usable report.json"),
    ],
)
def test_any_failed_request_fails_the_run(
    tmp_path: Path, generator: str, report: Report | str, status: int, said: str
) -> None:
    done = results(tmp_path, generator, report, status)
    assert done.returncode == 1
    assert said in done.stdout
