"""A client that does not read its answer is cut off at a stated number of bytes; nobody else notices."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest

from kvbaton.client import Client
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import generate_pb2, generate_pb2_grpc
from tests.support.processes import Processes, all_routable
from tests.support.resources import gauges
from tests.support.simulator import Simulator
from tests.support.traffic import ask, fresh_prompt, greedy, oracle
from tests.support.waiting import eventually

MAX_BUFFERED = 64 * 1024
TOKENS = 20_000
# Seconds. The engine must make most of its tokens first.
WITHIN = 60.0
LOOKS = 5
# Without these gRPC would read some hundred KiB ahead for a client that doesn't.
NO_READING_AHEAD = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))


async def holding(processes: Processes) -> int:
    async with Simulator(processes.system_endpoints["decode"]) as simulator:
        return sum(rank["holding"] for rank in (await simulator.state())["ranks"])


async def event_loop_tasks(processes: Processes) -> int:
    return int((await gauges(processes.metrics_endpoints["frontend"]))["kvbaton_event_loop_tasks"])


async def test_a_client_that_does_not_read_is_cut_off(processes: Processes) -> None:
    processes.frontend("--link", "session", "--max-buffered-bytes", str(MAX_BUFFERED))
    processes.worker("prefill", "prefill")
    processes.worker("decode", "decode")
    async with (
        Client(processes.target) as client,
        grpc.aio.insecure_channel(processes.target, options=NO_READING_AHEAD) as channel,
    ):
        await all_routable(client, 2)
        await ask(client, prompt_tokens=40, tokens=4)
        # The first request's last tasks may be there yet.
        tasks_at_rest = min([await event_loop_tasks(processes) for _ in range(LOOKS)])

        prompt = fresh_prompt(40)
        request = generate_pb2.GenerateRequest(
            token_ids=generate_pb2.TokenIds(ids=prompt), sampling=greedy(TOKENS), request_id="slow"
        )
        call = generate_pb2_grpc.GenerateServiceStub(channel).Generate(request)
        responses = aiter(call)
        received = list((await anext(responses)).token_ids)
        await asyncio.gather(*(ask(client, prompt_tokens=40, tokens=200) for _ in range(8)))

        async def over_for_the_frontend() -> bool:
            return (await gauges(processes.metrics_endpoints["frontend"]))["kvbaton_live_requests"] == 0

        async def nothing_is_left() -> bool:
            # gRPC itself waits for the client to take the status, or to hang up.
            return not await holding(processes) and await event_loop_tasks(processes) <= tasks_at_rest + 1

        await eventually(over_for_the_frontend, within=WITHIN, every=0.1)
        await eventually(
            nothing_is_left, within=WITHIN, every=0.1, what="nothing left, although the client has not read"
        )
        assert not call.done()

        async def read_on() -> None:
            async for response in responses:
                received.extend(response.token_ids)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_on()
        error = RequestError.from_rpc_error(caught.value)
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.CLIENT_TOO_SLOW)
        assert error.request_id == "slow"
        assert received == oracle(prompt, TOKENS)[: len(received)], "a prefix of the right answer"
        assert len(received) < TOKENS

        async def at_rest() -> bool:
            return await event_loop_tasks(processes) <= tasks_at_rest

        await eventually(at_rest, within=WITHIN, every=0.1)


async def test_a_client_that_reads_gets_an_answer_much_longer_than_the_limit(processes: Processes) -> None:
    processes.frontend("--link", "session", "--max-buffered-bytes", str(MAX_BUFFERED))
    processes.worker("prefill", "prefill")
    processes.worker("decode", "decode")
    async with Client(processes.target) as client:
        await all_routable(client, 2)
        await ask(client, prompt_tokens=40, tokens=2 * MAX_BUFFERED // 4 - 8000)
