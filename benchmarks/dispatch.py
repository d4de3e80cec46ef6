"""What handing one request to its workers costs the frontend, by how many workers there are.

    python -m benchmarks.dispatch [--workers 1,16,64,256] [--requests 2000]

The real queue, chooser, policy (round-robin) and credits in front of workers that grant at once; no network and no
engines. Each row has so many decode and as many prefill workers, all pairs proven. *Idle*: workers have free slots.
*Full*: 100 requests wait, one slot falls free and one more request comes. *Pair*: a pair has been proven while a
request waits. *Messages*: how many sessions are told something when all workers are full, ten requests wait, one slot
falls free and one more request comes. Times are of CPU; compare within one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Callable
from typing import Any, cast

from kvbaton.v1 import session_pb2, worker_pb2
from services.frontend.dispatch.line import Ticket
from services.frontend.dispatch.pair_checks import PairChecks, PairState
from services.frontend.dispatch.queue import DispatchQueue
from services.frontend.link.credits import SessionCredits
from services.frontend.link.load import WorkerLoad
from services.frontend.link.protocol import Credit
from services.frontend.router.placement import Placement, Router, Target
from services.frontend.router.policies.make import Policies
from services.frontend.router.policies.policy import Prompt
from services.frontend.router.policies.round_robin import RoundRobin
from services.frontend.router.worker import Worker, WorkerRank
from services.requests import Role

MODEL = "m"
WINDOW = 64
WAITING = 100
PROMPT = Prompt([1, 2, 3])


class GrantingLink:
    """A session's credits, and a worker that has as many slots as `free` says."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.credits = SessionCredits(1)
        self.heard()

    @property
    def window(self) -> int:
        return self.credits.window

    @property
    def free_slots(self) -> int:
        return self.credits.free_slots

    def ask(self, count: int) -> None:
        self.credits.ask(count)

    def take(self) -> Credit | None:
        return self.credits.take()

    def give_back(self, credit: Credit) -> None:
        self.credits.give_back(credit)

    def heard(self, granted: int = 0) -> None:
        """The worker's word."""
        self.credits.heard(session_pb2.ConnectResponse(window=WINDOW, free_slots=self.free, credits_granted=granted))


class BenchWorker:
    """As much of a worker as the queue asks for."""

    def __init__(self, number: int, role: Role, free: int) -> None:
        self.instance_id, self.role, self.ejected = f"{role}-{number}", role, False
        self.record = worker_pb2.WorkerRecord(instance_id=self.instance_id)
        self.record.incarnation.uuid = self.instance_id
        self.record.model.name = MODEL
        self.link, self.load = GrantingLink(free), WorkerLoad(1)
        self.ranks = [WorkerRank(cast("Worker", self), self.instance_id, 0, 16, None, self.load.ranks[0])]

    def want_no_credits(self) -> None:
        self.link.ask(0)


class House:
    """A queue in front of so many decode and prefill workers. As a router it knows them all."""

    def __init__(self, workers: int, *, free: int) -> None:
        prefills = tuple(cast("Worker", BenchWorker(number, Role.PREFILL, 0)) for number in range(workers))
        self.decodes = [BenchWorker(number, Role.DECODE, free) for number in range(workers)]
        self._targets = [Target(cast("Worker", decode), prefills) for decode in self.decodes]
        self.listener: Callable[[Worker], None] = lambda decode: None
        router, pairs = cast("Router", self), cast("PairChecks", self)
        policies = Policies(RoundRobin(), RoundRobin())
        self.queue = DispatchQueue(router, pairs, policies, limit=10 * WAITING, ready_timeout=0)
        self.granted = dict.fromkeys(self.decodes, 0)

    def targets(self, model: str) -> list[Target]:
        return self._targets

    def on_change(self, listener: Callable[[Worker], None]) -> None:
        self.listener = listener

    def state(self, prefill: Worker, decode: Worker) -> PairState:
        return PairState.PROVEN

    def enter(self) -> Ticket:
        ticket = self.queue.enter(MODEL)
        ticket.describe(PROMPT)
        return ticket

    def grant(self, decode: BenchWorker, count: int = 1) -> None:
        """The worker grants so many credits."""
        self.granted[decode] += count
        decode.link.heard(self.granted[decode])
        self.queue.credits_came(cast("Worker", decode))

    def settled(self, ticket: Ticket) -> bool:
        """Whether it has got workers, whose slot then falls free."""
        found: list[Any] = []
        ticket.deliver_to(found.append)
        if found:
            assert isinstance(found[0], Placement)
            ticket.spend()
            for share in (found[0].decode_share, found[0].prefill_share):
                if share is not None:
                    share.end()
        return bool(found)


def idle(workers: int, requests: int) -> float:
    """CPU seconds of a request that finds free slots."""
    house = House(workers, free=WINDOW)

    def one() -> None:
        ticket = house.enter()
        for decode in house.decodes if not house.settled(ticket) else ():
            if (asked := decode.link.credits.news()) is not None and asked.up_to > house.granted[decode]:
                house.grant(decode, asked.up_to - house.granted[decode])
        assert house.settled(ticket) or not ticket.waiting

    return _seconds_each(one, requests)


def full(workers: int, requests: int) -> float:
    """CPU seconds of a credit and of the request that comes meanwhile, while many wait."""
    house, rng = House(workers, free=0), random.Random(1)
    waiting = [house.enter() for _ in range(WAITING)]

    def one() -> None:
        house.grant(rng.choice(house.decodes))
        assert house.settled(waiting.pop(0))
        waiting.append(house.enter())

    return _seconds_each(one, requests)


def messages(workers: int, requests: int) -> float:
    """Sessions that have news after each of a credit and a request, while fewer wait than a window has slots."""
    house, rng = House(workers, free=0), random.Random(1)
    waiting = [house.enter() for _ in range(10)]
    told = 0

    def tell() -> int:
        return sum(decode.link.credits.news() is not None for decode in house.decodes)

    tell()
    for _ in range(requests):
        house.grant(rng.choice(house.decodes))
        told += tell()
        if house.settled(waiting[0]):
            del waiting[0]
            waiting.append(house.enter())
            told += tell()
    return told / requests


def pair(workers: int, requests: int) -> float:
    """CPU seconds of the news that a pair has been proven, while a request waits."""
    house, rng = House(workers, free=0), random.Random(1)
    house.enter()
    return _seconds_each(lambda: house.listener(cast("Worker", rng.choice(house.decodes))), requests)


def _seconds_each(act: Callable[[], None], times: int) -> float:
    for _ in range(10):
        act()
    began = time.process_time()
    for _ in range(times):
        act()
    return (time.process_time() - began) / times


async def main() -> None:
    """Prints the table. In an event loop, which the queue needs for its timers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,16,64,256")
    parser.add_argument("--requests", type=int, default=2000)
    options = parser.parse_args()
    print("decode workers, and as many prefill   idle µs   full µs   pair µs   messages")
    for workers in map(int, options.workers.split(",")):
        row = (measure(workers, options.requests) * 1e6 for measure in (idle, full, pair))
        told = messages(workers, options.requests // 10)
        print(f"{workers:>37}" + "".join(f"{each:>10.0f}" for each in row) + f"{told:>11.1f}")


if __name__ == "__main__":
    asyncio.run(main())
