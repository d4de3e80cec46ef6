#!/usr/bin/env python3
"""A prefill and a decode worker on this machine, requests through both, and the proof of it (`make demo`)."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
import urllib.request
from collections.abc import Sequence

from kvbaton.client import Answer, Client, SamplingParams
from kvbaton.errors import RequestError
from services.telemetry.logging import configure_logging
from services.tools.cluster import LocalCluster, NotReadyError
from services.tools.generate import describe_answer
from services.tools.options import ClusterOptions
from services.tools.ports import Ports
from services.tools.progress import show
from services.tools.supervisor import ChildDiedError

PROMPT = "The capital of France is"
QUESTION = "Name three primary colors."
GREEDY = 0.0
# The frontend lets each pair of workers hand over one page before the pair's first request.
PROOF_PAGES = 1


class Steps:
    """Numbered headings with the time since the start."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._number = 0

    def next(self, title: str) -> None:
        self._number += 1
        print(f"\n[{self._number}] {title}  ({time.monotonic() - self._began:.1f} s)", flush=True)


async def main() -> int:
    configure_logging(level="warning", format="console", service="demo")
    telemetry_port = Ports().pick("127.0.0.1", 19090)
    options = ClusterOptions(
        mode="disagg", model_path="smollm2", device="cpu", env={"prefill": nixl_telemetry(telemetry_port)}
    )
    steps = Steps()
    steps.next("Starting etcd, a frontend, a prefill worker and a decode worker (SGLang on the CPU, SmolLM2-135M)")
    try:
        with show(sys.stderr) as board:
            cluster = LocalCluster(options, board)
            await cluster.start()
    except (ChildDiedError, NotReadyError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    try:
        proven = await requests(cluster, steps, telemetry_port)
    finally:
        steps.next("Shutting down: the frontend first, then the workers, then etcd")
        await cluster.stop()
    leftovers = cluster.leftovers() + [f"{name} had to be killed" for name in cluster.killed]
    for leftover in leftovers:
        print(f"    left behind: {leftover}")
    if not leftovers:
        print("    no process is left")
    steps.next("Everything worked." if proven and not leftovers else "Something is wrong; see above.")
    print(f"    logs: {cluster.log_dir}")
    return 0 if proven and not leftovers else 1


async def requests(cluster: LocalCluster, steps: Steps, telemetry_port: int) -> bool:
    """Sends the requests; True when each was answered by both workers and KV caches moved between them."""
    async with Client(cluster.grpc_endpoint, timeout=120.0) as client:
        before = await bytes_sent(telemetry_port)
        steps.next(f"gRPC, text completion at {cluster.grpc_endpoint}, greedy")
        text = await stream(client, PROMPT, text=PROMPT)
        steps.next(f"gRPC, chat: {QUESTION}")
        chat = await stream(client, "", chat=[{"role": "user", "content": QUESTION}])
    steps.next(f"HTTP, the same completion at {cluster.http_url}/v1/completions")
    over_http, prompt_tokens_over_http = await asyncio.to_thread(complete_over_http, cluster)
    print(indented(PROMPT + over_http))

    steps.next("Who did it")
    for name, answer in (("prefill", text.finished.prefill_worker), ("decode", text.finished.decode_worker)):
        print(f"    {name:8} {answer}  (pid {cluster.children[name].pid}, {cluster.endpoint(name)})")
    moved = await bytes_sent(telemetry_port) - before
    runtime = cluster.workers["prefill"].runtime
    page_bytes = runtime.kv_bytes_per_token * runtime.page_size
    prompts = [text.finished.usage.prompt_tokens, chat.finished.usage.prompt_tokens, prompt_tokens_over_http]
    pages = sum(math.ceil(tokens / runtime.page_size) for tokens in prompts)
    print(f"    NIXL of the prefill process wrote {moved:,.0f} bytes into the decode process (agent_tx_bytes_total)")
    print(f"    prompts of {prompts} tokens fill {pages} pages of {runtime.page_size}: {pages * page_bytes:,} bytes")
    print(f"    {PROOF_PAGES} page before the first request proved that the two can hand over: {page_bytes:,} bytes")

    checks = {
        "each request went through a prefill and a decode worker": all(
            answer.finished.prefill_worker == cluster.workers["prefill"].instance_id
            and answer.finished.decode_worker == cluster.workers["decode"].instance_id
            for answer in (text, chat)
        ),
        # Beside the pages each request has a small message about its first token.
        "exactly these KV pages went from one process to the other": moved // page_bytes == pages + PROOF_PAGES,
        "HTTP gives the same greedy answer as gRPC": over_http == text.text,
    }
    for claim, holds in checks.items():
        print(f"    {'yes' if holds else 'NO '}  {claim}")
    return all(checks.values())


async def stream(
    client: Client, shown_first: str, *, text: str | None = None, chat: Sequence[dict[str, str]] | None = None
) -> Answer:
    """Streams one greedy answer to the terminal."""
    answer, began = Answer(), time.monotonic()
    first = last = began
    print(f"    {shown_first}", end="", flush=True)
    sampling = SamplingParams(max_new_tokens=24, temperature=GREEDY)
    async for chunk in client.stream(text=text, chat=chat, sampling=sampling):
        if chunk.token_ids:
            last = time.monotonic()
            first = last if not answer.token_ids else first
        answer.add(chunk)
        print(indented(chunk.text)[4:], end="", flush=True)
    rate = (len(answer.token_ids) - 1) / (last - first) if last > first else None
    print(f"\n    -- {describe_answer(answer, first - began, rate)}")
    return answer


def complete_over_http(cluster: LocalCluster) -> tuple[str, int]:
    """One completion through the OpenAI API: its text, and how many tokens its prompt had."""
    model = cluster.workers["decode"].model.name
    body = {"model": model, "prompt": PROMPT, "max_tokens": 24, "temperature": GREEDY}
    request = urllib.request.Request(
        f"{cluster.http_url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        answer = json.load(reply)
    return str(answer["choices"][0]["text"]), int(answer["usage"]["prompt_tokens"])


def indented(text: str) -> str:
    """Every line four columns to the right."""
    return "    " + text.replace("\n", "\n    ")


def nixl_telemetry(port: int) -> dict[str, str]:
    """Makes the NIXL agent of a worker's scheduler count its bytes and show them on a port of this machine."""
    return {
        "NIXL_TELEMETRY_ENABLE": "y",
        "NIXL_TELEMETRY_EXPORTER": "prometheus",
        "NIXL_TELEMETRY_PROMETHEUS_LOCAL": "y",
        "NIXL_TELEMETRY_PROMETHEUS_PORT": str(port),
    }


async def bytes_sent(port: int) -> float:
    """What the agent behind `port` has written to its peers so far. The counter may lag by a moment."""

    def read() -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
            lines = reply.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("agent_tx_bytes_total"))

    await asyncio.sleep(1.0)
    return await asyncio.to_thread(read)


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except KeyboardInterrupt:
        sys.exit(130)
    except (RequestError, OSError) as failure:
        sys.exit(f"demo: {failure}")
