"""When the canary flies, and what condemns an engine: silence with work, or a bad answer; never mere load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
import pytest_asyncio

from services.requests import Role
from services.worker.core import WorkerCore
from services.worker.engines.protocol import EngineLoad, ProbePayload
from services.worker.health.canary import Canary
from tests.support.waiting import eventually

INTERVAL, SILENCE = 0.05, 0.3


class Engine:
    """Answers probes as told, and reports its load."""

    def __init__(self) -> None:
        self.probed: list[int] = []
        self.ailments: dict[int, str] = {}
        self.hangs = False
        self.answer_seconds = 0.0
        self.reports = False
        self.running = 0

    async def probe(self, dp_rank: int, payload: ProbePayload) -> None:
        self.probed.append(dp_rank)
        self.running = 1
        await asyncio.sleep(3600 if self.hangs else self.answer_seconds)
        if dp_rank in self.ailments:
            raise RuntimeError(self.ailments[dp_rank])

    async def loads(self) -> list[EngineLoad]:
        return [EngineLoad(rank, 3, 0, 0, 64, time.time() if self.reports else 0.0) for rank in range(3)]


class Legs:
    """Live legs, and when the engine last said something of one."""

    def __init__(self) -> None:
        self.live = 0
        self.last_word = time.monotonic()

    def __len__(self) -> int:
        return self.live


class Host:
    """A canary over a fake engine, and what it has judged."""

    def __init__(self) -> None:
        self.engine, self.legs = Engine(), Legs()
        core: Any = WorkerCore(Role.AGGREGATED, "w", cast("Any", None), cast("Any", None))
        core.legs = self.legs
        core._loaded = type(
            "Loaded",
            (),
            {"engine": self.engine, "info": type("Info", (), {"dp_size": 3}), "probe_payload": ProbePayload()},
        )
        self.core: WorkerCore = core
        self.judged: list[str] = []
        self.canary = Canary(core, self._judge, interval=INTERVAL, silence=SILENCE)

    async def _judge(self, ailment: str) -> None:
        self.judged.append(ailment)


@pytest_asyncio.fixture
async def host(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    monkeypatch.setattr("services.worker.health.canary._RECHECK", 0.02)
    host = Host()
    task = asyncio.create_task(host.canary.run())
    yield host
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_ranks_are_asked_in_turn(host: Host) -> None:
    await eventually(lambda: len(host.engine.probed) >= 6)
    assert host.engine.probed[:6] == [0, 1, 2, 0, 1, 2]
    assert host.judged == []


async def test_none_flies_while_there_is_traffic(host: Host) -> None:
    host.legs.live = 1
    for _ in range(20):
        host.legs.last_word = time.monotonic()
        await asyncio.sleep(INTERVAL / 5)
    assert host.engine.probed == []
    await eventually(lambda: host.engine.probed)


async def test_a_bad_answer_condemns_until_that_very_rank_answers(host: Host) -> None:
    host.engine.ailments = {1: "abort boom"}
    await eventually(lambda: host.judged)
    assert host.judged == ["dp rank 1: abort boom"]
    asked = len(host.engine.probed)
    await eventually(lambda: len(host.engine.probed) > asked + 2)
    assert set(host.engine.probed[asked + 1 :]) == {1}, "the others could not clear it"
    host.engine.ailments = {}
    await eventually(lambda: len(host.judged) == 2)
    assert host.judged[1] == ""


async def test_no_answer_to_an_idle_engine_condemns(host: Host) -> None:
    host.engine.hangs = host.engine.reports = True
    began = time.monotonic()
    await eventually(lambda: host.judged)
    assert "said nothing" in host.judged[0]
    assert time.monotonic() - began >= SILENCE


async def test_a_silent_engine_with_live_legs_is_condemned_and_cleared_when_it_speaks(host: Host) -> None:
    host.engine.hangs = True
    host.legs.live = 1
    word = host.legs.last_word
    await eventually(lambda: host.judged)
    assert time.monotonic() - word >= SILENCE, "counted from its last word"
    host.engine.hangs = False
    await eventually(lambda: len(host.judged) == 2)
    assert host.judged[1] == ""


async def test_a_busy_scheduler_is_not_condemned_for_a_late_answer(host: Host) -> None:
    host.engine.hangs = host.engine.reports = True
    host.legs.live = 1
    await asyncio.sleep(3 * SILENCE)
    assert host.engine.probed
    assert host.judged == []


async def test_a_canary_is_no_load(host: Host) -> None:
    host.engine.answer_seconds = 0.2
    await eventually(lambda: host.engine.probed)
    ranks = await host.core.loads()
    assert [rank.running_requests for rank in ranks] == [2, 3, 3]
    await eventually(lambda: host.core.canary_rank is None)
    assert [rank.running_requests for rank in await host.core.loads()] == [3, 3, 3]
