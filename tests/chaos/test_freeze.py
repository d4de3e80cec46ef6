"""Prefill freezes in a transfer, decode goes on, prefill thaws and writes the rest: no answer changes.

The frozen process holds page numbers of decode's memory and writes into them whatever has become of the request. So
the pages must not be another request's by then, although decode's pool is so small that every other page is used again
and again meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncGenerator

import pytest

from kvbaton.client import Client
from kvbaton.errors import Reason, RequestError
from tests.support.processes import Processes, all_proven, all_routable
from tests.support.simulator import Simulator
from tests.support.traffic import WRONG_ANSWER, ask
from tests.support.waiting import eventually

PAGE = 16
PROMPT_PAGES = 8
# A page takes its prefill this many seconds to write, a whole prompt PROMPT_PAGES times as many.
PAGE_SECONDS = 0.4
FROZEN_SECONDS = 7.0
DOOMED = 3
ANSWER = 30
REQUEST_PAGES = PROMPT_PAGES + 2
# The doomed requests' pages, and room for four others at a time.
POOL_PAGES = (DOOMED + 4) * REQUEST_PAGES
CONCURRENCY = 12
# How often the rest of the pool is used meanwhile.
USED_AGAIN = 10

# Decode takes a prefill for dead before it thaws, and fails its transfers by itself. As with SGLang's own, longer times
# the frontend has missed it before.
GIVES_UP = "heartbeat_interval=1.5,heartbeat_timeout=0.3,heartbeat_failures=2"


def start(processes: Processes, decode: str) -> None:
    processes.frontend("--link", "session", "--heartbeat", "1")
    slow = f"prefix_cache=false,transfer_byte={PAGE_SECONDS / (PAGE * 4)}"
    processes.worker("frozen", "prefill", sim=slow)
    processes.worker("healthy", "prefill", sim="prefix_cache=false")
    processes.worker("decode", "decode", sim=f"max_total_tokens={POOL_PAGES * PAGE},decode_step=0.002,{decode}")


async def rank(processes: Processes, name: str) -> dict[str, int]:
    async with Simulator(processes.system_endpoints[name]) as simulator:
        (only,) = (await simulator.state())["ranks"]
        return only


class Others:
    """Requests that come one behind the other while something happens to a worker."""

    def __init__(self, client: Client) -> None:
        self.answered = 0
        self._client = client
        self._on = True

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[Others]:
        """They run inside; their failures are raised at the end."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CONCURRENCY):
                tasks.create_task(self._ask_on())
            try:
                yield self
            finally:
                self._on = False

    async def more(self, count: int) -> None:
        """Waits until so many more are answered."""
        enough = self.answered + count
        await eventually(lambda: self.answered >= enough, within=30, what=f"{count} more answers")

    async def _ask_on(self) -> None:
        while self._on:
            await ask(self._client, prompt_tokens=PROMPT_PAGES * PAGE, tokens=ANSWER)
            self.answered += 1


async def freeze_in_transfers(processes: Processes, client: Client) -> list[asyncio.Task[None]]:
    """Requests of which half are in the middle of their transfers from the frozen prefill."""
    asked_at = time.monotonic()
    running = [
        asyncio.create_task(ask(client, prompt_tokens=PROMPT_PAGES * PAGE, tokens=ANSWER)) for _ in range(2 * DOOMED)
    ]

    async def only_the_slow_ones_are_left() -> bool:
        return sum(task.done() for task in running) == DOOMED

    await eventually(only_the_slow_ones_are_left)
    await asyncio.sleep(asked_at + PAGE_SECONDS * PROMPT_PAGES / 3 - time.monotonic())
    assert (await rank(processes, "frozen"))["holding"] == DOOMED, "none of the transfers is complete"
    processes.signal("frozen", signal.SIGSTOP)
    return running


@pytest.mark.peers(3)
@pytest.mark.parametrize("decode", ["", GIVES_UP], ids=["decode-waits", "decode-gives-up"])
async def test_no_answer_changes(processes: Processes, decode: str) -> None:
    start(processes, decode)
    async with Client(processes.target) as client:
        await all_routable(client, 3)
        await all_proven(processes, client, 2)
        doomed = await freeze_in_transfers(processes, client)
        frozen_at = time.monotonic()
        # What is sent to it before it is missed would be quarantined too, and fill the small pool.
        await all_routable(client, 2)
        async with Others(client).running() as others:
            # The doomed requests are answered too: another prefill takes them over.
            await asyncio.gather(*doomed)
            taken_over_after = time.monotonic() - frozen_at
            assert taken_over_after < FROZEN_SECONDS, "else the freeze would prove nothing"
            await asyncio.sleep(FROZEN_SECONDS - taken_over_after)
            await others.more(USED_AGAIN * (POOL_PAGES - DOOMED * REQUEST_PAGES) // REQUEST_PAGES - others.answered)

            async def as_promised() -> bool:
                return (await rank(processes, "decode"))["held_back"] == (DOOMED if decode else 0)

            await eventually(as_promised, what="decode has given up the doomed requests, or waits")
            state = await rank(processes, "decode")
            processes.signal("frozen", signal.SIGCONT)
            await others.more(2 * CONCURRENCY)
        print(f"taken over after {taken_over_after:.2f} s, {others.answered} others")
        assert state["free_pages"] <= POOL_PAGES - DOOMED * REQUEST_PAGES, "the doomed requests' pages are quarantined"

        async def all_pages_are_free() -> bool:
            return (await rank(processes, "decode"))["free_pages"] == POOL_PAGES

        await eventually(all_pages_are_free)
        await all_routable(client, 3)


@pytest.mark.peers(3)
async def test_the_oracle_notices_pages_that_are_used_again_under_a_write(processes: Processes) -> None:
    """What the tests above would say if decode gave pages away whose writer is only frozen."""
    # A page that is written amid its request's answer spoils it; so slow that pages are seldom anything else.
    start(processes, f"{GIVES_UP},deferred_release=false,decode_step=0.05")
    async with Client(processes.target) as client:
        await all_routable(client, 3)
        await all_proven(processes, client, 2)
        doomed = await freeze_in_transfers(processes, client)
        await all_routable(client, 2)
        await asyncio.gather(*doomed)

        async def all_pages_are_free() -> bool:
            return (await rank(processes, "decode"))["free_pages"] == POOL_PAGES

        await eventually(all_pages_are_free)

        async def others_while_it_thaws() -> None:
            async with Others(client).running() as others:
                await others.more(CONCURRENCY)
                processes.signal("frozen", signal.SIGCONT)
                # On a busy machine the thawed worker may be late; the first wrong answer ends it.
                for _ in range(6):
                    await others.more(CONCURRENCY)

        with pytest.raises(ExceptionGroup) as caught:
            await others_while_it_thaws()
        # A page that is spoilt before decode's first token shows in that, and the frontend notices by itself.
        first_token = caught.group_contains(RequestError, match=Reason.FIRST_TOKEN_MISMATCH)
        assert first_token or caught.group_contains(AssertionError, match=WRONG_ANSWER)
