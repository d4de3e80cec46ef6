"""Bare SGLang: engines started one by one, driven directly; in a pair both legs are posted at once."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from benchmarks.gpu.systems import Prompt

_READY_SECONDS = 420.0
_ROOT = Path(__file__).resolve().parents[2]


class BareEngine:
    """One engine's process and the connection to it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._socket = folder / f"{name}.sock"
        self._log = folder / f"{name}.log"
        self._process: Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Queue[dict[str, Any]]] = {}
        self._reading: asyncio.Task[None] | None = None

    async def start(self, native_args: Sequence[str], *, gpu: int | None, env: dict[str, str] | None = None) -> None:
        """Returns when it takes requests. Raises RuntimeError when it ends before."""
        command = [sys.executable, "-P", str(_ROOT / "benchmarks/gpu/bare_engine.py"), "--socket", str(self._socket)]
        environment = {**os.environ, **(env or {})}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, *native_args, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + _READY_SECONDS
        while not self._socket.with_suffix(".ready").exists():
            if self._process.returncode is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not start: {self._log}")
            await asyncio.sleep(0.2)
        reader, self._writer = await asyncio.open_unix_connection(self._socket, limit=1 << 24)
        self._reading = asyncio.create_task(self._read(reader))

    async def stop(self) -> None:
        """Its whole process group."""
        if self._reading is not None:
            self._reading.cancel()
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), 20)
            except TimeoutError:
                os.killpg(self._process.pid, 9)
                await self._process.wait()

    async def stream(self, prompt: Prompt, **arguments: Any) -> AsyncIterator[list[int]]:
        """New tokens. Raises RuntimeError for an end that is no answer."""
        assert self._writer is not None
        number = next(self._numbers)
        answers = self._answers[number] = asyncio.Queue[dict[str, Any]]()
        sampling = {"max_new_tokens": prompt.output_tokens, "temperature": 0.0, "ignore_eos": True}
        request = {"number": number, "input_ids": prompt.token_ids, "sampling_params": sampling, **arguments}
        self._writer.write(orjson.dumps(request) + b"\n")
        try:
            while True:
                line = await answers.get()
                if line["tokens"]:
                    yield line["tokens"]
                if line["end"] in ("stop", "length"):
                    return
                if line["end"]:
                    raise RuntimeError(f"{self.name}: {line['end']}")
        finally:
            del self._answers[number]

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while raw := await reader.readline():
            line = orjson.loads(raw)
            if (answers := self._answers.get(line["number"])) is not None:
                answers.put_nowait(line)


@dataclass
class BarePair:
    """Prefill and decode; the driver makes the room and posts both legs at once."""

    name: str
    prefill: BareEngine
    decode: BareEngine
    bootstrap_port: int

    async def stream(self, prompt: Prompt) -> AsyncIterator[list[int]]:
        """See `System`. Prefill's one token is awaited and dropped."""
        room = 1 + secrets.randbelow((1 << 63) - 1)
        where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.bootstrap_port, "bootstrap_room": room}
        prefilling = asyncio.create_task(_to_the_end(self.prefill.stream(prompt, **where)))
        await asyncio.sleep(0)  # prefill's leg is sent first
        async for tokens in self.decode.stream(prompt, **where):
            yield tokens
        await prefilling


class BareAggregated:
    """Aggregated engines in turn."""

    def __init__(self, name: str, engines: Sequence[BareEngine]) -> None:
        self.name = name
        self._turns = itertools.cycle(engines)

    async def stream(self, prompt: Prompt) -> AsyncIterator[list[int]]:
        """See `System`."""
        async for tokens in next(self._turns).stream(prompt):
            yield tokens


async def _to_the_end(tokens: AsyncIterator[list[int]]) -> None:
    async for _ in tokens:
        pass
