"""A decode worker is killed, frozen or stopped amid its answers: each goes on elsewhere, token for token."""

from __future__ import annotations

import asyncio
import signal

import pytest

from kvbaton.client import Answer, Client
from tests.support.processes import Processes, all_proven, all_routable
from tests.support.simulator import Simulator
from tests.support.traffic import fresh_prompt, greedy, oracle
from tests.support.waiting import eventually

DECODES = ("decode0", "decode1", "decode2")
REQUESTS = 18
# So slow that no answer is complete before the fault; behind it the survivors take milliseconds.
LENGTH = 400
STEP_SECONDS = 0.05
AMID = 3


class Streamed:
    """One request, and what its client has of it so far."""

    def __init__(self, client: Client) -> None:
        self.prompt = fresh_prompt(40)
        self.answer = Answer()
        self.task = asyncio.create_task(self._read(client))

    async def _read(self, client: Client) -> None:
        async for chunk in client.stream(token_ids=self.prompt, sampling=greedy(LENGTH), timeout=120):
            self.answer.add(chunk)


async def live(processes: Processes, name: str) -> int:
    async with Simulator(processes.system_endpoints[name]) as simulator:
        return sum(rank["live"] for rank in (await simulator.state())["ranks"])


async def nothing_held(processes: Processes, name: str) -> bool:
    async with Simulator(processes.system_endpoints[name]) as simulator:
        return not any(rank["holding"] or rank["live"] for rank in (await simulator.state())["ranks"])


@pytest.mark.parametrize(
    "fault", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM], ids=["killed", "frozen", "shut-down"]
)
async def test_no_client_notices(processes: Processes, fault: signal.Signals) -> None:
    processes.frontend("--link", "session", "--heartbeat", "1")
    processes.worker("prefill", "prefill")
    for name in DECODES:
        processes.worker(name, "decode", "--drain-timeout", "0.2", sim=f"decode_step={STEP_SECONDS}")
    async with Client(processes.target) as client:
        await all_routable(client, 1 + len(DECODES))
        await all_proven(processes, client, len(DECODES))
        requests = [Streamed(client) for _ in range(REQUESTS)]
        await eventually(lambda: all(len(request.answer.token_ids) >= AMID for request in requests), within=20)
        legs = {name: await live(processes, name) for name in DECODES}
        victim = max(DECODES, key=lambda name: legs[name])
        assert sum(legs.values()) == REQUESTS, "all of them are amid their answers"
        processes.signal(victim, fault)
        survivors = [name for name in DECODES if name != victim]
        for name in survivors:
            async with Simulator(processes.system_endpoints[name]) as simulator:
                await simulator.slow(0.01)
        await asyncio.gather(*(request.task for request in requests))
        assert all(request.answer.token_ids == oracle(request.prompt, LENGTH) for request in requests)
        assert sum(request.answer.finished.migrations for request in requests) >= legs[victim] > 0
        assert all(request.answer.finished.usage.prompt_tokens == 40 for request in requests)
        if fault is signal.SIGSTOP:
            processes.signal(victim, signal.SIGCONT)
            survivors.append(victim)
        for name in ("prefill", *survivors):

            async def is_free(name: str = name) -> bool:
                return await nothing_held(processes, name)

            await eventually(is_free, within=15, every=0.1, what=f"{name} is free")
