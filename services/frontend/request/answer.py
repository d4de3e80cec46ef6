"""What the client gets of a request, and when each part of it came."""

from __future__ import annotations

import time
from array import array
from dataclasses import replace

from kvbaton.errors import RequestError
from kvbaton.v1 import generate_pb2
from services.frontend.link.protocol import LegFinished, LegTokens
from services.frontend.request.api import Finished, FinishReason, Output, Timings
from services.frontend.request.prepare import PreparedRequest
from services.frontend.request.reply import Reply
from services.frontend.router.placement import Placement
from services.telemetry import metrics

_FINISH_REASONS = {
    generate_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    generate_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


class Answer:
    """Tokens in, outputs out; the phases' times of the attempt that brought the first token, or of the last one."""

    def __init__(self, prepared: PreparedRequest, received: float, tokenization: float | None = None) -> None:
        """`received` is on the monotonic clock, `tokenization` in seconds."""
        self._prepared = prepared
        self._reply = None if prepared.text is None else prepared.text.start()
        self._received = received
        self._tokenization = tokenization
        self._token_gaps = metrics.INTER_TOKEN_LATENCY_SECONDS.of(prepared.model)
        self._placement: Placement | None = None
        self._routing: float | None = None
        self._disaggregated = False
        self._dispatched: float | None = None
        self._prefilled: float | None = None
        self._first: float | None = None
        self._last: float | None = None
        self._tokens = 0
        self._cached = 0
        self.taken = array("I")
        """Every token that has come, also behind a stop string."""
        self.migrations = 0
        """Attempts that were begun behind the first token."""
        self.complete: Finished | None = None
        self.error: RequestError | None = None

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self._prepared.token_ids)

    @property
    def completion_tokens(self) -> int:
        """Tokens sent so far."""
        return self._tokens

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from receipt."""
        return None if self._first is None else self._first - self._received

    def dispatched(self, placement: Placement) -> None:
        """Both legs of an attempt are on their way."""
        self._placement = placement
        if self.taken:
            self.migrations += 1
        else:
            self._routing, self._disaggregated = placement.routing, placement.prefill is not None
            self._dispatched, self._prefilled = time.monotonic(), None

    def prefilled(self, event: LegTokens | LegFinished) -> None:
        """Prefill's token has left its engine; its end says how much of the prompt its cache held."""
        if self.migrations:
            return  # its prompt isn't the client's
        if self._prefilled is None:
            self._prefilled = time.monotonic()
        if isinstance(event, LegFinished):
            self._cached = max(self._cached, event.finished.usage.cached_prompt_tokens)

    def take(self, event: LegTokens | LegFinished) -> Output:
        """Decode's next tokens as an output; `finished` is set when the answer ends here, also at a stop string."""
        now = time.monotonic()
        if event.token_ids:
            if self._first is None or self._last is None:
                self._first = now
            else:
                self._token_gaps.observe(now - self._last, len(event.token_ids))
        self._last = now
        before = self._tokens
        self._tokens += len(event.token_ids)
        self.taken.extend(event.token_ids)
        if isinstance(event, LegFinished) and not self.migrations:
            self._cached = max(self._cached, event.finished.usage.cached_prompt_tokens)
        if self._reply is None:
            output, ended, stopped = Output(event.token_ids, logprobs=event.logprobs), False, None
        else:
            output, ended, stopped = self._read(self._reply, event, before)
        if ended:
            return self._finished(output, stopped=stopped)
        if isinstance(event, LegFinished):
            return self._finished(output, finished=event.finished)
        return output

    def with_prefills_word(self, output: Output) -> Output:
        """The last output, with what prefill has said since it was made."""
        assert self.complete is not None
        self.complete = replace(self.complete, cached_prompt_tokens=self._cached, timings=self.timings())
        return replace(output, finished=self.complete)

    def timings(self) -> Timings:
        """Seconds of each phase as far as it got."""
        # Prefill's stream ends after the transfer; whichever told first bounds the prefill phase.
        prefilled = self._prefilled if self._disaggregated else self._first
        if prefilled is not None and self._first is not None:
            prefilled = min(prefilled, self._first)
        return Timings(
            tokenization=self._tokenization,
            queue=_between(self._received, self._dispatched),
            routing=self._routing,
            prefill=_between(self._dispatched, prefilled),
            transfer=_between(prefilled, self._first) if self._disaggregated else None,
            decode=_between(self._first, self._last),
        )

    def _read(self, reply: Reply, event: LegTokens | LegFinished, before: int) -> tuple[Output, bool, str | None]:
        """An output, whether the answer ends with it although the engine goes on, and the stop string it ends at."""
        last = isinstance(event, LegFinished)
        token_ids, logprobs = event.token_ids, event.logprobs
        # The token that ended the answer is counted, but is no text of it.
        ended_by_token = last and event.finished.WhichOneof("matched") == "matched_token_id"
        delta = reply.push(token_ids[:-1] if ended_by_token else token_ids, last=last)
        if delta.ended:
            self._tokens = delta.token_count_used
            kept = max(0, self._tokens - before)
            token_ids, logprobs = token_ids[:kept], logprobs[:kept]
        output = Output(
            token_ids,
            delta.text,
            reasoning=delta.reasoning,
            tool_calls=delta.tool_calls,
            logprobs=reply.with_bytes(logprobs) if logprobs else logprobs,
        )
        return output, delta.ended, delta.stopped

    def _finished(
        self, output: Output, *, finished: generate_pb2.Finished | None = None, stopped: str | None = None
    ) -> Output:
        placement = self._placement
        assert placement is not None
        matched = None
        if finished is not None and finished.WhichOneof("matched") == "matched_token_id":
            matched = finished.matched_token_id
        reason = FinishReason.STOP if finished is None else _FINISH_REASONS[finished.reason]
        if reason is FinishReason.STOP and self._reply is not None and self._reply.called:
            reason = FinishReason.TOOL_CALLS
        self.complete = Finished(
            reason=reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self._tokens,
            cached_prompt_tokens=self._cached,
            matched_token_id=matched,
            matched_stop=stopped,
            timings=self.timings(),
            prefill_worker=placement.prefill.instance_id if placement.prefill is not None else "",
            decode_worker=placement.decode.instance_id,
            migrations=self.migrations,
        )
        return replace(output, finished=self.complete)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(0.0, end - start)
