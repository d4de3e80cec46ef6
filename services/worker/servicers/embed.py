"""EmbedService of a worker: one call, all of its vectors or none.

A call is a leg like any other: it has a live id, is counted, waited for by the drain and ended by it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import grpc

from kvbaton.errors import Reason, RequestError, invalid
from kvbaton.v1 import embed_pb2, embed_pb2_grpc
from services.embedding_requests import (
    EmbeddingSize,
    FittedInput,
    check_count,
    check_dimensions,
    check_tokens,
    fit_sent,
    input_field,
)
from services.modes import EMBED
from services.requests import check_request_id
from services.telemetry.tracing import pick_headers
from services.worker.core import Loaded, WorkerCore
from services.worker.engines.protocol import (
    EmbeddingRequest,
    EngineAbortedError,
    EngineDeadError,
    EngineDelta,
    EngineFinish,
    EngineRefusedError,
    Finish,
    Vector,
)
from services.worker.leg_errors import LegErrors
from services.worker.legs import Leg


@dataclass(frozen=True, slots=True)
class _Checked:
    """A request as the model takes it; `dimensions` None for whole vectors."""

    inputs: list[FittedInput]
    dimensions: int | None
    prompt_tokens: int


class EmbedServicer(embed_pb2_grpc.EmbedServiceServicer):
    """One per worker; in another role than embedding it refuses."""

    def __init__(self, core: WorkerCore) -> None:
        self._core = core
        self._errors = LegErrors(core)

    async def Embed(
        self, request: embed_pb2.EmbedRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> embed_pb2.EmbedResponse:
        """Cancelling the call aborts it in the engine."""
        received = time.monotonic()
        core = self._core
        core.require_rpc(EMBED)
        request_id = check_request_id(request.request_id)
        loaded = core.require_accepting()
        loaded.require_model(request.model)
        checked = _check(request, loaded)
        self._require_slot()
        run = _Run(loaded, checked, pick_headers(context.invocation_metadata() or ()))
        submitted = time.monotonic()
        leg = core.legs.admit(request_id, run.deltas)
        try:
            async for delta in leg.deltas():
                if delta.finish is not None and delta.finish.reason is Finish.ABORT:
                    raise self._errors.aborted(leg, delta.finish)
        except (EngineRefusedError, EngineDeadError, RequestError) as error:
            raise self._errors.typed(error).with_context(request_id=leg.request_id) from error
        finally:
            await core.legs.leave(leg)
        response = embed_pb2.EmbedResponse(
            embeddings=[
                # Little endian on every machine that runs this.
                embed_pb2.Embedding(
                    float32=vector.tobytes(), prompt_tokens=len(each.token_ids), truncated=each.truncated
                )
                for vector, each in zip(run.vectors, checked.inputs, strict=True)
            ],
            usage=embed_pb2.EmbedUsage(prompt_tokens=checked.prompt_tokens),
            request_id=leg.request_id,
            worker=core.instance_id,
        )
        response.timings.queue.FromNanoseconds(int((submitted - received) * 1e9))
        response.timings.compute.FromNanoseconds(int((time.monotonic() - submitted) * 1e9))
        return response

    def _require_slot(self) -> None:
        """The engine would queue without end, behind other frontends' calls too."""
        core = self._core
        if len(core.legs) >= core.slots:
            raise RequestError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                Reason.TOO_MANY_REQUESTS,
                f"{len(core.legs)} calls are live on this worker, it takes {core.slots} at once (--window)",
                leg=core.role,
                worker=core.instance_id,
                retry_after=1.0,
            )


class _Run:
    """One call inside the engine. Its vectors are there when its deltas have ended well."""

    def __init__(self, loaded: Loaded, checked: _Checked, trace_headers: dict[str, str]) -> None:
        self.vectors: list[Vector] = []
        self._engine = loaded.engine
        inputs = [each.token_ids for each in checked.inputs]
        self._request = EmbeddingRequest("", inputs, checked.dimensions, trace_headers)

    async def deltas(self, leg: Leg) -> AsyncIterator[EngineDelta]:
        """One, without tokens: the end."""
        try:
            self.vectors = await self._engine.embed(replace(self._request, engine_id=leg.engine_id))
        except EngineAbortedError as error:
            yield EngineDelta([], error.finish)
        else:
            yield EngineDelta([], EngineFinish(Finish.STOP))


def _check(request: embed_pb2.EmbedRequest, loaded: Loaded) -> _Checked:
    """The cheap checks first. Raises RequestError naming the field."""
    size = EmbeddingSize.from_proto(loaded.record.runtime.embedding)
    dimensions = check_dimensions(request, size)
    check_count(request, dimensions or size.dimension)
    for index, each in enumerate(request.inputs):
        given = each.WhichOneof("input")
        if given != "token_ids":
            field = input_field(index, given or "token_ids")
            raise invalid(field, "a worker takes token_ids only; text is the frontend's")
    inputs = [
        fit_sent(each.token_ids, loaded.limits, truncate=request.truncate, field=input_field(index))
        for index, each in enumerate(request.inputs)
    ]
    return _Checked(inputs, dimensions, check_tokens(inputs))
