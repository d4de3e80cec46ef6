"""The embedding role: prompts are computed, and that is all."""

from __future__ import annotations

from collections.abc import Iterable

from services.worker.engines.protocol import Finish
from services.worker.engines.simulated.prompt_rank import PromptRank
from services.worker.engines.simulated.rank import Forward
from services.worker.engines.simulated.request import Request


class EmbeddingRank(PromptRank):
    """See `Rank`. Its requests end without a token."""

    def _enqueue(self, request: Request) -> None:
        self._waiting.append(request)

    def _admit(self, now: float) -> None:
        """Nothing but the queue, which the next chunk looks at."""

    def _dues(self, now: float) -> Iterable[float | None]:
        return ()

    def _next_forward(self, start: float) -> Forward | None:
        return self._next_chunk(start)

    def _complete(self, forward: Forward, now: float) -> None:
        self._complete_chunk(forward, now)

    def _output_room(self, request: Request) -> int:
        return 0

    def _chunk_computed(self, request: Request, now: float) -> None:
        if request.table is not None:
            self._drop(request, "")
            self._end(request, Finish.STOP)

    def _drop(self, request: Request, reason: str) -> None:
        self._unqueue(request)
        self._let_go(request)
