"""What an inference engine is to a worker: the `Engine` protocol and the values that cross it.

Two implementations: `sglang` and, for scale and faults, `simulated`. Nothing of SGLang, torch or protobuf crosses.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeAlias

from prometheus_client import Metric

from services.embedding_requests import EmbeddingSize
from services.requests import Grammar, Role, Room, Sampling, TokenLogprob
from services.worker.engines.kv_events import KvChange

__all__ = ["Grammar", "Role", "Room", "Sampling", "TokenLogprob"]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One leg of one attempt.

    `engine_id` is 32 hex digits and never used twice: SGLang matches aborts by prefix. `room` is set for both legs of a
    disaggregated request and None for an aggregated one. `trace_headers` are W3C trace-context headers. `logprobs` is
    how many of the likeliest tokens come with each token, None without log probabilities. Prefixes are shared only with
    requests of the same `cache_salt`.
    """

    engine_id: str
    token_ids: list[int]
    sampling: Sampling
    room: Room | None = None
    dp_rank: int | None = None
    trace_headers: Mapping[str, str] = field(default_factory=dict)
    logprobs: int | None = None
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Inputs to be embedded together; at least one, none empty.

    `engine_id` as in `EngineRequest`. `dimensions` is None for whole vectors.
    """

    engine_id: str
    inputs: Sequence[list[int]]
    dimensions: int | None = None
    trace_headers: Mapping[str, str] = field(default_factory=dict)


Vector: TypeAlias = "array[float]"
"""One embedding: `array("f")`."""


@dataclass(frozen=True, slots=True)
class ProbePayload:
    """What a probe generates from, or embeds; the first token of any vocabulary unless an operator knows better."""

    token_ids: tuple[int, ...] = (0,)
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=1, temperature=0.0))


class Finish(StrEnum):
    """Why an engine ended a request."""

    STOP = "stop"
    LENGTH = "length"
    # By `abort`, by one of the engine's own time-outs or because a transfer failed: `EngineFinish.message` says which.
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class EngineFinish:
    """The end of one request as the engine sees it. `status` is the HTTP-like status of an abort, 0 if none."""

    reason: Finish
    matched_token_id: int | None = None
    message: str = ""
    status: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineDelta:
    """New tokens of one request; `finish` is set on the last delta and on no other.

    `logprobs` has one entry for each token where the request asks for them.
    """

    token_ids: list[int]
    finish: EngineFinish | None = None
    logprobs: Sequence[TokenLogprob] = ()


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine turned out to be once it is built. Sizes in tokens unless the name says otherwise."""

    engine: str
    engine_version: str
    torch_version: str
    nixl_version: str
    page_size: int
    max_total_tokens: int
    max_running_requests: int
    max_batched_tokens: int
    max_prompt_tokens: int
    context_length: int
    vocab_size: int
    tp_size: int
    pp_size: int
    dp_size: int
    kv_cache_dtype: str
    # Over all layers of one tp rank; 0 when unknown.
    kv_bytes_per_token: int
    transfer_backend: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    seeded_sampling: bool
    tool_call_parser: str = ""
    reasoning_parser: str = ""
    # What holds answers to a grammar; empty when nothing does.
    grammar_backend: str = ""
    # Whether prefixes of different salts are kept apart, and events tell the salt.
    cache_salts: bool = False
    # Whether `Engine.kv_events` tells anything.
    has_kv_events: bool = False
    # None for an engine that generates.
    embedding: EmbeddingSize | None = None

    @property
    def total_kv_pages(self) -> int:
        """Pages of the KV pool, rounded down as SGLang itself allocates them."""
        return self.max_total_tokens // self.page_size


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Load of one data-parallel rank."""

    dp_rank: int
    running_requests: int
    waiting_requests: int
    used_tokens: int
    total_tokens: int
    # Unix seconds at which the scheduler reported this; 0.0 when unknown. An idle scheduler may report seldom.
    reported_at: float = 0.0


class EngineDeadError(Exception):
    """The engine's scheduler is gone; the worker must withdraw and end."""


class EngineRefusedError(Exception):
    """The engine refused a request, nearly always before running it; the message is the engine's.

    `field` is the field at fault as in the proto, empty where the engine doesn't say.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class EngineAbortedError(Exception):
    """An embedding request was ended, by `abort` or by the engine; `finish` says why."""

    def __init__(self, finish: EngineFinish) -> None:
        super().__init__(finish.message)
        self.finish = finish


class Engine(Protocol):
    """One model on its devices, in one role.

    Life: `start` once, in the main thread, before anything else; then any number of calls from one event loop; then
    `shutdown`. Everything except `start` and `shutdown` is called in that event loop.
    """

    def start(self) -> None:
        """Loads the model and blocks until the engine can take requests; minutes for a large model.

        Raises RuntimeError with the cause when it can't. SGLang kills the whole process instead on some failures.
        """
        ...

    async def attach(self) -> None:
        """Binds the engine to the running event loop; called once, before the first request."""
        ...

    def info(self) -> EngineInfo:
        """What was built. Valid after `start`."""
        ...

    def generate(self, request: EngineRequest) -> AsyncIterator[EngineDelta]:
        """Runs one leg; the iterator ends after the delta with `finish`.

        A prefill engine answers with exactly one token. Closing the iterator early does not abort: call `abort`.
        Raises EngineRefusedError when the engine's validation refuses the request, EngineDeadError when it dies.
        """
        ...

    async def embed(self, request: EmbeddingRequest) -> list[Vector]:
        """A vector for each input, in their order; for engines in the embedding role, which take nothing else.

        Returns, or raises, when the engine has let go of every input. Raises EngineRefusedError, EngineDeadError, or
        EngineAbortedError within seconds of an `abort`.
        """
        ...

    async def abort(self, engine_id: str) -> None:
        """Ends a running request; its iterator ends with Finish.ABORT within seconds, whatever the engine does.

        Returns at once. An abort that comes before the engine knows the request is not lost; unknown ids are ignored.
        """
        ...

    async def loads(self) -> list[EngineLoad]:
        """Load of each data-parallel rank, as the scheduler reports it. Raises TimeoutError, EngineDeadError."""
        ...

    async def probe(self, dp_rank: int = 0, payload: ProbePayload | None = None) -> None:
        """One real generation on that rank, by default of one token; in a disaggregated role it moves no KV cache.
        In the embedding role one embedding, of the payload's token ids.

        Raises EngineDeadError, TimeoutError, or RuntimeError with what came back instead of an answer.
        """
        ...

    def kv_events(self) -> AsyncIterator[KvChange]:
        """Every change of the prefix caches since the engine was attached, rank by rank in order; one reader at a time.

        Ends at once where `EngineInfo.has_kv_events` is False. What can't be told exactly becomes AllBlocksCleared.
        """
        ...

    async def flush_cache(self) -> bool:
        """Forgets every cached prefix; False, and nothing is forgotten, while requests run.

        Raises EngineDeadError, TimeoutError.
        """
        ...

    def collect_metrics(self) -> Iterable[Metric]:
        """Metrics of the engine's own child processes. May read files: call it in a thread."""
        ...

    async def wait_dead(self) -> str:
        """Returns the cause when the engine's scheduler has died; never before."""
        ...

    def shutdown(self) -> None:
        """Ends the engine's child processes and deletes its temporary files. Idempotent; callable from any thread."""
        ...
