"""Simulated engines in this process, over real sockets, and requests through them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from services.requests import Role, Room, Sampling
from services.worker.engines.protocol import EngineFinish, EngineRequest, Finish, TokenLogprob
from services.worker.engines.simulated import Addresses, SimulatedEngine, SimulatedOptions, control


def greedy(count: int) -> Sampling:
    """So many greedy tokens."""
    return Sampling(max_new_tokens=count, temperature=0.0)


def fresh_room(dp_rank: int = 0, dp_size: int = 1) -> int:
    """A room that SGLang maps to that rank."""
    return (secrets.randbelow(2**40) + 1) * dp_size + dp_rank


@dataclass
class Outcome:
    """What came of one leg."""

    tokens: list[int]
    finish: EngineFinish

    @property
    def aborted(self) -> bool:
        return self.finish.reason is Finish.ABORT


class Leg:
    """One request in one engine, running."""

    def __init__(
        self,
        engine: SimulatedEngine,
        prompt: list[int],
        sampling: Sampling,
        room: Room | None = None,
        dp_rank: int | None = None,
        logprobs: int | None = None,
    ) -> None:
        self.engine = engine
        self.engine_id = uuid.uuid4().hex
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        request = EngineRequest(self.engine_id, prompt, sampling, room, dp_rank, logprobs=logprobs)
        self._deltas = engine.generate(request)
        self.task = asyncio.create_task(self._run())
        # A leg that nobody waits for may end with its engine.
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _run(self) -> Outcome:
        async for delta in self._deltas:
            self.tokens += delta.token_ids
            self.logprobs += delta.logprobs
            if delta.finish is not None:
                return Outcome(self.tokens, delta.finish)
        raise AssertionError("the engine ended without a finish")

    async def result(self, within: float = 10.0) -> Outcome:
        """Waits for its end. Raises what the engine raises."""
        return await asyncio.wait_for(self.task, within)

    async def abort(self) -> None:
        await self.engine.abort(self.engine_id)


@contextlib.asynccontextmanager
async def started(
    role: Role, options: SimulatedOptions | None = None, addresses: Addresses | None = None
) -> AsyncGenerator[SimulatedEngine]:
    """An attached engine."""
    engine = SimulatedEngine(role, options or SimulatedOptions(), addresses)
    engine.start()
    await engine.attach()
    try:
        yield engine
    finally:
        engine.shutdown()
        await asyncio.sleep(0.01)


@dataclass
class Pair:
    """One prefill and one decode engine."""

    prefill: SimulatedEngine
    decode: SimulatedEngine

    def room(self, room: int) -> Room:
        return Room("127.0.0.1", self.prefill.bootstrap_port, room)

    def legs(
        self, prompt: list[int], sampling: Sampling, room: int | None = None, logprobs: int | None = None
    ) -> tuple[Leg, Leg]:
        """Both legs of a request, as a frontend sends them."""
        where = self.room(fresh_room() if room is None else room)
        prefill = Leg(self.prefill, prompt, sampling, where, logprobs=logprobs)
        return prefill, Leg(self.decode, prompt, sampling, where, logprobs=logprobs)

    async def generate(self, prompt: list[int], sampling: Sampling, room: int | None = None) -> Outcome:
        """Decode's outcome, once prefill has ended too."""
        prefill, decode = self.legs(prompt, sampling, room)
        first, outcome = await asyncio.gather(prefill.result(30), decode.result(30))
        if not outcome.aborted:
            assert first.tokens == outcome.tokens[:1], "prefill's token is decode's first"
        return outcome


@contextlib.asynccontextmanager
async def started_pair(
    prefill: SimulatedOptions | None = None, decode: SimulatedOptions | None = None
) -> AsyncGenerator[Pair]:
    """A pair; decode has prefill's options unless given its own."""
    async with started(Role.PREFILL, prefill) as first, started(Role.DECODE, decode or prefill) as second:
        yield Pair(first, second)


def do(engine: SimulatedEngine, what: str, **arguments: object) -> None:
    """A command, as POST /simulator would bring it."""
    control.apply(engine, {"do": what, **arguments})
