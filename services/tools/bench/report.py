"""A run as numbers: a short table for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import os
import platform
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import grpc
from google.protobuf import json_format

from kvbaton.v1 import model_pb2
from services.tools.bench.monitor import CPU_LIMIT, LAG_LIMIT, Monitor
from services.tools.bench.options import BenchFlags
from services.tools.bench.results import Results
from services.tools.bench.samples import Kind
from services.tools.bench.statistics import PERCENTILES, Distribution
from services.tools.terminal import columns
from services.version import own_version

SCHEMA = 1
_LATENCIES = {
    "ttft": "TTFT",
    "itl": "ITL",
    "tpot": "TPOT",
    "message_gap": "message gap",
    "e2e": "E2E",
    "send_lag": "send lag",
}


@dataclass(frozen=True, slots=True)
class Report:
    """A run that has ended, or that Ctrl-C has ended (`interrupted`)."""

    flags: BenchFlags
    run: str
    started: datetime
    model: model_pb2.ModelInfo
    results: Results
    warmup: Results
    monitor: Monitor
    interrupted: bool

    @property
    def unexpected_errors(self) -> int:
        """Requests that failed in a way that --expect-errors doesn't name; warm-up included."""
        expected = self.flags.expected_errors
        return sum(
            count
            for results in (self.warmup, self.results)
            for outcome, count in results.errors()
            if not expected & {outcome.code, outcome.reason}
        )

    @property
    def succeeded(self) -> bool:
        """Every error was an expected one."""
        return self.unexpected_errors == 0

    def per_second(self, amount: float) -> float:
        """Over the measured time."""
        return amount / self.results.elapsed if self.results.elapsed > 0 else 0.0

    def warnings(self) -> list[str]:
        """What makes the numbers doubtful."""
        found: list[str] = []
        lag = self.monitor.loop_lag().percentiles[-1]
        if lag > LAG_LIMIT:
            found.append(
                f"the generator's own event loop ran {lag * 1000:.0f} ms late at p99 (limit {LAG_LIMIT * 1000:.0f}): "
                "these results measure the generator; send less, or from several processes"
            )
        if self.monitor.cpu_share > CPU_LIMIT:
            found.append(
                f"the generator used {100 * self.monitor.cpu_share:.0f} % of a core (limit {100 * CPU_LIMIT:.0f}), and "
                "one is all it can use: these results may measure the generator"
            )
        if errors := self.warmup.count(Kind.ERROR):
            found.append(f"{errors} of {len(self.warmup)} warm-up requests failed")
        return found

    def as_text(self) -> str:
        """The table."""
        blocks = [self._head(), columns([*self._outcome_rows(), *self._rate_rows()]), self._latency_table()]
        return "\n\n".join("\n".join(block) for block in blocks if block)

    def as_json(self) -> dict[str, object]:
        """Everything; durations in seconds, NaN and unknown values as null."""
        results = self.results
        report: dict[str, object] = {
            "schema": SCHEMA,
            "run": self.run,
            "started_at": self.started.isoformat(timespec="seconds"),
            "seed": self.flags.seed,
            "configuration": configuration(self.flags),
            "environment": environment(self.model),
            "interrupted": self.interrupted,
            "succeeded": self.succeeded,
            "elapsed": _rounded(results.elapsed),
            "outcomes": self._outcomes_json(),
            "throughput": self._throughput_json(),
            "latency": {name: distribution_json(results.latency(name)) for name in _LATENCIES},
            "goodput": self._goodput_json(),
            "generator": {
                "cpu_share": _rounded(self.monitor.cpu_share),
                "loop_lag": distribution_json(self.monitor.loop_lag()),
            },
            "warmup": {"sent": len(self.warmup), "errors": self.warmup.count(Kind.ERROR)},
            "warnings": self.warnings(),
        }
        if self.flags.json_requests:
            report["requests"] = [row.as_json() for row in results.rows()]
        return report

    def _outcomes_json(self) -> dict[str, object]:
        results = self.results
        return {
            "sent": len(results),
            **{kind.value: results.count(kind) for kind in Kind},
            "unexpected_errors": self.unexpected_errors,
            "cancels_planned": results.cancels_planned,
            "finish_reasons": {o.reason: n for o, n in results.outcomes.items() if o.kind is Kind.FINISHED},
            "errors": [
                {"code": o.code, "reason": o.reason, "count": n, "example": results.examples.get(o)}
                for o, n in results.errors()
            ],
        }

    def _throughput_json(self) -> dict[str, object]:
        results = self.results
        finished = results.count(Kind.FINISHED)
        output, prompts = results.total("output_tokens"), results.total("prompt_tokens")
        return {
            "requests_per_second": _rounded(self.per_second(finished)),
            "sent_per_second": _rounded(self.per_second(len(results))),
            "output_tokens_per_second": _rounded(self.per_second(output)),
            "input_tokens_per_second": _rounded(self.per_second(prompts)),
            "output_tokens": output,
            "input_tokens": prompts,
            "cached_input_tokens": results.total("cached_tokens"),
            "messages": results.total("messages"),
        }

    def _goodput_json(self) -> dict[str, object] | None:
        if not self.flags.objectives:
            return None
        return {
            "objectives": {objective.metric: objective.seconds for objective in self.flags.objectives},
            "good": self.results.good,
            "share": _rounded(self._good_share),
            "requests_per_second": _rounded(self.per_second(self.results.good)),
        }

    @property
    def _good_share(self) -> float:
        """Of the requests that could have been good: those that finished or failed."""
        judged = self.results.count(Kind.FINISHED) + self.results.count(Kind.ERROR)
        return self.results.good / judged if judged else 0.0

    def _head(self) -> list[str]:
        flags = self.flags
        loop = (
            f"open loop, {flags.rate:g} requests/s" if flags.open_loop else f"closed loop, {flags.in_flight} in flight"
        )
        lengths = f"text file, OSL {flags.osl}" if flags.text_file else f"ISL {_span(flags)}, OSL {flags.osl}"
        name = self.model.model.name or "no model"
        ended = ", interrupted" if self.interrupted else ""
        return [f"{name} at {flags.client.endpoint}: {loop}, {lengths}, seed {flags.seed}{ended}"]

    def _outcome_rows(self) -> list[list[str]]:
        results = self.results
        counts = [f"{results.count(kind)} {kind.value}" for kind in Kind if results.count(kind)]
        rows = [["requests", f"{len(results)} in {results.elapsed:.2f} s: {', '.join(counts) or 'none'}"]]
        for outcome, number in results.errors():
            example = results.examples.get(outcome, "")
            rows.append(["  error", f"{number} {outcome.code} {outcome.reason}: {example}"])
        return rows

    def _rate_rows(self) -> list[list[str]]:
        results = self.results
        finished, output = results.count(Kind.FINISHED), results.total("output_tokens")
        rates = (
            f"{self.per_second(finished):.2f} requests/s, {self.per_second(output):.1f} output tokens/s, "
            f"{self.per_second(results.total('prompt_tokens')):.1f} input tokens/s"
        )
        rows = [["throughput", rates]]
        if self.flags.objectives:
            good = f"{self.per_second(results.good):.2f} requests/s, {100 * self._good_share:.1f} % of them"
            rows.append(["goodput", f"{good} ({self.flags.goodput})"])
        lag = self.monitor.loop_lag().percentiles[-1]
        rows.append(["generator", f"{100 * self.monitor.cpu_share:.0f} % of a core, loop lag p99 {lag * 1000:.1f} ms"])
        return rows

    def _latency_table(self) -> list[str]:
        heading = ["ms", "mean", *(f"p{share}" for share in PERCENTILES), "max", "samples"]
        rows: list[list[str]] = []
        for name, shown in _LATENCIES.items():
            found = self.results.latency(name)
            if not found.count or (name == "send_lag" and not self.flags.open_loop):
                continue
            values = (found.mean, *found.percentiles, found.maximum)
            rows.append([shown, *(f"{value * 1000:.2f}" for value in values), str(found.count)])
        return columns([heading, *rows]) if rows else []


def distribution_json(found: Distribution) -> dict[str, object]:
    """Seconds; null when nothing was counted."""
    values: dict[str, float] = {
        "mean": found.mean,
        **{f"p{share}": value for share, value in zip(PERCENTILES, found.percentiles, strict=True)},
        "max": found.maximum,
    }
    return {"count": found.count, **{name: _rounded(v) if found.count else None for name, v in values.items()}}


def configuration(flags: BenchFlags) -> dict[str, object]:
    """Every flag as it was in effect, TLS files aside."""
    given: dict[str, object] = {
        field.name: getattr(flags, field.name) for field in dataclasses.fields(flags) if field.name != "client"
    }
    effective: dict[str, object] = {
        "endpoint": flags.client.endpoint,
        "tls": flags.tls() is not None,
        "loop": "open" if flags.open_loop else "closed",
        "concurrency": None if flags.open_loop else flags.in_flight,
        "requests": _finite(flags.request_limit),
        "duration": _finite(flags.duration_limit),
        "isl": None if flags.text_file else _span(flags),
    }
    return {name: str(v) if isinstance(v, Path) else v for name, v in (given | effective).items()}


def environment(model: model_pb2.ModelInfo) -> dict[str, object]:
    """Versions of both sides, and what the model is."""
    served = json_format.MessageToDict(model, preserving_proto_field_name=True)
    return {
        "kvbaton": own_version(),
        "python": platform.python_version(),
        "grpc": grpc.__version__,
        "cpus": os.cpu_count(),
        "platform": platform.platform(terse=True),
        "served": served,
    }


def _span(flags: BenchFlags) -> str:
    span = flags.input_length
    return str(span.low) if span.low == span.high else f"{span.low}:{span.high}"


def _finite(value: float) -> float | None:
    return None if value == float("inf") else value


def _rounded(value: float) -> float:
    return round(value, 6)
