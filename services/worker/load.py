"""What this worker has to do, for all its callers together, as frontends need it to choose workers.

Counted here, where every leg comes and goes, and not read from the engine, which tells it late and doesn't know what is
still on its way in. The engine is asked now and then for what only it knows: what else occupies its KV pool.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import structlog

from kvbaton import token_ids
from kvbaton.errors import RequestError
from kvbaton.v1 import generate_pb2, health_pb2
from services.requests import Role
from services.worker.engines.protocol import EngineDeadError, EngineDelta, EngineLoad

log = structlog.get_logger()


@dataclass(slots=True)
class _RankCount:
    """Of one dp rank, in tokens."""

    legs: int = 0
    prefill_tokens: int = 0
    kv_tokens: int = 0


class LegLoads:
    """Belongs to the serving loop."""

    def __init__(self, role: Role) -> None:
        self.version = 0
        """Grows when there is something that a frontend should hear."""
        self._computes_prompts = role is not Role.DECODE
        self._ranks: dict[int, _RankCount] = {}
        self._engine: dict[int, EngineLoad] = {}
        # Tokens in an engine's pool beside those of the legs: pages held back after a failed transfer, above all.
        self._beside: Counter[int] = Counter()
        self._asking: asyncio.Lock = asyncio.Lock()
        self._asked_at = float("-inf")
        self._told_of_failure = False

    def expect(self, request: generate_pb2.GenerateRequest, *, dp_size: int, cached_tokens: int = 0) -> LegLoad:
        """A leg has come; `cached_tokens` of its prompt need not be computed, as far as its sender knows."""
        tokens = token_ids.count(request.token_ids)
        prefill_tokens = max(0, tokens - cached_tokens) if self._computes_prompts else 0
        return LegLoad(self, self._rank_of(request, dp_size), prefill_tokens, tokens)

    def add(self, rank: int, *, legs: int = 0, prefill_tokens: int = 0, kv_tokens: int = 0) -> None:
        """So much more, or less. Single output tokens change nothing that is worth a report."""
        count = self._ranks.setdefault(rank, _RankCount())
        count.legs += legs
        count.prefill_tokens += prefill_tokens
        count.kv_tokens += kv_tokens
        if legs or prefill_tokens:
            self.version += 1
            if not count.legs:
                del self._ranks[rank]

    async def ask_engine(self, loads: Callable[[], Awaitable[list[EngineLoad]]], *, older_than: float) -> None:
        """Asks what the engine's pool holds, unless that was done within so many seconds."""
        clock = asyncio.get_running_loop().time
        async with self._asking:
            if clock() - self._asked_at < older_than:
                return
            # An engine that is still loading, frozen or dead says nothing new.
            try:
                with contextlib.suppress(TimeoutError, EngineDeadError, RequestError):
                    self._engine_says(await loads())
            except Exception:  # one report that fails must not end all further ones
                if not self._told_of_failure:
                    self._told_of_failure = True
                    log.exception("engine_load_not_read")
            self._asked_at = clock()

    def ranks(self) -> list[health_pb2.RankLoad]:
        """For a report."""
        return [self._describe(rank) for rank in sorted(self._ranks.keys() | self._engine.keys())]

    def _engine_says(self, loads: list[EngineLoad]) -> None:
        before, self._beside = self._beside, Counter[int]()
        self._engine = {load.dp_rank: load for load in loads}
        for load in loads:
            count = self._ranks.get(load.dp_rank)
            self._beside[load.dp_rank] = max(0, load.used_tokens - (count.kv_tokens if count else 0))
        # While legs run their answers grow, which no event tells.
        if self._ranks or self._beside != before:
            self.version += 1

    def _describe(self, rank: int) -> health_pb2.RankLoad:
        count, engine = self._ranks.get(rank, _RankCount()), self._engine.get(rank)
        waiting = min(count.legs, engine.waiting_requests if engine is not None else 0)
        return health_pb2.RankLoad(
            dp_rank=rank,
            running_requests=count.legs - waiting,
            waiting_requests=waiting,
            used_tokens=count.kv_tokens + self._beside[rank],
            total_tokens=engine.total_tokens if engine is not None else 0,
            prefill_tokens=count.prefill_tokens,
        )

    def _rank_of(self, request: generate_pb2.GenerateRequest, dp_size: int) -> int:
        if dp_size == 1:
            return 0
        if request.HasField("dp_rank"):
            return request.dp_rank
        if request.HasField("bootstrap") and self._computes_prompts:
            return request.bootstrap.room % dp_size
        # The engine will choose; as good a guess as any.
        return min(range(dp_size), key=lambda rank: self._ranks.get(rank, _RankCount()).legs)


class LegLoad:
    """One leg's part of it, from its arrival until the engine has let go of it; a context manager for its caller."""

    def __init__(self, loads: LegLoads, rank: int, prefill_tokens: int, kv_tokens: int) -> None:
        self._loads = loads
        self._rank = rank
        self._prefill_tokens, self._kv_tokens = prefill_tokens, kv_tokens
        self._live = True
        self._with_engine = False
        loads.add(rank, legs=1, prefill_tokens=prefill_tokens, kv_tokens=kv_tokens)

    def follow(self, deltas: AsyncIterator[EngineDelta]) -> AsyncIterator[EngineDelta]:
        """The same deltas; the leg counts until they end, whoever has left before."""
        self._with_engine = True
        return self._follow(deltas)

    def leave(self) -> None:
        """Its caller is through with it; without effect once the engine has it."""
        if not self._with_engine:
            self._end()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self.leave()

    async def _follow(self, deltas: AsyncIterator[EngineDelta]) -> AsyncIterator[EngineDelta]:
        try:
            async for delta in deltas:
                if delta.token_ids:
                    self._took(len(delta.token_ids))
                yield delta
        finally:
            self._end()

    def _took(self, tokens: int) -> None:
        self._loads.add(self._rank, prefill_tokens=-self._prefill_tokens, kv_tokens=tokens)
        self._prefill_tokens = 0
        self._kv_tokens += tokens

    def _end(self) -> None:
        if self._live:
            self._live = False
            self._loads.add(self._rank, legs=-1, prefill_tokens=-self._prefill_tokens, kv_tokens=-self._kv_tokens)
