"""An embedding request as engines run it: each input is a request of its own, and all of them end together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from services.worker.engines.protocol import EmbeddingRequest, EngineAbortedError, EngineRefusedError, Vector

# Of an engine id's 32 hex digits the last four number the inputs.
_NUMBER_DIGITS = 4


class EmbeddingBatches:
    """The running embedding requests of one engine; belongs to its event loop."""

    def __init__(self, embed_one: Callable[[str, list[int], EmbeddingRequest], Awaitable[Vector]]) -> None:
        """`embed_one(engine_id, token_ids, request)` runs one input; when it ends the engine has let go of it."""
        self._embed_one = embed_one
        self._running: dict[str, list[str]] = {}

    def inputs_of(self, engine_id: str) -> list[str]:
        """The engine ids of a running request's inputs; empty for any other id."""
        return self._running.get(engine_id, [])

    async def run(self, request: EmbeddingRequest, abort_one: Callable[[str], Awaitable[None]]) -> list[Vector]:
        """The vectors in the order of the inputs. What fails first, or a caller that leaves, aborts the rest."""
        if request.engine_id in self._running:
            raise EngineRefusedError(f"engine id {request.engine_id} is in use")
        stem = request.engine_id[:-_NUMBER_DIGITS]
        ids = [f"{stem}{index:0{_NUMBER_DIGITS}x}" for index in range(len(request.inputs))]
        self._running[request.engine_id] = ids

        async def one(engine_id: str, token_ids: list[int]) -> Vector:
            try:
                return await self._embed_one(engine_id, token_ids, request)
            except BaseException:
                await abort_rest()
                raise

        async def abort_rest() -> None:
            running = self._running.get(request.engine_id, [])
            self._running[request.engine_id] = []
            for each in running:
                await abort_one(each)

        try:
            outcomes = await asyncio.gather(*map(one, ids, request.inputs), return_exceptions=True)
        finally:
            del self._running[request.engine_id]
        failures = [each for each in outcomes if isinstance(each, BaseException)]
        if failures:
            # The others' aborts are only what the first failure led to.
            raise min(failures, key=lambda error: isinstance(error, EngineAbortedError))
        return [each for each in outcomes if not isinstance(each, BaseException)]
