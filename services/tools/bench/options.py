"""The flags of `kvbaton bench`, and what contradicts what."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from services.config.flags import flag, group
from services.tools.bench.samples import GOODPUT_METRICS
from services.tools.client_flags import ClientFlags
from services.transport import TlsConfig

Number = TypeVar("Number", int, float)

DEFAULT_CONCURRENCY = 8
DEFAULT_REQUESTS, DEFAULT_DURATION = 100, 60.0
DEFAULT_ISL = "128"


@dataclass(frozen=True, slots=True)
class Range(Generic[Number]):
    """Uniform between two bounds, both included."""

    low: Number
    high: Number


class Objective(NamedTuple):
    """A finished request is good when this metric is at most so many seconds."""

    metric: str
    seconds: float


@dataclass(frozen=True, slots=True)
class BenchFlags:
    """What is sent, how fast, for how long, and what is reported."""

    rate: float | None = flag(None, "open loop: requests per second, as a Poisson process, whatever is in flight")
    concurrency: int | None = flag(
        None, f"closed loop: requests in flight; {DEFAULT_CONCURRENCY} when --rate is not given either"
    )
    requests: int | None = flag(
        None,
        f"stop sending after so many; without --duration and --requests: {DEFAULT_REQUESTS}, "
        f"{DEFAULT_DURATION:g} s at most",
    )
    duration: float | None = flag(None, "stop sending after so many seconds; what runs then may end")
    isl: str | None = flag(
        None, f"input tokens, the shared prefix included: N, or LOW:HIGH; {DEFAULT_ISL} if not given"
    )
    osl: str = flag("32", "output tokens: N, or LOW:HIGH")
    text_file: Path | None = flag(None, "prompts from a file, one a line, instead of random token ids")
    prefix_count: int = flag(0, "so many shared prefixes; each prompt begins with one of them")
    prefix_length: int = flag(0, "tokens of each shared prefix")
    prefix_zipf: float = flag(1.0, "exponent of the Zipf law by which prefixes are chosen; 0 is uniform")
    cancel_rate: float = flag(0.0, "share of the requests that are cancelled, 0 to 1")
    cancel_after: str = flag(
        "", "when, in seconds after sending: LOW:HIGH; if not given, uniformly over the mean duration seen so far"
    )
    model: str = flag("", "needed where several are served")
    ignore_eos: bool = flag(True, "answers have exactly --osl tokens")
    temperature: float = flag(0.0, "0 is greedy")
    seed: int = flag(0, "of prompts, lengths, arrivals and cancellations")
    warmup: int = flag(0, "requests that are sent first and not measured")
    timeout: float = flag(600.0, "seconds of one request, as its gRPC deadline")
    channels: int = flag(1, "connections, used in turn")
    goodput: str = flag("", f"objectives in seconds, as ttft=1.0,itl_p99=0.05; of {', '.join(GOODPUT_METRICS)}")
    expect_errors: str = flag(
        "", "gRPC codes or reasons, separated by commas, that are reported but leave the exit status 0"
    )
    json: Path | None = flag(None, "file for the report as JSON")
    json_requests: bool = flag(False, "with a row for each request (with --json)")
    client: ClientFlags = group(ClientFlags)

    def __post_init__(self) -> None:
        if self.rate is not None and self.concurrency is not None:
            raise ValueError("--rate (open loop) and --concurrency (closed loop) exclude each other")
        self._check_bounds()
        self._check_prompts()
        if self.cancel_after and not self.cancel_rate:
            raise ValueError("--cancel-after needs --cancel-rate")
        if self.json_requests and self.json is None:
            raise ValueError("--json-requests needs --json")
        if self.json is not None and (self.json.is_dir() or not self.json.absolute().parent.is_dir()):
            raise ValueError(f"--json: not a file in an existing folder: {self.json}")
        # Reading them is checking them.
        _ = self.output_length, self.cancel_window, self.objectives, self.tls()

    def _check_bounds(self) -> None:
        for name, value in (("rate", self.rate), ("duration", self.duration), ("timeout", self.timeout)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name}: {value:g} is not more than 0")
        for name, count, least in (
            ("concurrency", self.concurrency, 1),
            ("requests", self.requests, 1),
            ("channels", self.channels, 1),
            ("warmup", self.warmup, 0),
            ("prefix-count", self.prefix_count, 0),
            ("prefix-length", self.prefix_length, 0),
        ):
            if count is not None and count < least:
                raise ValueError(f"--{name}: {count} is less than {least}")
        for name, number, most in (
            ("cancel-rate", self.cancel_rate, 1.0),
            ("temperature", self.temperature, math.inf),
            ("prefix-zipf", self.prefix_zipf, math.inf),
        ):
            if not 0 <= number <= most:
                limit = "less than 0" if most == math.inf else f"not in 0 to {most:g}"
                raise ValueError(f"--{name}: {number:g} is {limit}")

    def _check_prompts(self) -> None:
        if self.text_file is not None:
            if self.isl is not None or self.prefix_count or self.prefix_length:
                raise ValueError("--text-file has the prompts: --isl and --prefix-... don't go with it")
            return
        if bool(self.prefix_count) != bool(self.prefix_length):
            raise ValueError("--prefix-count and --prefix-length go together")
        if self.prefix_length >= self.input_length.low:
            raise ValueError(f"--prefix-length: {self.prefix_length} leaves nothing of --isl {self.input_length.low}")

    @property
    def open_loop(self) -> bool:
        """Arrivals don't wait for answers."""
        return self.rate is not None

    @property
    def in_flight(self) -> int:
        """Of the closed loop, and of the warm-up."""
        return self.concurrency or DEFAULT_CONCURRENCY

    @property
    def request_limit(self) -> float:
        """Requests to send at most."""
        if self.requests is None:
            return DEFAULT_REQUESTS if self.duration is None else math.inf
        return self.requests

    @property
    def duration_limit(self) -> float:
        """Seconds of sending at most."""
        if self.duration is None:
            return DEFAULT_DURATION if self.requests is None else math.inf
        return self.duration

    @property
    def input_length(self) -> Range[int]:
        """Tokens; nothing that a text file follows."""
        return _range("--isl", self.isl or DEFAULT_ISL, int, 1)

    @property
    def output_length(self) -> Range[int]:
        """Tokens."""
        return _range("--osl", self.osl, int, 1)

    @property
    def cancel_window(self) -> Range[float] | None:
        """Seconds after sending; None: over the expected duration."""
        return _range("--cancel-after", self.cancel_after, float, 0.0) if self.cancel_after else None

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Of --goodput."""
        return tuple(_objective(part) for part in _parts(self.goodput))

    @property
    def expected_errors(self) -> frozenset[str]:
        """Codes and reasons, in capitals."""
        return frozenset(part.upper() for part in _parts(self.expect_errors))

    def tls(self) -> TlsConfig | None:
        """Of the channels; None for plain text. Raises ValueError."""
        if self.client.tls_ca is None and self.client.tls_cert is None:
            return None
        return TlsConfig(self.client.tls_cert, self.client.tls_key, self.client.tls_ca)


def _parts(raw: str) -> list[str]:
    return [part.strip() for part in raw.split(",") if part.strip()]


def _range(option: str, raw: str, kind: Callable[[str], Number], least: Number) -> Range[Number]:
    low, _, high = raw.partition(":")
    try:
        found = Range(kind(low), kind(high or low))
    except ValueError as error:
        raise ValueError(f"{option}: {raw!r} is neither a number nor LOW:HIGH") from error
    if not least <= found.low <= found.high < math.inf:
        raise ValueError(f"{option}: {raw!r} needs {least:g} <= LOW <= HIGH")
    return found


def _objective(part: str) -> Objective:
    metric, _, limit = part.partition("=")
    if metric not in GOODPUT_METRICS:
        raise ValueError(f"--goodput: {metric!r} is not one of {', '.join(GOODPUT_METRICS)}")
    try:
        seconds = float(limit)
    except ValueError as error:
        raise ValueError(f"--goodput: {part!r} is not METRIC=SECONDS") from error
    if not 0 < seconds < math.inf:
        raise ValueError(f"--goodput: {part!r} needs more than 0 seconds")
    return Objective(metric, seconds)
