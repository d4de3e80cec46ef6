"""Ten thousand requests, three in ten cancelled wherever they are: every answer is right, nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import dataclass

import grpc
import pytest

from kvbaton.client import Client
from kvbaton.errors import RequestError
from kvbaton.v1.generate_pb2 import GenerateResponse
from services.frontend.request.states import State
from tests.support.processes import Processes, all_routable
from tests.support.resources import ONE_TRIMMED_ARENA, check_flat, footprints, gauges, settled
from tests.support.simulator import Simulator
from tests.support.traffic import WRONG_ANSWER, fresh_prompt, greedy, oracle
from tests.support.waiting import eventually

REQUESTS = 10_000
WARM_UP = 2_000
CONCURRENCY = 64
# The warm-up's peak is the higher one: what a heap has once held it keeps in part, fragmented.
WARM_UP_CONCURRENCY = 128
CANCELLED_SHARE = 0.3
MEMORY_GROWTH = 0.05
# Every phase must be hit by so many cancels. On a quiet machine it is more than ten times as many; on a busy one most
# of them find their requests in front of the workers, and a few more requests at a time are sent until they don't.
CANCELS_IN_EACH_PHASE = 2
MORE, FEW, MOST_ROUNDS = 400, 8, 10

# Pools that are full of cached prefixes before the first measurement; windows smaller than the load, so that requests
# queue; phases long enough to be cancelled in.
PREFILL = "max_total_tokens=16384,prefill_base=0.01,transfer_base=0.01,max_running_requests=32"
DECODE = "max_total_tokens=16384,decode_step=0.002,max_running_requests=32"
LONGEST_WAIT = 0.25


@pytest.fixture
def environment() -> Mapping[str, str]:
    """Memory can be compared."""
    return ONE_TRIMMED_ARENA


@dataclass(frozen=True, slots=True)
class Cancel:
    """When and how a client ends its request."""

    after_seconds: float | None = None
    after_tokens: int | None = None
    by_abort: bool = False
    """With the Abort call, which may overtake its request; else by closing the stream."""

    @classmethod
    def anywhere(cls) -> Cancel:
        """One in four in front of its request or with it, one in four in decode, the others at any time."""
        by_abort = random.random() < 0.5
        match random.randrange(4):
            case 0:
                return cls(after_seconds=0.004 * random.random(), by_abort=by_abort)
            case 1:
                return cls(after_tokens=random.randint(1, 3), by_abort=by_abort)
            case _:
                return cls(after_seconds=LONGEST_WAIT * random.random(), by_abort=by_abort)


class Load:
    """Requests through one frontend, so many at a time."""

    def __init__(self, client: Client) -> None:
        self.finished = 0
        self.cancelled = 0
        self._client = client

    async def run(self, requests: int, concurrency: int) -> None:
        """Raises what any of them did wrong."""
        left = iter(range(requests))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(concurrency):
                tasks.create_task(self._one_after_the_other(left))

    async def _one_after_the_other(self, left: Iterator[int]) -> None:
        for _ in left:
            cancel = Cancel.anywhere() if random.random() < CANCELLED_SHARE else Cancel()
            await self._ask(cancel)

    async def _ask(self, cancel: Cancel) -> None:
        prompt, count, request_id = fresh_prompt(random.randint(4, 64)), random.randint(4, 16), uuid.uuid4().hex
        received: list[int] = []
        wanted = cancel == Cancel()
        try:
            async with self._cancelling(cancel, request_id):
                stream = self._client.stream(token_ids=prompt, sampling=greedy(count), request_id=request_id)
                async with contextlib.aclosing(stream) as chunks:  # type: ignore[type-var]
                    await self._read(chunks, received, cancel, request_id)
        except TimeoutError:
            assert not wanted
        except RequestError as error:
            if wanted or error.code is not grpc.StatusCode.CANCELLED:
                raise
        assert received == oracle(prompt, count)[: len(received)], WRONG_ANSWER
        if len(received) == count:
            self.finished += 1
        else:
            assert not wanted, "an answer that ended early"
            self.cancelled += 1

    async def _read(
        self, chunks: AsyncIterator[GenerateResponse], received: list[int], cancel: Cancel, request_id: str
    ) -> None:
        async for chunk in chunks:
            received.extend(chunk.token_ids)
            if cancel.after_tokens is not None and len(received) >= cancel.after_tokens:
                if not cancel.by_abort:
                    return
                await self._client.abort(request_id)

    @contextlib.asynccontextmanager
    async def _cancelling(self, cancel: Cancel, request_id: str) -> AsyncGenerator[None]:
        """Cancels what runs inside at its time; raises TimeoutError where it closed the stream."""
        if cancel.after_seconds is None:
            yield
        elif not cancel.by_abort:
            async with asyncio.timeout(cancel.after_seconds):
                yield
        else:
            aborting = asyncio.create_task(self._abort_after(cancel.after_seconds, request_id))
            try:
                yield
            finally:
                await aborting

    async def _abort_after(self, seconds: float, request_id: str) -> None:
        await asyncio.sleep(seconds)
        await self._client.abort(request_id)


async def at_rest(processes: Processes) -> None:
    """Waits until no request, no leg and no page is held anywhere."""

    async def idle() -> bool:
        metrics = [await gauges(endpoint) for endpoint in processes.metrics_endpoints.values()]
        return not any(each.get("kvbaton_live_requests") or each.get("kvbaton_worker_live_legs") for each in metrics)

    async def nothing_held() -> bool:
        for endpoint in processes.system_endpoints.values():
            async with Simulator(endpoint) as simulator:
                for rank in (await simulator.state())["ranks"]:
                    if rank["live"] or rank["holding"]:
                        return False
        return True

    await eventually(idle, within=30, every=0.2, what="no live request")
    await eventually(nothing_held, within=30, every=0.2, what="no page held")
    # An abort's time-out in the simulated engine outlives its request by 2 s.
    await asyncio.sleep(3)


# A cancel that found its request in front of the frontend, or still being checked there.
QUEUED = "queued"
PHASES = (QUEUED, State.BOOTSTRAPPING, State.PREFILLING, State.TRANSFERRING, State.DECODING)


def phases_of_cancels(log: str, asked: int) -> Counter[str]:
    """Where cancelled requests were, of those that were asked, by the frontend's own word."""
    entries = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    ended = [entry for entry in entries if entry["event"] == "request ended"]
    phases = Counter(entry["phase"] for entry in ended if entry["outcome"] == "CANCELLED")
    # What was admitted has a line, whatever became of it.
    phases[QUEUED] = asked - len(ended)
    return phases


def fewest_cancels(processes: Processes, load: Load) -> int:
    """In the phase that was hit by the fewest."""
    phases = phases_of_cancels(processes.log("frontend"), load.finished + load.cancelled)
    print(f"cancels in {dict(phases)}")
    return min(phases[phase] for phase in PHASES)


@pytest.mark.peers(6, 13)
async def test_ten_thousand_requests_leave_nothing_behind(processes: Processes) -> None:
    processes.frontend("--link", "session", "--heartbeat", "2", "--log-format", "json")
    processes.worker("prefill", "prefill", sim=PREFILL)
    processes.worker("decode", "decode", sim=DECODE)
    async with Client(processes.target, timeout=60) as client:
        await all_routable(client, 2)
        load = Load(client)
        started = time.monotonic()
        await load.run(WARM_UP, WARM_UP_CONCURRENCY)
        await at_rest(processes)
        before = await footprints(processes)
        await load.run(REQUESTS - WARM_UP, CONCURRENCY)
        await at_rest(processes)
        after = await settled(processes, before)
        seconds = time.monotonic() - started
        print(f"{load.finished} finished, {load.cancelled} cancelled in {seconds:.0f} s")
        assert load.finished + load.cancelled == REQUESTS
        for _ in range(MOST_ROUNDS):
            if fewest_cancels(processes, load) >= CANCELS_IN_EACH_PHASE:
                break
            await load.run(MORE, FEW)
            await at_rest(processes)
        assert fewest_cancels(processes, load) >= CANCELS_IN_EACH_PHASE
    check_flat(before, after, growth=MEMORY_GROWTH)
