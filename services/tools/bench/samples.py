"""What one request was, and the definitions of everything that is measured of it.

Times are seconds on the clock of `time.perf_counter`.

start  In the open loop the moment at which the request was due, whenever it was really sent: a generator or server
       that falls behind makes latencies longer, it doesn't hide them (no coordinated omission). In the closed loop the
       moment at which it was sent.
TTFT   From start until the first message that carries a token.
E2E    From start until the stream has ended with OK.
ITL    Time between tokens. A message with k tokens that comes g seconds after the message before it counts as k gaps
       of g / k seconds: k tokens were made in that time, and a server that sends them together must not look faster or
       slower than one that sends them one by one. Tokens of the first message beside the first token count as no gap.
TPOT   The mean of a request's ITL gaps.
message gap  The same g, once per message: the pauses that a reader sees.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from services.tools.bench.statistics import weighted_percentile

_ITL_SHARES = {"itl_p50": 50.0, "itl_p90": 90.0, "itl_p95": 95.0, "itl_p99": 99.0, "itl_max": 100.0}
GOODPUT_METRICS = ("ttft", "e2e", "tpot", *_ITL_SHARES)


class Kind(StrEnum):
    """How a request ended."""

    FINISHED = "finished"
    CANCELLED = "cancelled"
    """By --cancel-rate. A request that ended before its planned cancellation is not one of these."""
    INTERRUPTED = "interrupted"
    """By Ctrl-C."""
    ERROR = "error"


class Outcome(NamedTuple):
    """How a request ended; code and reason of an error, the finish reason of an answer."""

    kind: Kind
    code: str = ""
    reason: str = ""


INTERRUPTED = Outcome(Kind.INTERRUPTED)


class Gaps(NamedTuple):
    """Before each message but the first: its seconds, its tokens, and its seconds for each of these tokens."""

    messages: Sequence[float]
    tokens: Sequence[int]
    per_token: Sequence[float]


def gaps_between(times: Sequence[float], counts: Sequence[int]) -> Gaps:
    """For messages that came at `times` with `counts` tokens each (none of them 0)."""
    messages, tokens = [now - before for before, now in pairwise(times)], counts[1:]
    return Gaps(messages, tokens, [gap / count for gap, count in zip(messages, tokens, strict=True)])


@dataclass
class Sample:
    """One request. `times` and `tokens` have an entry for each message with tokens."""

    index: int
    start: float
    sent: float = 0.0
    ended: float = 0.0
    times: array[float] = field(default_factory=lambda: array("d"))
    tokens: array[int] = field(default_factory=lambda: array("I"))
    outcome: Outcome = INTERRUPTED
    cancel_planned: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    detail: str = ""

    @property
    def output_tokens(self) -> int:
        """Tokens received."""
        return sum(self.tokens)

    @property
    def send_lag(self) -> float:
        """Seconds by which it was sent late."""
        return self.sent - self.start

    @property
    def ttft(self) -> float:
        """Seconds; NaN when no token came."""
        return self.times[0] - self.start if self.times else math.nan

    @property
    def e2e(self) -> float:
        """Seconds."""
        return self.ended - self.start

    @property
    def tpot(self) -> float:
        """Seconds; NaN when all tokens came at once."""
        later = self.output_tokens - (self.tokens[0] if self.tokens else 0)
        return (self.times[-1] - self.times[0]) / later if later else math.nan

    @cached_property
    def gaps(self) -> Gaps:
        """Between its messages; to be asked for once it has ended."""
        return gaps_between(self.times, self.tokens)

    def itl_percentile(self, share: float) -> float:
        """Seconds; 0 when all tokens came at once."""
        return weighted_percentile(self.gaps.per_token, self.gaps.tokens, share)

    def metric(self, name: str) -> float:
        """Seconds, by a name of GOODPUT_METRICS. What didn't happen, took no time."""
        if (share := _ITL_SHARES.get(name)) is not None:
            return self.itl_percentile(share)
        value = {"ttft": self.ttft, "e2e": self.e2e, "tpot": self.tpot}[name]
        return 0.0 if math.isnan(value) else value
