"""What is told of a request that has ended: one log line, one span, its counts and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from kvbaton.errors import RequestError
from services.frontend.request.answer import Answer
from services.frontend.request.states import State
from services.telemetry import metrics

log = structlog.get_logger()

_OF_EACH_CHOICE = ("queue", "routing", "prefill", "transfer", "decode")


@dataclass(frozen=True, slots=True)
class Report:
    """One request with all its choices; times in seconds."""

    request_id: str
    model: str
    error: RequestError | None
    answers: Sequence[Answer]
    """One for each choice."""
    attempts: int
    """Of all choices."""
    ended_in: State | None
    """Where the choice that failed was; without one, the first."""
    duration: float
    """From receipt until every leg was gone."""

    @property
    def outcome(self) -> str:
        """finished, or the name of the error's status."""
        return "finished" if self.error is None else self.error.code.name

    @property
    def prompt_tokens(self) -> int:
        """The prompt counts once."""
        return self.answers[0].prompt_tokens

    @property
    def completion_tokens(self) -> int:
        """The sum over the choices."""
        return sum(answer.completion_tokens for answer in self.answers)

    @property
    def phases(self) -> dict[str, float]:
        """Seconds by phase, each of the choice that it took longest."""
        longest: dict[str, float] = {}
        for answer in self.answers:
            for phase, seconds in answer.timings().by_phase().items():
                longest[phase] = max(seconds, longest.get(phase, 0.0))
        return longest

    def count(self) -> None:
        """Into the metrics."""
        metrics.REQUESTS.labels(self.model, self.outcome).inc()
        metrics.REQUEST_DURATION_SECONDS.labels(self.model, self.outcome).observe(self.duration)
        if self.error is not None:
            return
        metrics.PROMPT_TOKENS.labels(self.model).inc(self.prompt_tokens)
        metrics.COMPLETION_TOKENS.labels(self.model).inc(self.completion_tokens)
        first = [answer.time_to_first_token for answer in self.answers]
        if waits := [seconds for seconds in first if seconds is not None]:
            metrics.TIME_TO_FIRST_TOKEN_SECONDS.labels(self.model).observe(min(waits))
        for answer in self.answers:
            phases = answer.timings().by_phase()
            for phase in _OF_EACH_CHOICE:
                if phase in phases:
                    metrics.PHASE_SECONDS.labels(self.model, phase).observe(phases[phase])
        if (tokenization := self.answers[0].timings().tokenization) is not None:
            metrics.PHASE_SECONDS.labels(self.model, "tokenization").observe(tokenization)

    def write(self) -> None:
        """Into the log."""
        several = {"choices": len(self.answers)} if len(self.answers) > 1 else {}
        if migrations := sum(answer.migrations for answer in self.answers):
            several["migrations"] = migrations
        log.info(
            "request ended",
            request_id=self.request_id,
            outcome=self.outcome,
            phase=self.ended_in,
            model=self.model,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            attempts=self.attempts,
            error=str(self.error) if self.error is not None else None,
            **several,
            **{f"{phase}_s": round(seconds, 4) for phase, seconds in self.phases.items()},
        )
