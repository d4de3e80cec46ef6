"""`kvbaton prefill|decode --engine simulated` and a frontend, as processes, answering through gRPC."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from kvbaton.client import Client, SamplingParams
from kvbaton.errors import RequestError
from kvbaton.v1 import worker_pb2
from services.requests import Sampling
from services.worker.engines.simulated.oracle import expected_embedding, expected_tokens
from tests.support.processes import Processes, all_routable, answering
from tests.support.simulator import Simulator
from tests.support.waiting import eventually

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


async def test_an_embedding_worker_gives_the_oracles_vectors(processes: Processes) -> None:
    processes.worker(
        "embedding", "decode", "--embedding-worker", sim="embedding_dimension=16,matryoshka=true,dp_size=2"
    )
    async with Client(f"127.0.0.1:{processes.grpc_port}", timeout=20) as client:
        await all_routable(client, 1)
        prompts = [[*PROMPT, index] for index in range(64)]
        answers = await asyncio.gather(client.embed(prompts), *(client.embed([prompt]) for prompt in prompts))
        expected = [expected_embedding(prompt, 16).tolist() for prompt in prompts]
        assert answers[0].vectors == expected == [answer.vectors[0] for answer in answers[1:]]
        short = (await client.embed([PROMPT], dimensions=4)).vectors
        assert short == [expected_embedding(PROMPT, 4).tolist()]
        async with httpx.AsyncClient() as http:
            page = (await http.get(f"http://127.0.0.1:{processes.http_port}/metrics")).text
            assert 'kvbaton_embeddings_total{model="no-model",outcome="finished"} 66.0' in page
            assert 'kvbaton_embedded_inputs_total{model="no-model"} 129.0' in page
            page = (await http.get(f"http://{processes.system_endpoints['embedding']}/metrics")).text
            assert 'kvbaton_worker_legs_total{outcome="finished",role="embedding"} 66.0' in page

        async with Simulator(processes.system_endpoints["embedding"]) as engine:
            await engine.slow(1e6)
            running = asyncio.create_task(client.embed([PROMPT, [1]]))
            await eventually_live(engine, 2)
            running.cancel()
            await eventually_live(engine, 0)
            await engine.clear()
            await engine.kill_scheduler()
            assert await asyncio.to_thread(processes.processes["embedding"].wait, 20) == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_an_embedding_worker_that_is_lost_is_replaced_within_the_request(
    processes: Processes, how: signal.Signals
) -> None:
    processes.worker("first", "decode", "--embedding-worker")
    async with Client(f"127.0.0.1:{processes.grpc_port}", timeout=30) as client:
        await all_routable(client, 1)
        async with Simulator(processes.system_endpoints["first"]) as engine:
            await engine.slow(1e6)
            running = asyncio.create_task(client.embed([PROMPT]))
            await eventually_live(engine, 1)
        processes.worker("second", "decode", "--embedding-worker")
        await all_routable(client, 2)
        processes.signal("first", how)
        answer = await asyncio.wait_for(running, 5)
        assert answer.vectors == [expected_embedding(PROMPT, 64).tolist()]


async def eventually_live(engine: Simulator, count: int) -> None:
    async def live() -> bool:
        return sum(rank["live"] for rank in (await engine.state())["ranks"]) == count

    await eventually(live, what=f"{count} inputs in the engine")
