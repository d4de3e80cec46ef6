"""deploy/local/agg.sh and disagg.sh with simulated workers: they serve a request and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbaton.client import Client, SamplingParams
from services.requests import Sampling
from services.worker.engines.simulated.oracle import expected_tokens
from tests.support.processes import answering
from tests.support.scripts import Script
from tests.support.waiting import eventually

PROMPT = list(range(100, 140))
KVBATON = f'#!/bin/sh\nexec {sys.executable} -P -m services.cli "$@"\n'


@pytest.fixture(params=["agg.sh", "disagg.sh"])
def script(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Script]:
    script = Script(request.param, tmp_path / "run", KVBATON, "--engine", "simulated", "--drain-grace", "0.1")
    try:
        yield script
    finally:
        script.clean_up()


async def answer_once(script: Script) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    async with Client(f"127.0.0.1:{script.ports['FRONTEND_PORT']}", timeout=20) as client:
        await answering(client)
        answer = await client.generate(token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=12, temperature=0))
    assert answer.token_ids == expected_tokens(PROMPT, sampling)


def assert_ports_are_free(script: Script) -> None:
    for port in (*script.ports.values(), script.etcd_port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
async def test_a_script_serves_and_leaves_nothing_behind(script: Script, number: signal.Signals) -> None:
    await answer_once(script)
    script.process.send_signal(number)
    status = await asyncio.to_thread(script.wait)
    assert status == (-number if number == signal.SIGKILL else 128 + number), script.text()
    # A script that was killed can wait for nobody: its processes hear of it from the kernel, and drain.
    await eventually(lambda: not script.left(), within=2 if number != signal.SIGKILL else 30, what="everything gone")
    assert_ports_are_free(script)


async def test_a_worker_that_dies_ends_the_script_with_its_log(script: Script) -> None:
    await answer_once(script)
    os.kill(script.pid_of("decode"), signal.SIGKILL)
    assert await asyncio.to_thread(script.wait) == 128 + signal.SIGKILL
    told = script.text().partition(f"{script.worker} ended with status 137")[2]
    assert "registered" in told
    assert script.left() == []
    assert_ports_are_free(script)
