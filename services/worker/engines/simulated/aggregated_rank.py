"""The aggregated role: prompts first, then steps, both from the same pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from services.worker.engines.kv_events import KvEvent
from services.worker.engines.simulated.prompt_rank import PromptRank
from services.worker.engines.simulated.rank import Forward
from services.worker.engines.simulated.request import Request


class AggregatedRank(PromptRank):
    """See `Rank`."""

    def __init__(self, *arguments: Any, tell: Callable[[KvEvent], None]) -> None:
        super().__init__(*arguments, tell=tell)
        self._running: dict[Request, None] = {}

    def _enqueue(self, request: Request) -> None:
        self._waiting.append(request)

    def _admit(self, now: float) -> None:
        """Nothing but the queue, which the next chunk looks at."""

    def _dues(self, now: float) -> Iterable[float | None]:
        return ()

    def _next_forward(self, start: float) -> Forward | None:
        chunk = self._next_chunk(start)
        if chunk is not None or not self._running:
            return chunk
        return Forward(start + self.options.decode_step * self.faults.slow, list(self._running))

    def _complete(self, forward: Forward, now: float) -> None:
        if forward.chunks:
            self._complete_chunk(forward, now)
        else:
            self._step(forward.requests)

    def _output_room(self, request: Request) -> int:
        return request.max_new_tokens

    def _chunk_computed(self, request: Request, now: float) -> None:
        if request.table is not None:
            self._running[request] = None
            self._emit(request, request.table.context())

    def _drop(self, request: Request, reason: str) -> None:
        self._unqueue(request)
        self._running.pop(request, None)
        self._let_go(request)
