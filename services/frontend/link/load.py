"""What one worker has to do, as this frontend knows it: its last report, and what was sent there since.

Between two reports a burst would all go to whoever was idle in the last one. So every leg counts from the moment that
its worker is chosen, until a report covers it or it has ended. A worker that reports nothing (--link streams) is known
by this frontend's own legs alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from kvbaton.v1 import health_pb2, session_pb2


class RankLoad:
    """Load of one data-parallel rank, in tokens and requests."""

    __slots__ = ("_report", "kv_tokens", "prefill_tokens", "requests")

    def __init__(self) -> None:
        self.prefill_tokens = 0
        """Prompt tokens that are still to be computed."""
        self.kv_tokens = 0
        """Tokens of prompts and answers in the KV cache, or soon, of requests that live."""
        self.requests = 0
        self._report = health_pb2.RankLoad()

    @property
    def tokens(self) -> int:
        """What waits and what runs; a prompt that is still to be computed counts twice: as work and as memory."""
        return self.prefill_tokens + self.kv_tokens

    def report(self, report: health_pb2.RankLoad) -> None:
        """Takes the worker's word in place of its last one."""
        last, self._report = self._report, report
        self.add(
            report.prefill_tokens - last.prefill_tokens,
            report.used_tokens - last.used_tokens,
            _requests(report) - _requests(last),
        )

    def add(self, prefill_tokens: int, kv_tokens: int, requests: int) -> None:
        """So much more, or less."""
        self.prefill_tokens += prefill_tokens
        self.kv_tokens += kv_tokens
        self.requests += requests

    def describe(self, dp_rank: int) -> health_pb2.RankLoad:
        """For `Status` of the frontend; `running_requests` are those that wait too."""
        return health_pb2.RankLoad(
            dp_rank=dp_rank,
            running_requests=self.requests,
            used_tokens=self.kv_tokens,
            total_tokens=self._report.total_tokens,
            prefill_tokens=self.prefill_tokens,
        )


class WorkerLoad:
    """All ranks of one worker."""

    def __init__(self, dp_size: int) -> None:
        self.ranks = tuple(RankLoad() for _ in range(max(1, dp_size)))
        self._not_covered: deque[LegShare] = deque()

    def report(self, report: session_pb2.LoadReport) -> None:
        """What the worker says covers the legs that it had by then."""
        while self._not_covered and self._not_covered[0].number <= report.through_leg:
            self._not_covered.popleft().end()
        self._set(report.ranks)

    def reset(self) -> None:
        """The session is another one: the last one's report and numbers mean nothing in it."""
        self._not_covered.clear()
        self._set(())

    def sent(self, share: LegShare) -> None:
        """The leg has got its number; numbers grow."""
        self._not_covered.append(share)

    def _set(self, reports: Iterable[health_pb2.RankLoad]) -> None:
        said = {report.dp_rank: report for report in reports}
        for index, rank in enumerate(self.ranks):
            rank.report(said.get(index, health_pb2.RankLoad(dp_rank=index)))


class LegShare:
    """One leg's part of its rank's load, as long as no report has it. `cached_tokens` are expected in the cache."""

    __slots__ = ("_held", "_load", "_rank", "cached_tokens", "number")

    def __init__(self, load: WorkerLoad, dp_rank: int, *, prefill_tokens: int, kv_tokens: int, cached: int = 0) -> None:
        self.number = 0
        """Within the session; 0 until it is sent."""
        self.cached_tokens = cached
        self._load = load
        self._rank = load.ranks[dp_rank]
        self._held = (prefill_tokens, kv_tokens, 1)
        self._rank.add(*self._held)

    def sent(self, number: int) -> None:
        """The leg is on its way, as this number of its session; a report will cover it."""
        self.number = number
        self._load.sent(self)

    def prefilled(self) -> None:
        """Its first token is here. Idempotent."""
        prefill_tokens, kv_tokens, requests = self._held
        if prefill_tokens:
            self._rank.add(-prefill_tokens, 0, 0)
            self._held = (0, kv_tokens, requests)

    def end(self) -> None:
        """The leg has ended, was never sent, or a report has it. Idempotent."""
        prefill_tokens, kv_tokens, requests = self._held
        if requests:
            self._rank.add(-prefill_tokens, -kv_tokens, -requests)
            self._held = (0, 0, 0)


def _requests(report: health_pb2.RankLoad) -> int:
    return report.running_requests + report.waiting_requests
