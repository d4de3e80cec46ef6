"""What the frontend's edges (gRPC, HTTP) see of a request: submit it, read its outputs, cancel it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from kvbaton.v1 import generate_pb2, model_pb2, text_pb2
from services.requests import TokenLogprob
from services.telemetry.tracing import NO_HEADERS


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    # As STOP, and the answer has tool calls.
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of each phase; None where it did not happen. See `Timings` in generate.proto."""

    queue: float | None = None
    prefill: float | None = None
    transfer: float | None = None
    decode: float | None = None
    tokenization: float | None = None
    routing: float | None = None

    def by_phase(self) -> dict[str, float]:
        """Those that happened, by name."""
        phases = {
            "tokenization": self.tokenization,
            "queue": self.queue,
            "routing": self.routing,
            "prefill": self.prefill,
            "transfer": self.transfer,
            "decode": self.decode,
        }
        return {phase: seconds for phase, seconds in phases.items() if seconds is not None}


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a choice. Token counts as in `Usage` of generate.proto, of this choice alone.

    Of a whole answer the prompt counts once, as choice 0 has it, and `completion_tokens` are the sum over its choices.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int = 0
    matched_token_id: int | None = None
    matched_stop: str | None = None
    timings: Timings = field(default_factory=Timings)
    prefill_worker: str = ""
    decode_worker: str = ""
    migrations: int = 0


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What is new of one tool call: first its id and name, then the JSON text of its arguments, piece by piece."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Output:
    """New tokens and new text; `finished` is set on the last output of a choice and on no other.

    `text` never ends inside a character, so it may lag behind `token_ids`; it is empty for a model without tokenizer.
    `index` is the choice, from 0. `logprobs` has one entry for each token where the request asks for them.
    """

    token_ids: list[int]
    text: str = ""
    finished: Finished | None = None
    index: int = 0
    reasoning: str = ""
    tool_calls: Sequence[ToolCallDelta] = ()
    logprobs: Sequence[TokenLogprob] = ()


class LiveRequest(Protocol):
    """One accepted request. Its choices have owner tasks of their own: reading slowly or not at all does not stop them.

    Outputs of several choices come as their tokens do, in any order; a choice that fails ends them all with its error.
    A reader that leaves more than --max-buffered-bytes unread is cut off: RESOURCE_EXHAUSTED, CLIENT_TOO_SLOW.
    """

    @property
    def request_id(self) -> str:
        """The caller's id, or the one made up for it."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """The length of the prompt."""
        ...

    def outputs(self) -> AsyncIterator[Output]:
        """Ends after the last choice's output with `finished`, or raises RequestError once.

        Leaving it early cancels the request.
        """
        ...

    def when_cut_off(self, act: Callable[[], None]) -> None:
        """`act` is called when the reader is cut off, so that it gives up a write that waits for the client."""
        ...

    def cancel(self) -> None:
        """Ends all legs; `outputs` then raises RequestError with CANCELLED. Returns at once, idempotent."""
        ...


class Generation(Protocol):
    """The frontend's service, as its edges use it."""

    async def submit(
        self, request: generate_pb2.GenerateRequest, trace_headers: Mapping[str, str] = NO_HEADERS
    ) -> LiveRequest:
        """Checks, tokenizes and dispatches. Raises RequestError when the request is refused.

        `trace_headers` are the client's W3C trace context.
        """
        ...

    async def tokenize(self, request: text_pb2.TokenizeRequest) -> text_pb2.TokenizeResponse:
        """The tokens of a prompt, as `submit` makes them. Raises RequestError."""
        ...

    async def detokenize(self, request: text_pb2.DetokenizeRequest) -> text_pb2.DetokenizeResponse:
        """The text of tokens. Raises RequestError."""
        ...

    def abort(self, request_id: str) -> bool:
        """Cancels a live request by id; False when there is none. One that comes soon is cancelled, then."""
        ...

    def abort_live(self, request_id: str) -> bool:
        """As `abort`, but an id that isn't there is not remembered."""
        ...

    def models(self) -> list[model_pb2.ModelInfo]:
        """Every model that a request could be sent to right now, by name."""
        ...

    @property
    def draining(self) -> bool:
        """True once the frontend takes no new request."""
        ...
