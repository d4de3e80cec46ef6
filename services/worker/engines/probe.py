"""The probe that every engine is asked for: one real token, in a disaggregated role through a pretended peer."""

from __future__ import annotations

import uuid

from services.worker.engines.protocol import Engine, EngineRefusedError, EngineRequest, Room, Sampling

# SGLang's bootstrap host for requests that pretend to have a peer (FAKE_BOOTSTRAP_HOST); they move no KV cache.
FAKE_PEER = "2.2.2.2"


async def generate_one_token(engine: Engine, *, dp_rank: int, bootstrap_port: int | None) -> None:
    """One token from that rank. `bootstrap_port` is None for an aggregated engine.

    Raises EngineDeadError, or RuntimeError with what came back instead of a token.
    """
    request = EngineRequest(
        engine_id=uuid.uuid4().hex,
        token_ids=[0],
        sampling=Sampling(max_new_tokens=1, temperature=0.0),
        room=None if bootstrap_port is None else Room(FAKE_PEER, bootstrap_port, 0),
        dp_rank=dp_rank,
    )
    tokens: list[int] = []
    ending = "nothing"
    try:
        async for delta in engine.generate(request):
            tokens += delta.token_ids
            if delta.finish is not None:
                ending = f"{delta.finish.reason} {delta.finish.message}".strip()
    except EngineRefusedError as error:
        raise RuntimeError(f"the probe was refused: {error}") from error
    finally:
        # Also when the caller leaves: an unread probe would stay in the engine. Nothing happens if it has ended.
        await engine.abort(request.engine_id)
    if len(tokens) != 1:
        raise RuntimeError(f"the probe got {len(tokens)} tokens and then {ending}")
