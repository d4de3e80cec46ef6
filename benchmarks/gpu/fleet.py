"""A cluster that things are done to: who has the request, who still holds pages, how a request ended."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.answers import Answered, answered, greedy
from benchmarks.gpu.launch import Running
from kvbaton.client import Answer, Client
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import health_pb2

_POLL = 0.02
HANG = 120.0
"""Seconds after which a request that has not ended counts as hanging: more than the frontend's deadlines here."""


@dataclass
class Ended:
    """How a request ended: its answer, or its error. Seconds since it was sent."""

    request_id: str
    answer: Answered | None = None
    error: RequestError | None = None
    hung: bool = False
    seconds: float = 0.0
    migrations: int = 0

    @property
    def orderly(self) -> bool:
        """Answered, or an error that says which."""
        return self.answer is not None or (self.error is not None and self.error.reason is not Reason.UNTYPED)

    def __str__(self) -> str:
        how = "hung" if self.hung else ("answered" if self.answer is not None else str(self.error))
        return f"{how} after {self.seconds:.1f} s"


class Fleet:
    """Clients of every worker beside the frontend's. Use it as an async context manager."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self._stack = AsyncExitStack()
        self._workers: dict[str, Client] = {}

    async def __aenter__(self) -> Fleet:
        for name in self.running.cluster.workers:
            client = Client(self.running.cluster.endpoint(name), call_timeout=2.0)
            self._workers[name] = await self._stack.enter_async_context(client)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def names(self, role: str) -> list[str]:
        """Of the workers of this role."""
        return [name for name in self._workers if name.split("-")[0] == role]

    async def send(
        self, request_id: str, token_ids: Iterable[int], output_tokens: int, seen: Answer | None = None, **options: Any
    ) -> Ended:
        """To its end, whatever it is. `seen` gets the answer as it comes."""
        ended, answer, began = Ended(request_id), seen or Answer(), time.monotonic()
        asked: Any = {
            "token_ids": token_ids,
            "sampling": greedy(output_tokens),
            "logprobs": 2,
            "request_id": request_id,
        }
        try:
            async with asyncio.timeout(HANG):
                async for chunk in self.running.client.stream(**asked, **options):
                    answer.add(chunk)
            ended.answer, ended.migrations = answered(answer), answer.finished.migrations
        except RequestError as error:
            ended.error = error
        except TimeoutError:
            ended.hung = True
        ended.seconds = time.monotonic() - began
        return ended

    async def busy(self, role: str, within: float = 30.0) -> str:
        """The first worker of the role that is seen with a live request. Raises RuntimeError."""
        until = time.monotonic() + within
        while time.monotonic() < until:
            for name in self.names(role):
                load = await self._load(name)
                if load is not None and load.live_requests:
                    return name
            await asyncio.sleep(_POLL)
        raise RuntimeError(f"no {role} worker had a request for {within:g} s")

    async def idle(self, within: float, role: str = "") -> float | None:
        """Seconds until no worker (of the role) that answers has a request or a token's page in use; None: never."""
        began = time.monotonic()
        while time.monotonic() - began < within:
            loads = [await self._load(name) for name in (self.names(role) if role else self._workers)]
            if not any(load.live_requests or load.used_tokens for load in loads if load is not None):
                return time.monotonic() - began
            await asyncio.sleep(_POLL)
        return None

    def kill(self, name: str) -> None:
        """With all of its processes."""
        self.running.cluster.children[name].kill()

    async def _load(self, name: str) -> health_pb2.Load | None:
        try:
            return (await self._workers[name].status()).load
        except RequestError:
            return None


async def attempts(log: Path, request_id: str, within: float = 2.0) -> int | None:
    """How often the frontend tried, by its log, which has it a moment after the client."""

    def found() -> int | None:
        return attempts_in(log.read_text(errors="replace").splitlines(), request_id)

    await first(lambda: found() is not None, within)
    return found()


def attempts_in(lines: Iterable[str], request_id: str) -> int | None:
    """Of the line "request ended" of this request; None without one."""
    for line in lines:
        if line.startswith("{") and '"request ended"' in line and request_id in line:
            found = json.loads(line)
            if found.get("request_id") == request_id:
                return int(found["attempts"])
    return None


async def first(condition: Callable[[], bool], within: float) -> bool:
    """Whether it came true in time."""
    until = time.monotonic() + within
    while not condition():
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.002)
    return True
