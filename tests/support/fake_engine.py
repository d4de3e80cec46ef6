"""An engine for tests of everything around engines: tokens by arithmetic, a room through a shared dictionary.

It is not the simulated engine: it proves nothing about KV caches. It obeys the `Engine` protocol, so that the worker
host, the frontend and the registry run for real around it.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

from prometheus_client import Metric

from services.embedding_requests import EmbeddingSize
from services.requests import Role
from services.worker.engines.kv_events import KvChange
from services.worker.engines.protocol import (
    EmbeddingRequest,
    EngineAbortedError,
    EngineDeadError,
    EngineDelta,
    EngineFinish,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    Finish,
    ProbePayload,
    Vector,
)

VOCABULARY = 49152
CONTEXT = 256
DIMENSION = 8


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    """The oracle: what every correct answer to `prompt` begins with. An answer goes on from any of its tokens."""
    length, seed = len(prompt), sum((index + 1) * token for index, token in enumerate(prompt))
    tokens: list[int] = []
    for index in range(length, length + count):
        tokens.append((seed + 31 * index) % 1000 + 100)
        seed += (index + 1) * tokens[-1]
    return tokens


def expected_vector(prompt: list[int], dimensions: int = DIMENSION) -> list[float]:
    """The same for embeddings: numbers that float32 holds exactly."""
    return [float(sum(prompt) + index) for index in range(dimensions)]


@dataclass
class Rooms:
    """Where the two legs of a request meet; one for all engines of a test."""

    arrived: dict[int, asyncio.Event] = field(default_factory=lambda: defaultdict(asyncio.Event))
    fetched: dict[int, asyncio.Event] = field(default_factory=lambda: defaultdict(asyncio.Event))


@dataclass
class Behaviour:
    """What the engine does wrong, or slowly; may be changed while it runs. Times in seconds."""

    token_seconds: float = 0.0
    in_step: bool = False
    """All requests get their tokens at the same moments, as from an engine's batch."""
    prefill_seconds: float = 0.0
    abort_message: str = ""
    """Non-empty: every request ends at once with Finish.ABORT and this message."""
    abort_behind: int = 0
    """Not 0: every request ends so behind this many tokens."""
    wrong_first_token: bool = False
    hang: bool = False
    probe_fails: str = ""
    """Non-empty: probes fail with this message."""
    probe_hangs: bool = False
    dp_size: int = 1
    cached_tokens: int = 0
    embed_seconds: float = 0.0
    embed_fails: str = ""
    """Non-empty: every embedding is aborted by the engine with this message."""
    matryoshka: tuple[int, ...] = ()


class FakeEngine:
    """See `services.worker.engines.protocol.Engine`."""

    def __init__(
        self, role: Role, rooms: Rooms, behaviour: Behaviour | None = None, *, pool_tokens: int = 4096
    ) -> None:
        self.role, self.rooms, self.pool_tokens = role, rooms, pool_tokens
        self.behaviour = behaviour or Behaviour()
        self.seen: list[EngineRequest] = []
        self.embedded: list[EmbeddingRequest] = []
        self.live: dict[str, asyncio.Event] = {}
        self.aborted: list[str] = []
        self._dead: asyncio.Future[str] | None = None
        self.probes = 0
        self.flushes = 0
        self.metrics: list[Metric] = []
        self.kv_changes: asyncio.Queue[KvChange] = asyncio.Queue()
        self.probed: list[tuple[int, ProbePayload | None]] = []

    def start(self) -> None:
        """Nothing to load."""

    async def attach(self) -> None:
        self._dead = asyncio.get_running_loop().create_future()

    def die(self, cause: str) -> None:
        """The scheduler is gone."""
        assert self._dead is not None
        self._dead.set_result(cause)
        for event in self.live.values():
            event.set()

    def info(self) -> EngineInfo:
        return EngineInfo(
            engine="fake",
            engine_version="1",
            torch_version="",
            nixl_version="1.5.1",
            page_size=16,
            max_total_tokens=self.pool_tokens,
            max_running_requests=64,
            max_batched_tokens=512,
            max_prompt_tokens=min(CONTEXT, self.pool_tokens) - 6,
            context_length=CONTEXT,
            vocab_size=VOCABULARY,
            tp_size=1,
            pp_size=1,
            dp_size=self.behaviour.dp_size,
            kv_cache_dtype="float32",
            kv_bytes_per_token=1,
            transfer_backend="nixl",
            eos_token_ids=(2,),
            bos_token_id=1,
            seeded_sampling=True,
            cache_salts=True,
            has_kv_events=self.role in (Role.PREFILL, Role.AGGREGATED),
            embedding=self._embedding_size(),
        )

    def _embedding_size(self) -> EmbeddingSize | None:
        lengths = self.behaviour.matryoshka
        return EmbeddingSize(DIMENSION, bool(lengths), lengths) if self.role is Role.EMBEDDING else None

    async def embed(self, request: EmbeddingRequest) -> list[Vector]:
        self.embedded.append(request)
        stop = self.live[request.engine_id] = asyncio.Event()
        try:
            if self.behaviour.embed_fails:
                raise EngineAbortedError(EngineFinish(Finish.ABORT, message=self.behaviour.embed_fails, status=500))
            if self.behaviour.hang:
                await stop.wait()
            await _wait(stop, self.behaviour.embed_seconds)
            self._raise_if_dead()
            if stop.is_set():
                raise EngineAbortedError(EngineFinish(Finish.ABORT, message="aborted"))
            return [array("f", expected_vector(each, request.dimensions or DIMENSION)) for each in request.inputs]
        finally:
            del self.live[request.engine_id]

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineDelta]:
        self.seen.append(request)
        stop = self.live[request.engine_id] = asyncio.Event()
        if request.engine_id in self.aborted:
            stop.set()  # the abort was quicker
        try:
            if self.behaviour.abort_message:
                yield EngineDelta([], EngineFinish(Finish.ABORT, message=self.behaviour.abort_message, status=500))
                return
            if self.behaviour.hang:
                await stop.wait()
            async for delta in self._tokens(request, stop):
                yield delta
        finally:
            del self.live[request.engine_id]

    async def _tokens(self, request: EngineRequest, stop: asyncio.Event) -> AsyncIterator[EngineDelta]:
        count = request.sampling.max_new_tokens
        tokens = expected_tokens(request.token_ids, count)
        if self.behaviour.wrong_first_token:
            tokens[0] += 1
        if request.room is not None:
            await self._meet(request.room.room, stop)
        if self.role is Role.PREFILL:
            tokens, count = tokens[:1], 1
        for index, token in enumerate(tokens, start=1):
            if self.behaviour.token_seconds:
                await _wait(stop, self._token_delay())
            if stop.is_set():
                self._raise_if_dead()
                yield EngineDelta([], EngineFinish(Finish.ABORT, message="aborted"))
                return
            if self.behaviour.abort_behind and index > self.behaviour.abort_behind:
                yield EngineDelta([], EngineFinish(Finish.ABORT, message="out of sorts", status=500))
                return
            finish = None
            if index == count:
                finish = EngineFinish(
                    Finish.LENGTH,
                    prompt_tokens=len(request.token_ids),
                    cached_tokens=self.behaviour.cached_tokens,
                    completion_tokens=count,
                )
            yield EngineDelta([token], finish)

    def _token_delay(self) -> float:
        seconds = self.behaviour.token_seconds
        return seconds - asyncio.get_running_loop().time() % seconds if self.behaviour.in_step else seconds

    async def _meet(self, room: int, stop: asyncio.Event) -> None:
        mine, other = self.rooms.arrived[room], self.rooms.fetched[room]
        if self.role is Role.DECODE:
            mine, other = other, mine
        else:
            await _wait(stop, self.behaviour.prefill_seconds)
        if stop.is_set():
            return  # what dies or is aborted hands nothing over
        mine.set()
        while not other.is_set() and not stop.is_set():
            await _wait(other, 0.01)

    def _raise_if_dead(self) -> None:
        if self._dead is not None and self._dead.done():
            raise EngineDeadError(self._dead.result())

    async def abort(self, engine_id: str) -> None:
        self.aborted.append(engine_id)
        if (event := self.live.get(engine_id)) is not None:
            event.set()

    async def loads(self) -> list[EngineLoad]:
        return [EngineLoad(0, len(self.live), 0, 16 * len(self.live), 4096)]

    async def probe(self, dp_rank: int = 0, payload: ProbePayload | None = None) -> None:
        self.probes += 1
        self.probed.append((dp_rank, payload))
        if self.behaviour.probe_hangs:
            await asyncio.Event().wait()
        if self.behaviour.probe_fails:
            raise RuntimeError(self.behaviour.probe_fails)

    async def kv_events(self) -> AsyncIterator[KvChange]:
        self.kv_changes = asyncio.Queue()
        while self.info().has_kv_events:
            yield await self.kv_changes.get()

    async def flush_cache(self) -> bool:
        self.flushes += 1
        return not self.live

    def collect_metrics(self) -> Iterable[Metric]:
        return self.metrics

    async def wait_dead(self) -> str:
        assert self._dead is not None
        return await asyncio.shield(self._dead)

    def shutdown(self) -> None:
        """Nothing to end."""


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
