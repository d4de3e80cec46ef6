"""The probe that every engine is asked for: a real generation, in a disaggregated role through a pretended peer, or a
real embedding."""

from __future__ import annotations

import math
import uuid

from services.telemetry import tracing
from services.worker.engines.protocol import (
    EmbeddingRequest,
    Engine,
    EngineAbortedError,
    EngineFinish,
    EngineRefusedError,
    EngineRequest,
    Finish,
    ProbePayload,
    Room,
)

# SGLang's bootstrap host for requests that pretend to have a peer (FAKE_BOOTSTRAP_HOST); they move no KV cache.
FAKE_PEER = "2.2.2.2"


async def generate_probe(
    engine: Engine, payload: ProbePayload | None, *, dp_rank: int, bootstrap_port: int | None
) -> None:
    """An answer to `payload` from that rank. `bootstrap_port` is None for an aggregated engine.

    Judged on how it ends: an engine may stall, or abort, after its first token. Raises EngineDeadError, or
    RuntimeError with what came back instead of an answer.
    """
    payload = payload or ProbePayload()
    request = EngineRequest(
        engine_id=uuid.uuid4().hex,
        token_ids=list(payload.token_ids),
        sampling=payload.sampling,
        room=None if bootstrap_port is None else Room(FAKE_PEER, bootstrap_port, 0),
        dp_rank=dp_rank,
        trace_headers=tracing.headers_of(tracing.UNSAMPLED),
    )
    tokens = 0
    finish: EngineFinish | None = None
    try:
        async for delta in engine.generate(request):
            tokens += len(delta.token_ids)
            finish = delta.finish
    except EngineRefusedError as error:
        raise RuntimeError(f"the probe was refused: {error}") from error
    finally:
        # Also when the caller leaves: an unread probe would stay in the engine. Nothing happens if it has ended.
        await engine.abort(request.engine_id)
    if not tokens or finish is None or finish.reason is Finish.ABORT:
        ending = "nothing" if finish is None else f"{finish.reason} {finish.message}".strip()
        raise RuntimeError(f"the probe got {tokens} tokens and then {ending}")


async def embedding_probe(engine: Engine, payload: ProbePayload | None) -> None:
    """An embedding of the payload's tokens. Raises EngineDeadError, or RuntimeError with what came back instead."""
    payload = payload or ProbePayload()
    try:
        (vector,) = await engine.embed(EmbeddingRequest(uuid.uuid4().hex, [list(payload.token_ids)]))
    except (EngineRefusedError, EngineAbortedError) as error:
        raise RuntimeError(f"the probe was not embedded: {error}") from error
    if not vector or not all(map(math.isfinite, vector)):
        raise RuntimeError(f"the probe's embedding has {len(vector)} numbers, and some are not finite")
