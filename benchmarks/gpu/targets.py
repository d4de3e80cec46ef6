"""What a bench's rows say of the targets, load by load: against bare SGLang's pair, and against aggregated workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

MORE_TTFT_MS = 3.0
LEAST_REQUESTS = 0.98
MOST_ITL = 1.1
MOST_PENALTY_MS = 5.0
"""At concurrency 1 the first token comes at most so much later; under load at least so many requests a second, and the
99th percentile of the gaps at most so much longer."""


def against_bare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each load that both have, by variant: differences, ratios, and whether they are within the targets."""
    return list(_compared(rows))


def _compared(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    systems = {(row["system"].split("+")[0], row["variant"], row["load"]): row for row in rows}
    for (system, variant, load), ours in systems.items():
        bare = systems.get(("bare", variant, load))
        if system != "baton" or bare is None:
            continue
        later = ours["ttft_p50_ms"] - bare["ttft_p50_ms"]
        requests = _ratio(ours["requests_per_second"], bare["requests_per_second"])
        gaps = _ratio(ours["itl_p99_ms"], bare["itl_p99_ms"])
        alone = "c=1" in load.split()
        within = later <= MORE_TTFT_MS if alone else requests >= LEAST_REQUESTS and gaps <= MOST_ITL
        yield {
            "load": load,
            "variant": variant,
            "ttft_p50_later_ms": later,
            "requests_ratio": requests,
            "itl_p99_ratio": gaps,
            "within": within,
        }


def penalties(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much later the first token comes than from an aggregated worker, one request at a time on engines at rest.

    Baton's pair against Baton's aggregated workers, bare SGLang's against bare ones.
    """
    ttft = {(row["system"], row["load"]): row["ttft_p50_ms"] for row in rows}
    found: list[dict[str, Any]] = []
    for (system, load), pair in ttft.items():
        aggregated = ttft.get((f"{system}-agg", load))
        if aggregated is not None and load.endswith("c=1 idle"):
            later = pair - aggregated
            found.append({"system": system, "load": load, "later_ms": later, "within": later <= MOST_PENALTY_MS})
    return found


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else 0.0
