"""A cluster of processes to be fuzzed, and what must hold after each attack: nothing runs on or has grown."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from kvbaton.client import Client
from services.requests import Sampling
from services.worker.engines.simulated.oracle import TokenModel, expected_tokens
from tests.support.ports import free_port
from tests.support.processes import Processes, all_routable
from tests.support.resources import gauges, open_files, resident_bytes
from tests.support.traffic import greedy
from tests.support.waiting import eventually

MODEL = "fuzzed"
EMBEDDING_MODEL = "fuzzed-embeddings"
VOCABULARY = 1200
PROMPT = list(range(3, 60))
TOKENS = 12

FRONTEND = "frontend"
WORKERS = ("prefill", "decode", "embedding")

# Everything that is running or waiting for someone, by process.
_LIVE = {
    FRONTEND: ("kvbaton_live_requests", "kvbaton_queued_requests", "kvbaton_live_embeddings"),
    **dict.fromkeys(WORKERS, ("kvbaton_worker_live_legs",)),
}
# What only a bug logs.
_BUGS = re.compile(r"Traceback \(most recent call last\)|never retrieved|handler failed|was never awaited|core dumped")


@dataclass(frozen=True, slots=True)
class Holding:
    """What a process holds when nothing runs."""

    resident_bytes: int
    open_files: int
    tasks: int


@dataclass(frozen=True, slots=True)
class Calm:
    """What the cluster looked like at rest: what each process holds, and how long its log was."""

    holdings: Mapping[str, Holding]
    log_lengths: Mapping[str, int]


class Target(Processes):
    """A frontend, a prefill, a decode and an embedding worker with simulated engines, under a real tokenizer."""

    def __init__(self, etcd_endpoint: str, logs: Path, model_folder: Path) -> None:
        super().__init__(etcd_endpoint, logs, {"XDG_CACHE_HOME": str(logs / "cache")})
        self._model_folder = model_folder

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def start(self) -> None:
        """Returns when it answers."""
        # Heartbeats are not what is tried here, and the machine may be busy.
        self.frontend("--heartbeat", "2")
        self._simulated("prefill", "prefill", MODEL, "--disaggregation-bootstrap-port", str(free_port()))
        self._simulated("decode", "decode", MODEL)
        self._simulated("embedding", "decode", EMBEDDING_MODEL, "--embedding-worker")
        asyncio.run(self._ready())

    async def _ready(self) -> None:
        async with Client(self.target, timeout=20) as client:
            await all_routable(client, len(WORKERS))
            await self.answers_well()

    def _simulated(self, name: str, command: str, model: str, *arguments: str) -> None:
        ports = [free_port(), free_port()]
        self.grpc_endpoints[name], self.system_endpoints[name] = (f"127.0.0.1:{port}" for port in ports)
        sim = f"vocab_size={VOCABULARY},context_length=4096"
        engine = ("--engine", "simulated", "--sim", sim, "--model-path", str(self._model_folder))
        where = ("--port", str(ports[0]), "--system-port", str(ports[1]), "--served-model-name", model)
        self._start(name, command, *engine, *where, *arguments, "--drain-grace", "0.1")

    async def answers_well(self) -> None:
        """The good requests, on every way in; the generated tokens are the oracle's."""
        async with Client(self.target, timeout=20) as client:
            answer = await client.generate(model=MODEL, token_ids=PROMPT, sampling=greedy(TOKENS))
            expected = await client.generate(model=MODEL, text="Good morning", sampling=greedy(TOKENS))
            assert answer.token_ids == _oracle(PROMPT)
        async with httpx.AsyncClient(base_url=self.http_url, timeout=20) as http:
            body = {"model": MODEL, "prompt": "Good morning", "max_tokens": TOKENS, "temperature": 0}
            plain = (await http.post("/v1/completions", json=body)).raise_for_status().json()
            assert plain["choices"][0]["text"] == expected.text
            chat = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stream": True}
            events = (await http.post("/v1/chat/completions", json=chat)).raise_for_status().text
            assert events.endswith("data: [DONE]\n\n")
            embedding = {"model": EMBEDDING_MODEL, "input": ["Good", "morning"]}
            assert len((await http.post("/v1/embeddings", json=embedding)).raise_for_status().json()["data"]) == 2

    async def calm(self) -> Calm:
        """What is held at rest. Raises AssertionError where something runs on."""
        await eventually(self._nothing_runs, within=10, every=0.1, what="nothing runs in any process")
        holdings = {name: await self._holding(name) for name in self.metrics_endpoints}
        return Calm(holdings, {name: len(self.log(name)) for name in self.processes})

    @asynccontextmanager
    async def unharmed(self, *, growth_bytes: int) -> AsyncGenerator[None]:
        """An attack within; then `check_unharmed`."""
        before = await self.calm()
        yield
        await self.check_unharmed(before, growth_bytes=growth_bytes)

    async def check_unharmed(self, before: Calm, *, growth_bytes: int) -> None:
        """Nothing runs on, no task and no socket is left, no process has grown by more than `growth_bytes`, no bug was
        logged, and good requests are answered."""
        for name, process in self.processes.items():
            assert process.poll() is None, f"{name} ended:\n{self.log(name)[-3000:]}"
        await self.answers_well()
        after = await self.calm()

        async def as_before(name: str) -> bool:
            now, then = await self._holding(name), before.holdings[name]
            return now.tasks <= then.tasks + 2 and now.open_files <= then.open_files + 4

        for name in self.metrics_endpoints:
            then = before.holdings[name]
            what = f"tasks and files of {name} as before ({then}; then {after.holdings[name]})"
            await eventually(lambda name=name: as_before(name), within=15, every=0.2, what=what)
            grown = after.holdings[name].resident_bytes - then.resident_bytes
            print(f"{name}: {grown / 2**20:+.1f} MiB")
            assert grown <= growth_bytes, f"{name} grew by {grown / 2**20:.0f} MiB"
        for name in self.processes:
            told = self.log(name)[before.log_lengths[name] :]
            found = _BUGS.search(told)
            assert found is None, f"{name} logged a bug:\n{told[max(0, found.start() - 2000) : found.end() + 4000]}"

    async def answered_tokens(self) -> float:
        """Tokens that all answers so far have had."""
        return (await gauges(self.metrics_endpoints[FRONTEND]))["kvbaton_completion_tokens_total"]

    async def _nothing_runs(self) -> bool:
        for name, endpoint in self.metrics_endpoints.items():
            values = await gauges(endpoint)
            if any(values.get(gauge, 0.0) for gauge in _LIVE[name]):
                return False
        return True

    async def _holding(self, name: str) -> Holding:
        values = await gauges(self.metrics_endpoints[name])
        pid = self.pid(name)
        return Holding(resident_bytes(pid), open_files(pid), int(values["kvbaton_event_loop_tasks"]))


def _oracle(prompt: list[int]) -> list[int]:
    return expected_tokens(prompt, Sampling(max_new_tokens=TOKENS, temperature=0.0), TokenModel(VOCABULARY))
