"""`kvbaton prefill|decode --engine simulated` and a frontend, as processes, answering through gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from kvbaton.client import Client, SamplingParams
from kvbaton.errors import RequestError
from kvbaton.v1 import worker_pb2
from services.requests import Sampling
from services.worker.engines.simulated.oracle import expected_tokens
from tests.support.processes import Processes, answering
from tests.support.simulator import Simulator

PROMPT = list(range(100, 160))


@pytest_asyncio.fixture
async def processes(etcd_endpoint: str, tmp_path: Path) -> AsyncIterator[Processes]:
    processes = Processes(etcd_endpoint, tmp_path)
    processes.frontend()
    try:
        yield processes
    finally:
        await asyncio.to_thread(processes.stop)


async def test_a_pair_answers_as_the_oracle_does(processes: Processes) -> None:
    processes.worker("prefill", "prefill", sim="dp_size=2")
    processes.worker("decode", "decode", sim="dp_size=2,decode_step=0.001")
    async with Client(f"127.0.0.1:{processes.grpc_port}", timeout=20) as client:
        await answering(client)

        async def one(index: int) -> None:
            prompt = [*PROMPT, index]
            answer = await client.generate(
                token_ids=prompt, sampling=SamplingParams(max_new_tokens=40, temperature=0.7, seed=index)
            )
            sampling = Sampling(max_new_tokens=40, temperature=0.7, seed=index)
            assert answer.token_ids == expected_tokens(prompt, sampling)

        await asyncio.gather(*(one(index) for index in range(64)))

        async with Simulator(processes.system_endpoints["decode"]) as decode:
            state = await decode.state()
            assert sum(rank["requests"] for rank in state["ranks"]) >= 64
            with pytest.raises(ValueError, match="do: 'dance'"):
                await decode.command("dance")
            await decode.abort_chunk(count=8, after_tokens=2)
            with pytest.raises(RequestError, match="simulated abort"):
                await client.generate(token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=20, temperature=0))
            await decode.clear()
            answer = await client.generate(token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=20, temperature=0))
            assert answer.token_ids == expected_tokens(PROMPT, Sampling(max_new_tokens=20, temperature=0.0))

            await decode.kill_scheduler()
            status = await asyncio.to_thread(processes.processes["decode"].wait, 20)
            assert status == 1, processes.log("decode")
        async with Simulator(processes.system_endpoints["prefill"]) as prefill:
            await prefill.kill_process()
            assert await asyncio.to_thread(processes.processes["prefill"].wait, 20) == -9


async def test_the_aggregated_worker_answers_alike(processes: Processes) -> None:
    processes.worker("worker", "decode", "--disaggregation-mode", "null", "--page-size", "8")
    async with Client(f"127.0.0.1:{processes.grpc_port}", timeout=20) as client:
        await answering(client)
        answer = await client.generate(token_ids=PROMPT, sampling=SamplingParams(max_new_tokens=30, temperature=0))
        assert answer.token_ids == expected_tokens(PROMPT, Sampling(max_new_tokens=30, temperature=0.0))
        info = await client.status()
        assert info.state == worker_pb2.WORKER_STATE_SERVING


async def test_bad_options_end_the_worker_with_their_name(processes: Processes) -> None:
    processes.worker("decode", "decode", sim="speed=3")
    assert await asyncio.to_thread(processes.processes["decode"].wait, 60) == 1
    assert "there is no 'speed'" in processes.log("decode")
