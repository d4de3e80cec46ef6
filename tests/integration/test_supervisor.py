"""Child processes end in order, completely, and not silently. Real processes, tiny ones."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from services.tools.cluster import LocalCluster, NotReadyError
from services.tools.options import ClusterOptions, ProcessPlan
from services.tools.ports import Ports
from services.tools.supervisor import Child, ChildDiedError, group_members, stop_all

pytestmark = pytest.mark.integration

READY = "print('ready', flush=True)"
OBEDIENT = f"""
import signal, sys, time
def leave(*_):
    print("left", time.time(), flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
{READY}
time.sleep(60)
"""
DEAF = f"""
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
{READY}
time.sleep(60)
"""
PARENT = """
import subprocess, sys, time
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("grandchild", grandchild.pid, flush=True)
"""
LISTENER = f"""
import socket, sys, time
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
{READY}
time.sleep(60)
"""

Spawn = Callable[..., Awaitable[Child]]


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while True:
            if holds():
                return
            await asyncio.sleep(0.02)


@pytest.fixture
async def spawn(tmp_path: Path) -> AsyncIterator[Spawn]:
    """Starts a child from source and waits until it is ready; kills what a failed test leaves."""
    children: list[Child] = []

    async def start(name: str, source: str, *arguments: str, until: str = "ready") -> Child:
        child = Child(name, [sys.executable, "-c", textwrap.dedent(source), *arguments], tmp_path / f"{name}.log")
        children.append(child)
        child.start()
        await eventually(lambda: any(until in line for line in child.log_tail()))
        return child

    yield start
    for child in children:
        child.kill()
        await child.wait()


async def test_a_child_that_obeys_ends_by_itself(spawn: Spawn):
    child = await spawn("obedient", OBEDIENT)
    assert await child.stop(10)
    assert child.exit_status() == 0
    assert not child.group_exists()


async def test_a_child_that_ignores_sigterm_is_killed_at_the_deadline(spawn: Spawn):
    child = await spawn("deaf", DEAF)
    began = time.monotonic()
    assert not await child.stop(0.5)
    assert 0.5 <= time.monotonic() - began < 5
    assert child.exit_status() == -signal.SIGKILL


async def test_a_frozen_child_still_hears_sigterm(spawn: Spawn):
    child = await spawn("frozen", OBEDIENT)
    child.signal(signal.SIGSTOP)
    assert await child.stop(10)
    assert child.exit_status() == 0


async def test_hurry_cuts_the_deadline_short(spawn: Spawn):
    child = await spawn("deaf", DEAF)
    hurry = asyncio.Event()
    asyncio.get_running_loop().call_later(0.2, hurry.set)
    began = time.monotonic()
    assert not await child.stop(60, hurry)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("ending", ["time.sleep(60)", "sys.exit(0)"])
async def test_what_a_child_leaves_in_its_group_goes_with_it(spawn: Spawn, ending: str):
    child = await spawn("parent", PARENT + ending, until="grandchild")
    assert child.group_exists()
    await child.stop(10)
    assert group_members(child.pid) == []


async def test_a_crash_takes_the_whole_group_and_frees_the_port(spawn: Spawn):
    port = Ports().pick("127.0.0.1", 0)
    child = await spawn("listener", LISTENER, str(port))
    assert is_listening(port)
    child.kill()
    assert await child.wait() == -signal.SIGKILL
    assert not is_listening(port)


async def test_a_ctrl_c_in_our_terminal_does_not_reach_children(spawn: Spawn):
    child = await spawn("obedient", OBEDIENT)
    assert os.getpgid(child.pid) == child.pid != os.getpgrp()
    assert os.getsid(child.pid) == child.pid


async def test_children_are_told_to_end_when_their_parent_is_killed(tmp_path: Path, spawn: Spawn):
    parent = await spawn(
        "parent",
        f"""
        import sys, time
        from pathlib import Path
        from services.tools.supervisor import Child
        child = Child("child", [sys.executable, "-c", {OBEDIENT!r}], Path({str(tmp_path / "inner.log")!r}))
        child.start()
        while "ready" not in child.log_tail():
            time.sleep(0.02)
        print("child", child.pid, flush=True)
        time.sleep(60)
        """,
        until="child ",
    )
    pid = int(parent.log_tail(1)[0].split()[1])
    assert group_members(pid) == [pid]
    os.kill(parent.pid, signal.SIGKILL)
    await eventually(lambda: not group_members(pid))


async def test_many_are_stopped_at_the_same_time_and_the_killed_are_named(spawn: Spawn):
    children = [await spawn("deaf-1", DEAF), await spawn("deaf-2", DEAF), await spawn("obedient", OBEDIENT)]
    began = time.monotonic()
    assert await stop_all(children, 1.0) == ["deaf-1", "deaf-2"]
    assert time.monotonic() - began < 1.9


async def test_a_child_can_be_started_again_and_its_log_tail_is_of_its_last_life(spawn: Spawn):
    child = await spawn("again", "import os, time; print('ready', os.getpid(), flush=True); time.sleep(60)")
    first = child.log_tail()
    await child.stop(10)
    child.start()
    await eventually(lambda: bool(child.log_tail()))
    assert child.running
    assert child.log_tail() != first


class TestCluster:
    """The order of things in a cluster, with fakes in the places of its processes."""

    @staticmethod
    def cluster(tmp_path: Path, *children: Child, **options: float) -> LocalCluster:
        cluster = LocalCluster(ClusterOptions(device="cpu", state_dir=tmp_path, stop_timeout=2.0, **options))  # type: ignore[arg-type]
        for index, child in enumerate(children):
            cluster.children[child.name] = child
            cluster.plans[child.name] = ProcessPlan(child.name, None, index, 1, 1)
        return cluster

    async def test_the_frontend_ends_before_any_worker_is_told_to(self, tmp_path: Path, spawn: Spawn):
        slow = OBEDIENT.replace('print("left"', 'time.sleep(0.5); print("left"')
        prefill, decode = await spawn("prefill", OBEDIENT), await spawn("decode", OBEDIENT)
        frontend = await spawn("frontend", slow)
        cluster = self.cluster(tmp_path, prefill, decode, frontend)
        await cluster.stop()

        def left(child: Child) -> float:
            return float(child.log_tail(1)[0].split()[1])

        assert left(frontend) < min(left(prefill), left(decode))
        assert cluster.killed == []
        assert cluster.leftovers() == []

    async def test_a_process_that_will_not_end_is_killed_and_named(self, tmp_path: Path, spawn: Spawn):
        cluster = self.cluster(tmp_path, await spawn("frontend", OBEDIENT), await spawn("decode", DEAF))
        await cluster.stop()
        assert cluster.killed == ["decode"]
        assert cluster.leftovers() == []

    async def test_a_death_is_told_with_exit_status_and_the_end_of_the_log(self, tmp_path: Path, spawn: Spawn):
        dying = f"{READY}\nfor n in range(40): print('line', n)\nraise SystemExit(3)"
        cluster = self.cluster(
            tmp_path, await spawn("frontend", OBEDIENT), await spawn("decode", dying, until="line 39")
        )
        async with asyncio.timeout(20):
            death = await cluster.wait_for_death()
        assert isinstance(death, ChildDiedError)
        assert death.name == "decode"
        assert death.log_tail == [f"line {n}" for n in range(10, 40)]
        assert "decode exited with status 3" in str(death)
        assert "line 39" in str(death)
        await cluster.stop()

    async def test_a_death_while_starting_ends_the_wait(self, tmp_path: Path, spawn: Spawn):
        shot = f"{READY}\nimport os; os.kill(os.getpid(), 9)"
        cluster = self.cluster(tmp_path, await spawn("frontend", OBEDIENT), await spawn("prefill", shot))
        with pytest.raises(ChildDiedError, match="prefill was killed by SIGKILL"):
            await cluster.wait_ready()
        await cluster.stop()

    async def test_not_ready_in_time_says_what_each_was_doing(self, tmp_path: Path, spawn: Spawn):
        cluster = self.cluster(
            tmp_path, await spawn("frontend", OBEDIENT), await spawn("prefill", OBEDIENT), ready_timeout=1.0
        )
        with pytest.raises(NotReadyError, match=r"(?s)--ready-timeout 1 s.*prefill: starting.*frontend: starting"):
            await cluster.wait_ready()
        await cluster.stop()

    async def test_a_lost_port_is_tried_once_more_with_another(
        self, tmp_path: Path, spawn: Spawn, monkeypatch: pytest.MonkeyPatch
    ):
        loser = "import sys; print('ready'); sys.exit(\"can't listen on 127.0.0.1:1: is the port taken?\")"
        commands: list[int] = []

        def command(plan: ProcessPlan, *_: object) -> list[str]:
            commands.append(plan.grpc_port)
            return [sys.executable, "-c", loser]

        monkeypatch.setattr("services.tools.cluster.command", command)
        cluster = self.cluster(tmp_path, await spawn("frontend", loser))
        cluster.log_dir.mkdir()
        with pytest.raises(ChildDiedError, match="can't listen on"):
            await cluster.wait_ready()
        assert len(commands) == 1
        assert commands[0] != 1
        await cluster.stop()
