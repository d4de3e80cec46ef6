"""One request inside the simulated engine, and the stream that its caller reads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from services.requests import Room
from services.worker.engines.probe import FAKE_PEER
from services.worker.engines.protocol import EngineDelta, EngineFinish, EngineRequest, Finish, TokenLogprob
from services.worker.engines.simulated.oracle import TokenRule
from services.worker.engines.simulated.pages import BlockTable, Mask


class DeltaStream:
    """From the scheduler to one reader. After its end nothing more gets in."""

    def __init__(self) -> None:
        self.ended = False
        self.delivered = 0
        self._items: deque[EngineDelta | Exception] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put(self, item: EngineDelta | Exception) -> None:
        """New tokens, the end, or a failure."""
        if self.ended:
            return
        if isinstance(item, Exception):
            self.ended = True
        else:
            self.ended = item.finish is not None
            self.delivered += len(item.token_ids)
        self._items.append(item)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def deltas(self) -> AsyncIterator[EngineDelta]:
        """Up to the delta with `finish`; raises what the request failed with."""
        while True:
            while not self._items:
                self._reader = asyncio.get_running_loop().create_future()
                await self._reader
            item = self._items.popleft()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finish is not None:
                return


@dataclass(slots=True, eq=False)
class Request:
    """One leg, from its submission until its pages are released. Times on the monotonic clock."""

    engine_id: str
    prompt: list[int]
    rule: TokenRule
    max_new_tokens: int
    room: Room | None
    arrived: float
    stream: DeltaStream = field(default_factory=DeltaStream)
    aborting: bool = False
    ended: bool = False
    produced: int = 0
    fresh: list[int] = field(default_factory=list[int])
    fresh_logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    """Output that the stream has not got yet."""
    logprobs: int | None = None
    """How many of the likeliest tokens come with each, None without any log probabilities."""
    cache_salt: str = ""
    pages: list[int] = field(default_factory=list[int])
    table: BlockTable | None = None
    mask: Mask | None = None
    computed: int = 0
    """Prompt tokens whose KV cache is there, cached ones included."""
    cached: int = 0
    sent_pages: int = 0
    registered_at: float = 0.0

    @classmethod
    def of(cls, request: EngineRequest, rule: TokenRule, now: float) -> Request:
        """From what the worker submits."""
        prompt, room = list(request.token_ids), request.room
        length = request.sampling.max_new_tokens
        return cls(
            request.engine_id,
            prompt,
            rule,
            length,
            room,
            now,
            logprobs=request.logprobs,
            cache_salt=request.cache_salt,
        )

    @property
    def pretends(self) -> bool:
        """Whether its peer is a pretence: nothing is transferred, and its token means nothing."""
        return self.room is not None and self.room.host == FAKE_PEER

    @property
    def room_id(self) -> int:
        """The room; only for a request that has one."""
        assert self.room is not None
        return self.room.room

    @property
    def bootstrap_address(self) -> tuple[str, int]:
        """Prefill's bootstrap server; only for a request that has a room."""
        assert self.room is not None
        return (self.room.host, self.room.port)

    def flush(self) -> None:
        """Gives the stream what it has not got yet."""
        self.stream.put(self._delta(None))

    def end(self, reason: Finish, *, message: str = "", status: int = 0, matched: int | None = None) -> None:
        """Its last delta, with what the stream has not got yet."""
        finish = EngineFinish(
            reason,
            matched_token_id=matched,
            message=message,
            status=status,
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached,
            completion_tokens=self.stream.delivered + len(self.fresh),
        )
        self.ended = True
        self.stream.put(self._delta(finish))

    def _delta(self, finish: EngineFinish | None) -> EngineDelta:
        delta = EngineDelta(self.fresh, finish, self.fresh_logprobs)
        self.fresh, self.fresh_logprobs = [], []
        return delta
