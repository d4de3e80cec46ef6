"""Every fault in every phase of a request: what the client sees, how soon, and when the slots are free.

`tests/support/fault_matrix.py` has the promises; what a run measures goes to build/faults.json, and `make faults`
writes docs/faults.md from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
import pytest_asyncio

from kvbaton.errors import Reason
from tests.support.fault_cluster import FaultCluster
from tests.support.fault_matrix import PROMISES, UNTOUCHED, Fault, Measured, Phase, Promise, Slot
from tests.support.injection import Target, inject, repair
from tests.support.processes import ROOT
from tests.support.resources import gauges
from tests.support.subject import MARK, Bystanders, Subject, lines_about, logged_at
from tests.support.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

# The promises, in seconds, and how much longer a busy machine may take.
KILL_NOTICED_WITHIN = 2.0
SILENCE_NOTICED_WITHIN = 2 * 0.5
SILENT = {Fault.PREFILL_FROZEN, Fault.DECODE_FROZEN, Fault.SESSION_BLACK_HOLED}
SLOT_FREE_WITHIN = 5.0
SLACK = 3.0
# For what nobody noticed there was time enough.
UNDISTURBED_FOR = 1.2
# No cell waits longer for an end: a request that hasn't ended by then hangs.
HANGS_AFTER = 30.0

WINDOW = 4
# Each phase must be reached within it, on a busy machine too.
DEADLINE = 2.0
TOKENS_BEFORE_THE_FAULT = 4

FRONTEND, OTHER, IMPATIENT = "frontend", "other", "impatient"
_HOLDING_ROLE = {
    Phase.BOOTSTRAPPING: "prefill",
    Phase.PREFILLING: "prefill",
    Phase.TRANSFERRING: "prefill",
    Phase.DECODING: "decode",
}
_MEANT = [(phase, fault) for (phase, fault), promise in PROMISES.items() if not promise.meaningless]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[FaultCluster]:
    """One for all cells."""
    cluster = FaultCluster(
        tmp_path_factory.mktemp("matrix"),
        decode=f"max_running_requests={WINDOW}",
        prefill=f"max_running_requests={4 * WINDOW}",
    )
    deadline = str(DEADLINE)
    cluster.also_frontend(OTHER)
    impatient = ["--retries", "0", "--prefill-timeout-per-1k", "0"]
    for flag in ("--queue-timeout", "--prefill-timeout", "--transfer-timeout", "--token-gap-timeout"):
        impatient += [flag, deadline]
    cluster.also_frontend(IMPATIENT, *impatient)
    async with cluster:
        yield cluster


@pytest.fixture(scope="module")
def results() -> Iterator[list[Measured]]:
    """What the cells measure; written when all of them have passed."""
    measured: list[Measured] = []
    yield measured
    if len(measured) == len(_MEANT):
        file = ROOT / "build" / "faults.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps([asdict(each) for each in measured], indent=1))


@dataclass
class Cell:
    """One phase and one fault, with the request that is hit."""

    cluster: FaultCluster
    phase: Phase
    fault: Fault
    subjects: list[Subject] = field(default_factory=list[Subject])
    """The request, and before it those that take the slots when it is to queue."""
    injected: bool = False
    prefill: str = "prefill0"
    decode: str = "decode0"

    @property
    def promise(self) -> Promise:
        return PROMISES[self.phase, self.fault]

    @property
    def frontend(self) -> str:
        """The one that has the request."""
        return IMPATIENT if self.fault is Fault.DEADLINE else FRONTEND

    @property
    def target(self) -> Target:
        """Whom the fault hits: the request's own workers, once they are known."""
        return Target(self.cluster, self.prefill, self.decode, FRONTEND)

    @contextlib.asynccontextmanager
    async def played(self) -> AsyncGenerator[Repair]:
        """Others feel nothing. Whatever happens inside, the cluster is as before at the end."""
        try:
            async with self.others(), self.repaired() as repair:
                yield repair
        finally:
            await self.cluster.at_rest()

    @contextlib.asynccontextmanager
    async def others(self) -> AsyncGenerator[None]:
        """Requests of others, before, during and after."""
        frontends = [OTHER] if self.fault is Fault.FRONTEND_KILLED else [FRONTEND, OTHER]
        if self.phase is Phase.QUEUED:  # they would queue too: those that have the slots are the others
            yield
            return
        async with Bystanders([self.cluster.clients[name] for name in frontends]).running() as bystanders:
            await bystanders.more(len(frontends))
            yield
            await bystanders.more(len(frontends))

    async def enter_phase(self) -> Subject:
        """The request, standing still in the phase; who has its legs is known then."""
        cluster = self.cluster
        if self.phase is Phase.QUEUED:
            await self._fill_the_window()
            return await self._queued()
        holders = [name for name in cluster.workers if name.startswith(_HOLDING_ROLE[self.phase])]
        for name in cluster.workers:
            # Those of the other role hold nothing, but count what begins with the mark.
            count = 1 if name in holders else 0
            await cluster.simulators[name].hold(self.phase, MARK, count=count, after_tokens=TOKENS_BEFORE_THE_FAULT)
        subject = self._ask(self.frontend)
        while not await self._held(holders):
            assert not subject.ended, subject.error
            await asyncio.sleep(0.02)
        states = {name: await cluster.state(name) for name in cluster.workers}
        (self.prefill,) = (name for name in cluster.prefills if states[name]["hold"]["seen"])
        (self.decode,) = (name for name in cluster.decodes if states[name]["hold"]["seen"])
        for name in cluster.workers:
            if name not in (self.prefill, self.decode):
                await cluster.simulators[name].release()
        if self.phase is Phase.DECODING:
            await eventually(lambda: len(subject.received) == TOKENS_BEFORE_THE_FAULT)
        return subject

    def _ask(self, frontend: str) -> Subject:
        self.subjects.append(Subject(self.cluster.clients[frontend]))
        return self.subjects[-1]

    async def _held(self, holders: list[str]) -> int:
        return await self.cluster.total("held", holders)

    async def _fill_the_window(self) -> None:
        cluster = self.cluster
        for name in cluster.decodes:
            await cluster.simulators[name].hold(Phase.DECODING, MARK, count=WINDOW, after_tokens=1)
        slots = WINDOW * len(cluster.decodes)
        for _ in range(slots):
            self._ask(OTHER)

        async def all_slots_taken() -> bool:
            return await self._held(cluster.decodes) == slots

        await eventually(all_slots_taken, within=30, every=0.05)

    async def _queued(self) -> Subject:
        metrics = self.cluster.processes.metrics_endpoints[self.frontend]
        subject = self._ask(self.frontend)

        async def waits() -> bool:
            return (await gauges(metrics))["kvbaton_queued_requests"] == 1

        await eventually(waits)
        return subject

    async def inject(self, subject: Subject) -> float:
        """The fault; when it began, on the monotonic clock. Nobody can have noticed it before."""
        self.injected = True
        if self.fault is Fault.DEADLINE:
            # Whichever phase it is of, it has not begun before the request was sent.
            return subject.sent_at + DEADLINE
        assert not subject.ended, subject.error
        began = time.monotonic()
        if self.fault is Fault.CLIENT_GONE:
            await subject.leave()
        await inject(self.fault, self.target)
        return began

    async def let_go_at(self, since: float) -> float:
        """Waits until the surviving legs' workers have neither the request nor its pages; seconds since then."""
        survivors = [getattr(self, role) for role in self.promise.survivors]

        async def let_go() -> bool:
            return not await self.cluster.total("marked", survivors)

        await eventually(let_go, within=SLACK * SLOT_FREE_WITHIN, what=f"{survivors} have let go")
        return time.monotonic() - since

    @contextlib.asynccontextmanager
    async def repaired(self) -> AsyncGenerator[Repair]:
        """Whatever happens inside, the fault is over at the end, nothing stands still, and the requests have ended."""
        repair = Repair(self)
        try:
            yield repair
        finally:
            await repair.now()
            await self.cluster.release()
            for subject in self.subjects:
                await subject.end(HANGS_AFTER)
            await self.cluster.whole()


class Repair:
    """Of a cell's fault, once."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._done_at: float | None = None

    async def now(self) -> float:
        """Does it, if there is a fault and unless it is done; when that was, on the monotonic clock."""
        if self._done_at is None:
            self._done_at = time.monotonic()
            if self._cell.injected:
                await repair(self._cell.fault, self._cell.target)
        return self._done_at


@pytest.mark.peers(1, 5, 6)
@pytest.mark.parametrize(
    ("phase", "fault"), _MEANT, ids=[f"{phase}-{fault}".replace(" ", "-") for phase, fault in _MEANT]
)
async def test_the_request_ends_as_promised_and_nobody_else_notices(
    cluster: FaultCluster, results: list[Measured], phase: Phase, fault: Fault
) -> None:
    cell = Cell(cluster, phase, fault)
    promise = cell.promise
    slot_free = None
    async with cell.played() as repair:
        subject = await cell.enter_phase()
        began_at, began = time.time(), await cell.inject(subject)
        if promise is UNTOUCHED:
            await asyncio.sleep(UNDISTURBED_FOR)
            # A slot that the fault has freed may be the queued request's already.
            assert phase is Phase.QUEUED or not subject.ended, subject.error
            await cluster.release()
        await subject.end(HANGS_AFTER)
        if promise.slot is Slot.FAULT:
            slot_free = await cell.let_go_at(began)
        repaired = await repair.now()
        if promise.slot is Slot.REPAIR:
            slot_free = await cell.let_go_at(repaired)

    *occupants, _ = cell.subjects
    for each in cell.subjects:
        each.check_tokens()
    for occupant in occupants:
        assert occupant.finishes == 1, occupant.error
    check_end(subject, promise)
    line = await last_word(cluster, cell, subject)
    noticed = None
    if promise.reason is not Reason.CANCELLED and promise is not UNTOUCHED:
        noticed = subject.ended_at - began
        if line is not None and promise.succeeds:
            # All that it says of the request: of what goes well it has only the last word.
            words = lines_about(cluster.processes.log(cell.frontend), subject.request_id)
            assert len(words) > 1, "it has said nothing of the fault"
            noticed = logged_at(words[0]) - began_at
        assert noticed >= 0.0, "noticed before it was there"
        assert noticed < SLACK * (SILENCE_NOTICED_WITHIN if fault in SILENT else KILL_NOTICED_WITHIN)
    ended = None if promise is UNTOUCHED or fault is Fault.CLIENT_GONE else subject.ended_at - began
    results.append(Measured(phase, fault, noticed, ended, slot_free))


def check_end(subject: Subject, promise: Promise) -> None:
    """The client has had the one end that was promised."""
    if promise.succeeds:
        assert subject.error is None
        assert subject.finishes == 1
        return
    assert not subject.finishes
    if promise.reason is not Reason.CANCELLED:
        assert subject.error is not None
        assert subject.error.reason is promise.reason, subject.error


async def last_word(cluster: FaultCluster, cell: Cell, subject: Subject) -> dict[str, Any] | None:
    """The frontend says once that the request has ended, and how; None of a frontend that was killed."""
    if cell.fault is Fault.FRONTEND_KILLED:
        return None

    def ends() -> list[dict[str, Any]]:
        lines = lines_about(cluster.processes.log(cell.frontend), subject.request_id)
        return [line for line in lines if line["event"] == "request ended"]

    await eventually(ends, every=0.05, what="the end in the frontend's log")
    (end,) = ends()
    promise = cell.promise
    if promise.attempts is not None:
        assert end["attempts"] == promise.attempts, end
    if promise.succeeds:
        assert end["outcome"] == "finished"
    else:
        assert end["outcome"] == ("CANCELLED" if promise.reason is Reason.CANCELLED else "DEADLINE_EXCEEDED")
    return end
