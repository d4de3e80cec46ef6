"""A stage's result as a section of docs/gpu.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.gpu.moments import MOMENTS, STAGES

Result = dict[str, Any]


def smoke(result: Result) -> str:
    """Tokens and times to first token."""
    rows = [
        (row["input_tokens"], _yes(row["equal"]), _ms(row["ttft_agg_ms"]), _ms(row["ttft_disagg_ms"]))
        for row in result.get("rows", [])
    ]
    return _section(result, _table(("input tokens", "tokens equal", "aggregated", "disaggregated"), rows))


def parity(result: Result) -> str:
    """What was equal, what moved, and the memory in use."""
    compared = [
        (row["name"], row["answers"], row["differ"], row["near_ties"], "exact" if row["exact"] else "near ties allowed")
        for row in result.get("compared", [])
    ]
    parts = [_table(("answers", "compared", "differ", "of them near ties", "promised"), compared)]
    for name, rows in result.get("transfers", {}).items():
        parts.append(f"Bytes from prefill to decode, {name}:\n\n{_transfers(rows)}")
    memory = [
        (each["plan"], each["mode"], gpu["gpu"], f"{gpu['used_mib']:,}", f"{gpu['total_mib']:,}")
        for each in result.get("memory", [])
        for gpu in each["gpus"]
    ]
    if memory:
        parts.append(_table(("engines", "of", "GPU", "MiB in use, of all that runs there", "MiB"), memory))
    return _section(result, *parts)


def faults(result: Result) -> str:
    """Each promise, and how long it took."""
    checks = [(each["name"], _verdict(each["ok"]), each["said"]) for each in result["checks"]]
    seconds = [(name, f"{value:.2f}") for name, value in result.get("seconds", {}).items()]
    return _section(
        result, _table(("promise", "held", "seen"), checks), _table(("what", "seconds"), seconds), skipped=False
    )


def ranks(result: Result) -> str:
    """Each kind of worker, how long it took to start, and each promise."""
    started = [
        (row["plan"], "pairs" if row["mode"] == "disagg" else "aggregated", f"{row['ready_s']:.0f}", row["workers"])
        for row in result.get("rows", [])
    ]
    checks = [(each["name"], _verdict(each["ok"]), each["said"]) for each in result["checks"]]
    return _section(
        result,
        _table(("ranks", "of", "ready s", "workers that answered"), started),
        _table(("promise", "held", "seen"), checks),
        skipped=False,
    )


def bench(result: Result) -> str:
    """A row for each load on each system, and how long workers took to be registered."""
    head = ("load", "system", "requests/s", "TTFT p50 ms", "p99", "ITL p50 ms", "p99", "good share", "good/s", "failed")
    rows = [
        (
            row["load"],
            row["system"],
            f"{row['requests_per_second']:.2f}",
            *(f"{row[name]:.1f}" for name in ("ttft_p50_ms", "ttft_p99_ms")),
            *(f"{row[name]:.2f}" for name in ("itl_p50_ms", "itl_p99_ms", "goodput_share", "good_per_second")),
            row["failed"],
        )
        for row in sorted(result.get("rows", []), key=lambda row: row["load"])
    ]
    against = [
        (
            row["load"],
            row["variant"],
            f"{row['ttft_p50_later_ms']:+.1f} ms",
            f"{row['requests_ratio']:.3f}",
            f"{row['itl_p99_ratio']:.2f}",
            _yes(row["within"]),
        )
        for row in result.get("against_bare", [])
    ]
    ratios = ("Baton against bare SGLang", "variant", "TTFT p50", "requests/s", "ITL p99", "within target")
    penalties = [
        (row["load"], row["system"], f"{row['later_ms']:+.1f} ms", _yes(row["within"]))
        for row in result.get("penalties", [])
    ]
    later = ("a pair against an aggregated worker", "of", "TTFT p50", "within target")
    return _section(result, _table(head, rows), _table(ratios, against), _table(later, penalties), _startups(result))


def timeline(result: Result) -> str:
    """Medians of every moment and stage, by system and length, and the plot."""
    rows = result.get("rows", [])
    names = [f"{row['system']} {row['input_tokens']}" for row in rows]
    moments = [(name, *(_number(row["moments"].get(name)) for row in rows)) for name in MOMENTS]
    stages = [(name, *(_number(row["stages"].get(name)) for row in rows)) for name, _, _ in STAGES]
    return _section(
        result,
        "![Time to first token without prefill's computing](gpu-timeline.svg)",
        _table(("medians, ms since the client sent it", *names), moments),
        _table(("medians of each stage, ms", *names), stages),
        _startups(result),
    )


SECTIONS: dict[str, Callable[[Result], str]] = {
    each.__name__: each for each in (smoke, parity, ranks, faults, bench, timeline)
}


def _section(result: Result, *parts: str, skipped: bool = True) -> str:
    """The parts that have something in them, behind a line that says where and when."""
    on = ", ".join(result.get("gpus") or []) or f"{result['device']}{', simulated' if result.get('simulated') else ''}"
    versions = f", {result['versions']}" if result.get("versions") else ""
    head = (
        f"Measured on {result['when'].split()[0]} on {on}{versions}; {'all held' if result['ok'] else 'NOT all held'}."
    )
    left_out = [f"- not shown: {each['name']}: {each['said']}" for each in result["checks"] if each["ok"] is None]
    failed = [f"- failed: {each['name']}: {each['said']}" for each in result["checks"] if each["ok"] is False]
    lists = "\n".join([*failed, *left_out] if skipped else [])
    return "\n" + "\n\n".join(filter(None, [head, *parts, lists])) + "\n\n"


def _transfers(rows: Sequence[Result]) -> str:
    head = ("input tokens", "MiB", "MiB by telemetry", "writes", "descriptors", "transfer ms", "span ms", "GB/s")
    return _table(
        head,
        [
            (
                row["input_tokens"],
                _number(_mib(row.get("bytes"))),
                _number(_mib(row.get("telemetry_bytes"))),
                *(row.get(name, "") for name in ("writes", "descriptors")),
                *(_number(row.get(name)) for name in ("transfer_ms", "span_ms", "gb_per_s")),
            )
            for row in rows
        ],
    )


def _startups(result: Result) -> str:
    head = ("started", "ready s", "loading (imports, engine) s", "registered s", "beyond loading s")
    keys = ("ready_s", "loading_s", "registered_s", "beyond_s")
    rows = [(row["system"], *(_number(row.get(key)) for key in keys)) for row in result.get("startups", [])]
    return _table(head, rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """In Markdown; nothing without rows."""
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    if not lines:
        return ""
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mib(value: float | None) -> float | None:
    return None if value is None else value / 2**20


def _ms(value: float) -> str:
    return f"{value:.1f} ms"


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def _verdict(ok: bool | None) -> str:
    return {True: "yes", False: "NO", None: "skipped"}[ok]
