"""Stage `faults`: what kills, a replacement and a storm of cancellations leave of requests, tokens and pages.

On GPUs two prefill workers share the first one and two decode workers the second, with a model of four layers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.gpu.answers import Answered, depend_on_the_context, difference
from benchmarks.gpu.fleet import Ended, Fleet, attempts, first
from benchmarks.gpu.launch import Setup, baton, shape
from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.prompts import prompt
from benchmarks.gpu.transfers import ProbeLines
from kvbaton.client import Answer
from services.tools.terminal import columns

_PAGES_BACK = 60.0
_AMID = 8


@dataclass(frozen=True)
class Sizes:
    """What is sent. Tokens, but for the counts."""

    lengths: tuple[int, ...]
    output: int
    long_prompt: int
    """Of the request whose prefill is killed: of several chunks."""
    stream_output: int
    """Of the answers whose decode is killed."""
    storm: int
    at_once: int


ON_GPUS = Sizes((5, 500, 4000), 32, 30_000, 1500, 200, 32)
ON_A_CPU = Sizes((5, 50, 300), 16, 900, 200, 40, 8)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Its own."""
    parser.add_argument("--workers", type=int, help="of each role; by default 2, with real engines on a CPU 1")


async def run(parsed: argparse.Namespace, setup: Setup, outcome: Outcome) -> None:
    """All of it on one cluster."""
    sizes = ON_A_CPU if parsed.device == "cpu" else ON_GPUS
    count = parsed.workers or (1 if parsed.device == "cpu" and not setup.simulated else 2)
    setup = replace(setup, probe=True)
    if parsed.device == "cpu" and not setup.simulated:  # so that the long prompt is written in several pieces
        setup = setup.with_flags("--chunked-prefill-size", "128")
    if parsed.device == "cuda":
        model = str(shape(4, setup.logs / "4-layers"))
        setup = replace(setup.sharing(0.4), model=model)
    await outcome.part("faults", _on_a_cluster(setup, sizes, count, outcome))


async def _on_a_cluster(setup: Setup, sizes: Sizes, count: int, outcome: Outcome) -> None:
    started = baton(setup, "faults", prefill=count, decode=count, env=_gpus(setup, count))
    async with started as running, Fleet(running) as fleet:
        drill = Drill(fleet, setup, sizes, outcome)
        outcome.data["versions"] = running.versions
        await drill.remember()
        await outcome.part("storm", drill.storm())
        await outcome.part("prefill killed", drill.kill_prefill(), needs=90)
        await outcome.part("decode killed", drill.kill_decode(), needs=15)
    rows = [("WHAT", "SECONDS"), *((name, f"{seconds:.2f}") for name, seconds in drill.seconds.items())]
    outcome.data["seconds"] = drill.seconds
    outcome.tables.append("\n".join(columns(rows)))


def _gpus(setup: Setup, count: int) -> dict[str, dict[str, str]]:
    """Prefill workers on the first GPU, decode workers on the second."""
    if setup.device != "cuda" or count == 1:
        return {}
    return {
        f"{role}-{number}": {"CUDA_VISIBLE_DEVICES": gpu}
        for role, gpu in (("prefill", "0"), ("decode", "1"))
        for number in range(1, count + 1)
    }


class Drill:
    """The scenarios; each leaves the cluster so that the next one can begin."""

    def __init__(self, fleet: Fleet, setup: Setup, sizes: Sizes, outcome: Outcome) -> None:
        self.seconds: dict[str, float] = {}
        self._fleet, self._setup, self._sizes, self._outcome = fleet, setup, sizes, outcome
        self._reference: dict[int, Answered] = {}
        self._cluster = fleet.running.cluster
        self._probe = ProbeLines(setup.probe_folder)

    async def remember(self) -> None:
        """What a healthy cluster answers; every later answer is compared with it."""
        means_something = await depend_on_the_context(self._fleet.running.client, self._setup.vocabulary)
        self._outcome.check("answers depend on the context", means_something)
        for length in self._sizes.lengths:
            ended = await self._ask(f"reference-{length}", length)
            if ended.answer is None:
                raise RuntimeError(f"the healthy cluster: {ended}")
            self._reference[length] = ended.answer

    async def storm(self) -> None:
        """Requests, half of them given up at random moments; then pages and tokens are as before."""
        draw = random.Random(7)
        slots = asyncio.Semaphore(self._sizes.at_once)
        longest = max(self._sizes.lengths)
        took = [await self._ask("storm-measure", longest)]

        async def one(number: int) -> str:
            length, patience = draw.randrange(5, longest), draw.random() * 2 * took[0].seconds
            async with slots:
                return await self._maybe_cancelled(number, length, patience if number % 2 else None)

        ends = await asyncio.gather(*(one(number) for number in range(self._sizes.storm)))
        counts = {end: ends.count(end) for end in sorted(set(ends))}
        self._outcome.data["storm"] = counts
        self._outcome.check("storm: requests", set(counts) <= {"finished", "cancelled"}, str(counts))
        await self._pages("storm: slots and pages free after the last", "")
        await self._parity("storm: parity again")

    async def kill_prefill(self) -> None:
        """While its writes are under way; then it is started again at its address, under requests."""
        self._probe.new()
        # Not asked before: a prefix cache would have it.
        token_ids = prompt(self._sizes.long_prompt, "doomed", self._setup.vocabulary)
        sending = asyncio.create_task(self._fleet.send("doomed", token_ids, self._sizes.output))
        doomed = await self._fleet.busy("prefill")
        posted = await self._first_write()
        self._fleet.kill(doomed)
        killed = time.monotonic()
        alone = len(self._fleet.names("prefill")) == 1
        if alone:  # nobody else could take the request
            await self._cluster.restart(doomed)
        ended = await sending
        if not self._setup.simulated:
            self._outcome.check("prefill killed: amid its writes", posted)
        self._outcome.data["killed"] = {"worker": doomed, "after_first_write": posted}
        tried = await attempts(self._fleet.running.log("frontend"), "doomed")
        said = f"{ended}, {tried} attempts, {'amid its writes' if posted else 'amid its prefill'}"
        self._outcome.check("prefill killed mid-transfer: the request", ended.orderly, said)
        self.seconds["prefill killed: until the request ended"] = time.monotonic() - killed
        await self._pages("prefill killed: decode's pages free behind the request's end", "decode")
        self.seconds["prefill killed: until decode's pages were free"] = time.monotonic() - killed
        if not alone:  # behind the pages: decode takes a refused connection for the proof that nobody writes
            await self._cluster.restart(doomed)
        await self._replaced(doomed)
        if ended.answer is not None:
            again = await self._fleet.send("doomed-again", token_ids, self._sizes.output)
            self._compare("prefill killed mid-transfer: tokens", ended.answer, again)

    async def _replaced(self, name: str) -> None:
        """Requests keep coming while it starts, and none hangs; then one goes through it."""
        started = time.monotonic()
        ready = asyncio.create_task(self._cluster.wait_ready())
        others: list[asyncio.Task[Ended]] = []
        while not ready.done():
            others.append(asyncio.create_task(self._ask(f"meanwhile-{len(others)}", self._sizes.lengths[1])))
            await asyncio.wait([ready], timeout=1.0)
        await ready
        self.seconds["prefill replaced: until it was routable again"] = time.monotonic() - started
        ends = [await other for other in others]
        bad = [end for end in ends if not end.orderly]
        answers = sum(end.answer is not None for end in ends)
        said = f"{answers} of {len(ends)} answered{'; ' if bad else ''}{'; '.join(map(str, bad))}"
        self._outcome.check("prefill replaced: requests meanwhile", not bad, said)
        instance = self._cluster.workers[name].instance_id
        began = time.monotonic()
        through = await self._ask("through-it", self._sizes.lengths[-1], prefill_worker=instance)
        self.seconds["prefill replaced: its first request"] = time.monotonic() - began
        self._outcome.check("prefill replaced: a request through it", through.answer is not None, str(through))
        self._same("prefill replaced: tokens", self._sizes.lengths[-1], through)
        await self._parity("prefill replaced: parity again")

    async def kill_decode(self) -> None:
        """While it streams; the answers go on with another one."""
        if len(self._fleet.names("decode")) < 2:
            self._outcome.skip("decode killed mid-stream", "it takes a second decode worker, and this run has one")
            return
        token_ids, output = self._prompt(self._sizes.lengths[1]), self._sizes.stream_output
        whole = await self._fleet.send("undisturbed", token_ids, output)
        answers = [Answer() for _ in range(4)]
        sending = [
            asyncio.create_task(self._fleet.send(f"stream-{number}", token_ids, output, answer))
            for number, answer in enumerate(answers)
        ]
        begun = await first(lambda: all(len(each.token_ids) >= _AMID for each in answers), within=60.0)
        had = [len(each.token_ids) for each in answers]
        self._fleet.kill(self._fleet.names("decode")[0])
        ends = [await each for each in sending]
        moved = sum(end.migrations for end in ends)
        said = f"{', '.join(map(str, ends))}; {moved} migrations; killed at {had} of {output} tokens"
        amid = begun and max(had) < output
        self._outcome.check("decode killed mid-stream: answers", amid and all(end.answer for end in ends), said)
        self._outcome.check("decode killed mid-stream: some migrated", moved > 0, str(moved))
        if whole.answer is None:
            raise RuntimeError(f"the undisturbed answer: {whole}")
        for end in ends:
            self._compare(f"decode killed mid-stream: {end.request_id}", whole.answer, end)

    async def _maybe_cancelled(self, number: int, length: int, patience: float | None) -> str:
        sending = asyncio.create_task(self._fleet.send(f"storm-{number}", self._prompt(length), self._sizes.output))
        if patience is not None:
            await asyncio.wait([sending], timeout=patience)
            sending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            ended = await sending
            return "finished" if ended.answer is not None else str(ended)
        return "cancelled"

    async def _first_write(self) -> bool:
        """Returns amid the writes of the running request; False without a probe."""
        if self._setup.simulated:
            await asyncio.sleep(0.02)
            return False
        return await first(lambda: any(line["event"] == "posted" for line in self._probe.new()), within=30.0)

    async def _pages(self, name: str, role: str) -> None:
        seconds = await self._fleet.idle(_PAGES_BACK, role)
        self.seconds[name] = _PAGES_BACK if seconds is None else seconds
        self._outcome.check(name, seconds is not None, "never" if seconds is None else f"{seconds:.2f} s")

    async def _parity(self, name: str) -> None:
        for length in self._sizes.lengths:
            request_id = f"{name}-{length}".replace(" ", "-")
            self._same(f"{name}: {length} tokens", length, await self._ask(request_id, length))

    def _same(self, name: str, length: int, ended: Ended) -> None:
        self._compare(name, self._reference[length], ended)

    def _compare(self, name: str, reference: Answered, ended: Ended) -> None:
        if ended.answer is None:
            self._outcome.check(name, False, f"there is no answer: {ended}")
            return
        found = difference(reference, ended.answer)
        self._outcome.check(name, found is None or found.near_tie, "equal" if found is None else str(found))

    async def _ask(self, request_id: str, length: int, **options: Any) -> Ended:
        return await self._fleet.send(request_id, self._prompt(length), self._sizes.output, **options)

    def _prompt(self, length: int) -> Sequence[int]:
        return prompt(length, "faults", self._setup.vocabulary)
