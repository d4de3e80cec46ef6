"""A worker is killed before the first token: another pair answers, or one typed error comes soon and all is let go."""

from __future__ import annotations

import asyncio
import time

import pytest

from kvbaton.client import Client
from kvbaton.errors import Reason, RequestError
from tests.support.processes import Processes, all_proven, all_routable
from tests.support.simulator import Simulator
from tests.support.traffic import ask
from tests.support.waiting import eventually

# The promises, in seconds. Tests run on machines with a few noisy cores: they allow so many times more.
TYPED_ERROR_WITHIN = 2.0
SLOT_FREE_WITHIN = 5.0
SLACK = 3.0

REQUESTS = 32
# Prefill takes so long that every request of a test is in front of its first token when the worker dies.
PREFILL_SECONDS = 2.0


def start(processes: Processes, pairs: int) -> None:
    # A kill shows by the connection. A process of a busy machine that is silent for a while is no fault.
    processes.frontend("--link", "session", "--heartbeat", "2", "--ready-queue-timeout", "0")
    for number in range(pairs):
        processes.worker(f"prefill{number}", "prefill", sim="prefix_cache=false")
        processes.worker(f"decode{number}", "decode", sim="release_on_disconnect=true")


async def slow_prefills(processes: Processes, pairs: int) -> None:
    for number in range(pairs):
        async with Simulator(processes.system_endpoints[f"prefill{number}"]) as simulator:
            # The simulated engine takes 0.5 ms for a chunk.
            await simulator.slow(PREFILL_SECONDS / 0.0005)


async def live_legs(processes: Processes, name: str) -> int:
    async with Simulator(processes.system_endpoints[name]) as simulator:
        return sum(rank["live"] for rank in (await simulator.state())["ranks"])


async def holding(processes: Processes, name: str) -> int:
    """Slots that are taken, also by ended requests whose pages wait for their writer."""
    async with Simulator(processes.system_endpoints[name]) as simulator:
        return sum(rank["holding"] for rank in (await simulator.state())["ranks"])


@pytest.mark.peers(1)
@pytest.mark.parametrize("killed", ["prefill0", "decode0"])
async def test_with_two_pairs_no_client_sees_an_error(processes: Processes, killed: str) -> None:
    start(processes, pairs=2)
    async with Client(processes.target) as client:
        await all_routable(client, 4)
        await all_proven(processes, client, 4)
        await slow_prefills(processes, pairs=2)
        running = [asyncio.create_task(ask(client, prompt_tokens=40, tokens=12)) for _ in range(REQUESTS)]

        async def all_run_and_many_there() -> bool:
            role = killed.rstrip("01")
            legs = {f"{role}{number}": await live_legs(processes, f"{role}{number}") for number in range(2)}
            return sum(legs.values()) == REQUESTS and legs[killed] >= REQUESTS // 4

        await eventually(all_run_and_many_there, every=0.05)
        await asyncio.to_thread(processes.kill, killed)
        await asyncio.gather(*running)
        survivors = {"prefill0", "prefill1", "decode0", "decode1"} - {killed}
        for survivor in survivors:

            async def nothing_held(survivor: str = survivor) -> bool:
                return not await holding(processes, survivor)

            await eventually(nothing_held, within=SLACK * SLOT_FREE_WITHIN)


@pytest.mark.peers(1)
@pytest.mark.parametrize(("killed", "survivor"), [("prefill0", "decode0"), ("decode0", "prefill0")])
async def test_with_one_pair_the_error_is_typed_and_quick_and_the_slot_is_free(
    processes: Processes, killed: str, survivor: str
) -> None:
    """The simulated decode takes a broken data connection for its writer's death (`release_on_disconnect`).

    tests/e2e/test_lost_prefill.py has SGLang's. Without `--ready-queue-timeout` the error waits for nobody's return.
    """
    start(processes, pairs=1)
    async with Client(processes.target) as client:
        await all_routable(client, 2)
        await all_proven(processes, client, 1)
        await slow_prefills(processes, pairs=1)
        running = asyncio.create_task(ask(client, prompt_tokens=40, tokens=12))

        async def both_legs_run() -> bool:
            return bool(await holding(processes, "decode0") and await live_legs(processes, "prefill0"))

        await eventually(both_legs_run, every=0.05)
        killed_at = time.monotonic()
        await asyncio.to_thread(processes.kill, killed)
        with pytest.raises(RequestError) as caught:
            await running
        error_after = time.monotonic() - killed_at
        assert caught.value.reason in {Reason.WORKER_UNREACHABLE, Reason.ENGINE_ABORTED}
        assert caught.value.leg in {"prefill", "decode"}
        assert error_after < SLACK * TYPED_ERROR_WITHIN

        async def let_go() -> bool:
            return not await holding(processes, survivor) and not await live_legs(processes, survivor)

        await eventually(let_go, within=SLACK * SLOT_FREE_WITHIN - error_after)
        print(
            f"killed {killed}: {caught.value.reason} after {error_after:.3f} s,"
            f" all let go after {time.monotonic() - killed_at:.3f} s"
        )
