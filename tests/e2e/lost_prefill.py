"""A real prefill worker that is killed while its KV cache is on its way, and one that comes back at its address."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass

from kvbaton.client import Answer, Client, SamplingParams
from tests.e2e.telemetry import sample, settled
from tests.support.processes import Processes, all_routable
from tests.support.waiting import eventually

# Prefilled in many chunks, each of which is sent as soon as it is computed.
PROMPT = list(range(5000, 5640))
CHUNK = 64
DOOMED = "doomed"
SAMPLING = SamplingParams(max_new_tokens=16, temperature=0, ignore_eos=True)


@dataclass(frozen=True)
class LostPrefill:
    """What was seen. `sent`: bytes of KV cache, of `whole_cache`, that had left before the kill. `free_after`: seconds
    from the kill until decode held no page. `retried` was amid the kill, `next` came while nobody was there. `said` by
    decode of the pages, and by the frontend of the attempt that failed.
    """

    undisturbed: list[int]
    sent: float
    whole_cache: int
    held: int
    free_after: float
    retried: Answer
    next: Answer
    said: dict[str, list[str]]


async def ask_undisturbed(client: Client, prefill: str) -> list[int]:
    """The answer by way of another prefill worker than the doomed one, whose prefix cache is not to have the prompt."""
    return (await client.generate(token_ids=PROMPT, sampling=SAMPLING, prefill_worker=prefill)).token_ids


async def lose_prefill(
    processes: Processes, client: Client, prefill: str, decode: str, telemetry: str, undisturbed: list[int]
) -> LostPrefill:
    """Asks, kills the one prefill worker amid the transfer, and starts it again. `telemetry`: NIXL's metrics of it."""
    bytes_per_token = (await client.status()).workers[0].record.runtime.kv_bytes_per_token
    await client.generate(token_ids=PROMPT[:1], sampling=SAMPLING)  # proves the pair, and wakes NIXL's telemetry
    before = await settled(telemetry, "agent_tx_bytes_total")
    async with asyncio.TaskGroup() as asking, Client(processes.grpc_endpoints[decode]) as survivor:
        asked = client.generate(token_ids=PROMPT, sampling=SAMPLING, timeout=240, request_id=DOOMED)
        retried = asking.create_task(asked)

        async def sent() -> float:
            return await sample(telemetry, "agent_tx_bytes_total") - before

        moved = await eventually(sent, within=60, every=0.02, what="the first chunk is sent")
        held = (await survivor.status()).load.used_tokens
        await asyncio.to_thread(processes.kill, prefill)
        killed = time.monotonic()
        following = asking.create_task(client.generate(token_ids=PROMPT[1:], sampling=SAMPLING, timeout=240))

        async def free() -> bool:
            return not (await survivor.status()).load.used_tokens

        await eventually(free, within=60, every=0.1, what="decode holds no page")
        free_after = time.monotonic() - killed
        processes.restart(prefill)
    await all_routable(client, 2)
    words = {
        "decode": (decode, "what it was writing into is free"),
        "frontend": ("frontend", f"attempt failed.*{DOOMED}"),
    }
    said = {who: re.findall(f".*{what}.*", processes.log(name)) for who, (name, what) in words.items()}
    return LostPrefill(
        undisturbed, moved, len(PROMPT) * bytes_per_token, held, free_after, retried.result(), following.result(), said
    )
