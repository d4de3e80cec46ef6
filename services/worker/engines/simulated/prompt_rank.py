"""Prompts: chunks of them at a time, over a cache of prefixes. What prefill and the aggregated role share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from services.worker.engines.kv_events import KvEvent
from services.worker.engines.simulated.faults import Phase
from services.worker.engines.simulated.oracle import to_bytes
from services.worker.engines.simulated.pages import BlockTable
from services.worker.engines.simulated.prefix_cache import PrefixCache
from services.worker.engines.simulated.rank import Forward, Rank
from services.worker.engines.simulated.request import Request


class PromptRank(Rank):
    """Queue, admission and chunks; what a computed chunk leads to is the role's."""

    def __init__(self, *arguments: Any, tell: Callable[[KvEvent], None]) -> None:
        super().__init__(*arguments)
        self._cache = PrefixCache(self.allocator, self.options.page_size, tell) if self.options.prefix_cache else None
        self._waiting: deque[Request] = deque()
        self._computing: list[Request] = []

    @property
    def evictable(self) -> int:
        """See `Rank`."""
        return self._cache.unused if self._cache is not None else 0

    def flush_cache(self) -> None:
        """Forgets every prefix."""
        if self._cache is not None:
            self._cache.clear()

    def _next_chunk(self, start: float) -> Forward | None:
        """A forward pass over the prompts in turn, as many as fit."""
        budget, requests, chunks = self.options.chunk_tokens, list[Request](), list[int]()
        while budget:
            request = self._next_to_compute(requests)
            if request is None:
                break
            chunk = min(budget, len(request.prompt) - request.computed)
            requests.append(request)
            chunks.append(chunk)
            budget -= chunk
        if not requests:
            return None
        seconds = self.options.prefill_base + self.options.prefill_token * sum(chunks)
        return Forward(start + seconds * self.faults.slow, requests, chunks)

    def _next_to_compute(self, chosen: list[Request]) -> Request | None:
        """The first that is neither chosen nor held, of those with pages and then of the queue."""
        for request in self._computing:
            if request not in chosen and not self._stands_still(Phase.PREFILLING, request):
                return request
        while (request := self._start_next()) is not None and self._stands_still(Phase.PREFILLING, request):
            pass
        return request

    def _start_next(self) -> Request | None:
        """The first request of the queue, with slot and pages, if there are any for it."""
        if not self._waiting or self.holding >= self.options.max_running_requests:
            return None
        request = self._waiting[0]
        cached = self._cache.match(request.prompt, request.cache_salt) if self._cache is not None else []
        needed = -(-(len(request.prompt) + self._output_room(request)) // self.options.page_size) - len(cached)
        if self._cache is not None and needed > self.allocator.free:
            self._cache.evict(needed - self.allocator.free)
        pages = self.allocator.allocate(needed)
        if pages is None:
            self.allocator.release(cached)
            return None
        self._waiting.popleft()
        self._hold(request, cached + pages)
        request.cached = request.computed = len(cached) * self.options.page_size
        self._computing.append(request)
        return request

    def _complete_chunk(self, forward: Forward, now: float) -> None:
        for request, chunk in zip(forward.requests, forward.chunks, strict=True):
            if request.ended:
                continue
            first, request.computed = request.computed, request.computed + chunk
            self.array.put(request.pages, first, to_bytes(request.prompt[first : request.computed]))
            if request.computed == len(request.prompt):
                self._computing.remove(request)
                request.table = BlockTable(self.array, request.pages, request.computed)
                if self._cache is not None and not request.pretends:
                    self._cache.insert(request.prompt, request.pages, request.cache_salt)
            self._chunk_computed(request, now)

    def _unqueue(self, request: Request) -> None:
        if request in self._computing:
            self._computing.remove(request)
        elif not request.pages and request in self._waiting:
            self._waiting.remove(request)

    def _output_room(self, request: Request) -> int:
        """Output tokens that need pages here."""
        raise NotImplementedError

    def _chunk_computed(self, request: Request, now: float) -> None:
        """The request's KV cache is there up to `request.computed`; with a table when that is all."""
        raise NotImplementedError
