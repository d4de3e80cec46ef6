"""An embedding request is as many requests of the engine as it has inputs, and all of them end together."""

from __future__ import annotations

import asyncio
import uuid
from array import array

import pytest

from services.worker.engines.embedding_batch import EmbeddingBatches
from services.worker.engines.protocol import (
    EmbeddingRequest,
    EngineAbortedError,
    EngineDeadError,
    EngineFinish,
    EngineRefusedError,
    Finish,
    Vector,
)


class Inputs:
    """What an engine runs; an input waits until it is settled or aborted."""

    def __init__(self) -> None:
        self.batches = EmbeddingBatches(self._embed_one)
        self.running: dict[str, asyncio.Future[Vector]] = {}
        self.aborts: list[str] = []

    async def _embed_one(self, engine_id: str, token_ids: list[int], request: EmbeddingRequest) -> Vector:
        self.running[engine_id] = asyncio.get_running_loop().create_future()
        return await self.running[engine_id]

    async def abort(self, engine_id: str) -> None:
        self.aborts.append(engine_id)
        if not self.running[engine_id].done():
            self.running[engine_id].set_exception(EngineAbortedError(EngineFinish(Finish.ABORT, message="aborted")))

    async def started(self, count: int) -> tuple[str, asyncio.Task[list[Vector]]]:
        engine_id = uuid.uuid4().hex
        request = EmbeddingRequest(engine_id, [[index] for index in range(count)])
        task = asyncio.create_task(self.batches.run(request, self.abort))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(self.running) == count
        return engine_id, task


async def test_vectors_come_in_the_order_of_their_inputs() -> None:
    inputs = Inputs()
    engine_id, task = await inputs.started(3)
    ids = inputs.batches.inputs_of(engine_id)
    for index, each in reversed(list(enumerate(ids))):
        inputs.running[each].set_result(array("f", [index]))
    assert [list(vector) for vector in await task] == [[0.0], [1.0], [2.0]]
    assert inputs.aborts == []
    assert inputs.batches.inputs_of(engine_id) == []


async def test_engine_ids_are_of_one_width_and_none_is_anothers_beginning() -> None:
    """SGLang matches aborts by prefix."""
    inputs = Inputs()
    engine_id, task = await inputs.started(300)
    ids = inputs.batches.inputs_of(engine_id)
    assert len(set(ids)) == 300
    assert {len(each) for each in ids} == {32}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_one_failure_ends_all_and_is_the_one_that_is_told() -> None:
    inputs = Inputs()
    engine_id, task = await inputs.started(3)
    ids = inputs.batches.inputs_of(engine_id)
    inputs.running[ids[2]].set_exception(EngineDeadError("gone"))
    with pytest.raises(EngineDeadError, match="gone"):
        await task
    assert sorted(inputs.aborts) == sorted(ids), "each once"


async def test_a_caller_that_leaves_ends_all() -> None:
    inputs = Inputs()
    engine_id, task = await inputs.started(2)
    ids = inputs.batches.inputs_of(engine_id)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(inputs.aborts) == sorted(ids)


async def test_a_live_id_is_not_taken_twice() -> None:
    inputs = Inputs()
    engine_id, task = await inputs.started(1)
    with pytest.raises(EngineRefusedError, match="in use"):
        await inputs.batches.run(EmbeddingRequest(engine_id, [[1]]), inputs.abort)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
