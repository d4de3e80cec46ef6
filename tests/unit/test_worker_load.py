"""What a worker tells frontends of its load: every leg from its arrival until the engine has let go of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import structlog

from kvbaton.v1 import generate_pb2
from services.requests import Role
from services.worker.engines.protocol import EngineDeadError, EngineDelta, EngineFinish, EngineLoad, Finish
from services.worker.load import LegLoads


def request(tokens: int = 100, *, room: int = 0, dp_rank: int | None = None) -> generate_pb2.GenerateRequest:
    made = generate_pb2.GenerateRequest(token_ids=generate_pb2.TokenIds(ids=range(tokens)), dp_rank=dp_rank)
    if room:
        made.bootstrap.room = room
    return made


def load(loads: LegLoads, rank: int = 0) -> tuple[int, int, int]:
    """Requests, prompt tokens to compute, tokens in the KV cache."""
    for each in loads.ranks():
        if each.dp_rank == rank:
            return (each.running_requests + each.waiting_requests, each.prefill_tokens, each.used_tokens)
    return (0, 0, 0)


async def engine(*steps: int, finish: bool = True) -> AsyncIterator[EngineDelta]:
    for tokens in steps:
        yield EngineDelta([1] * tokens)
        await asyncio.sleep(0)
    if finish:
        yield EngineDelta([], EngineFinish(Finish.LENGTH))


async def test_a_prompt_is_work_until_its_first_token_and_memory_until_its_end() -> None:
    loads = LegLoads(Role.PREFILL)
    leg = loads.expect(request(100), dp_size=1, cached_tokens=64)
    assert load(loads) == (1, 36, 100)
    deltas = leg.follow(engine(1, 2))
    await anext(deltas)
    assert load(loads) == (1, 0, 101)
    await anext(deltas)
    assert load(loads) == (1, 0, 103)
    async for _ in deltas:
        pass
    assert load(loads) == (0, 0, 0)


async def test_a_decode_worker_computes_no_prompts() -> None:
    loads = LegLoads(Role.DECODE)
    loads.expect(request(100, room=7), dp_size=1)
    assert load(loads) == (1, 0, 100)


async def test_a_leg_that_its_caller_leaves_counts_until_the_engine_has_let_go() -> None:
    loads = LegLoads(Role.AGGREGATED)
    leg = loads.expect(request(10), dp_size=1)
    deltas = leg.follow(engine(1, 1))
    await anext(deltas)
    leg.leave()
    assert load(loads)[0] == 1
    async for _ in deltas:
        pass
    assert load(loads)[0] == 0


async def test_a_leg_that_is_refused_is_no_load() -> None:
    loads = LegLoads(Role.AGGREGATED)
    with contextlib.suppress(ValueError), loads.expect(request(10), dp_size=1):
        raise ValueError
    assert load(loads) == (0, 0, 0)


async def test_a_room_says_the_prefill_rank_and_the_request_the_others() -> None:
    loads = LegLoads(Role.PREFILL)
    loads.expect(request(1, room=5), dp_size=4)
    loads.expect(request(2, dp_rank=3), dp_size=4)
    assert (load(loads, 1)[0], load(loads, 3)[0]) == (1, 1)
    decode = LegLoads(Role.DECODE)
    decode.expect(request(1, room=5, dp_rank=2), dp_size=4)
    assert load(decode, 2)[0] == 1


async def test_what_else_the_engine_holds_is_load_too() -> None:
    loads = LegLoads(Role.DECODE)
    loads.expect(request(100), dp_size=1)

    async def says() -> list[EngineLoad]:
        return [EngineLoad(0, running_requests=0, waiting_requests=1, used_tokens=356, total_tokens=4096)]

    before = loads.version
    await loads.ask_engine(says, older_than=0.0)
    (rank,) = loads.ranks()
    assert (rank.used_tokens, rank.total_tokens, rank.waiting_requests) == (356, 4096, 1)
    assert loads.version > before
    loads.expect(request(44), dp_size=1)
    assert loads.ranks()[0].used_tokens == 400


async def test_sessions_share_what_the_engine_said_and_a_dead_one_changes_nothing() -> None:
    loads, asked = LegLoads(Role.DECODE), list[int]()

    async def says() -> list[EngineLoad]:
        asked.append(1)
        raise EngineDeadError("gone")

    await asyncio.gather(*(loads.ask_engine(says, older_than=10.0) for _ in range(5)))
    assert len(asked) == 1
    assert loads.ranks() == []


async def test_what_fails_unexpectedly_is_logged_once_and_asked_again() -> None:
    loads, failing = LegLoads(Role.DECODE), True

    async def says() -> list[EngineLoad]:
        if failing:
            raise ValueError("half a snapshot")
        return [EngineLoad(0, 0, 0, used_tokens=300, total_tokens=1000)]

    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            await loads.ask_engine(says, older_than=0.0)
    assert [each["event"] for each in logs] == ["engine_load_not_read"]
    failing = False
    await loads.ask_engine(says, older_than=0.0)
    assert load(loads)[2] == 300
