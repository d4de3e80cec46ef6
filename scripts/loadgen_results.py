#!/usr/bin/env python3
"""What one run of a load generator came to: a line of numbers, and exit status 1 if any request failed (loadgen.sh)."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = "{:<16} {:>8} {:>7} {:>8} {:>10} {:>10} {:>10}  {}"


@dataclass(frozen=True, slots=True)
class Results:
    """Times in milliseconds; None where the route has no such thing. `problem` is empty when all went well."""

    answered: int
    failed: int
    per_second: float | None = None
    ttft_p50: float | None = None
    ttft_p99: float | None = None
    itl_p50: float | None = None
    problem: str = ""


def of_aiperf(report: dict[str, Any]) -> Results:
    """From profile_export_aiperf.json."""
    errors = report.get("error_summary") or []
    problem = "; ".join(f"{each.get('count')} x {_short(each.get('error_details'))}" for each in errors)
    if not problem and (report.get("was_cancelled") or not report.get("is_complete", True)):
        problem = "the run is incomplete"
    return Results(
        answered=int(_number(report, "request_count", "avg") or 0),
        failed=sum(int(each.get("count", 1)) for each in errors),
        per_second=_number(report, "request_throughput", "avg"),
        ttft_p50=_number(report, "time_to_first_token", "p50"),
        ttft_p99=_number(report, "time_to_first_token", "p99"),
        itl_p50=_number(report, "inter_token_latency", "p50"),
        problem=problem,
    )


def of_guidellm(report: dict[str, Any]) -> Results:
    """From the file of `--output kind=json`, with one benchmark."""
    (benchmark,) = report["benchmarks"]
    metrics = benchmark["metrics"]
    totals = metrics["request_totals"]
    failed = [each.get("info", {}).get("error") for each in benchmark["requests"].get("errored") or []]
    ttft, itl = (_successful(metrics, name) for name in ("time_to_first_token_ms", "inter_token_latency_ms"))
    streamed = ttft.get("median") or None
    return Results(
        answered=totals["successful"],
        failed=totals["errored"] + totals["incomplete"],
        per_second=_successful(metrics, "requests_per_second").get("mean"),
        ttft_p50=streamed,
        ttft_p99=ttft.get("percentiles", {}).get("p99") if streamed else None,
        itl_p50=itl.get("median") if streamed else None,
        problem=_short(failed[0]) if failed else "",
    )


def read(generator: str, folder: Path, requests: int, status: int) -> Results:
    """The results of a run that was to send `requests` and ended with `status`."""
    name, parse = {"aiperf": ("profile_export_aiperf.json", of_aiperf), "guidellm": ("report.json", of_guidellm)}[
        generator
    ]
    try:
        results = parse(json.loads((folder / name).read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Results(0, requests, problem=f"no usable {name}: {_short(error)} (exit status {status})")
    if results.problem or (results.answered == requests and not results.failed and status == 0):
        return results
    problem = f"{results.answered} of {requests} requests answered, exit status {status}"
    return Results(results.answered, requests - results.answered, problem=problem)


def _number(report: dict[str, Any], metric: str, statistic: str) -> float | None:
    value = (report.get(metric) or {}).get(statistic)
    return float(value) if value is not None else None


def _successful(metrics: dict[str, Any], name: str) -> dict[str, Any]:
    return (metrics.get(name) or {}).get("successful") or {}


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 160 else text[:157] + "..."


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--header", action="store_true")
    parser.add_argument("generator", nargs="?", choices=("aiperf", "guidellm"))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--status", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.header:
        print(COLUMNS.format("run", "answered", "failed", "req/s", "TTFT p50", "TTFT p99", "ITL p50", "(times in ms)"))
        return 0
    results = read(arguments.generator, arguments.folder, arguments.requests, arguments.status)
    times = (results.per_second, results.ttft_p50, results.ttft_p99, results.itl_p50)
    cells = (arguments.folder.name, results.answered, results.failed, *map(_cell, times), results.problem)
    print(COLUMNS.format(*cells).rstrip(), flush=True)
    return 1 if results.problem or results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
