"""A request that is followed through a fault, and others beside it that must not feel it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Any

from kvbaton.client import Client
from kvbaton.errors import RequestError
from tests.support.traffic import WRONG_ANSWER, ask, fresh_prompt, greedy, oracle
from tests.support.waiting import eventually

# The first token of a prompt that a simulated engine may hold; prompts of others begin with higher ones.
MARK = 2


class Subject:
    """One streaming request whose prompt begins with MARK. Every token and the one end that it has are kept."""

    def __init__(self, client: Client, *, prompt_tokens: int = 64, tokens: int = 24, timeout: float = 60.0) -> None:
        self.request_id = uuid.uuid4().hex
        self.prompt = [MARK, *fresh_prompt(prompt_tokens - 1)]
        self.received: list[int] = []
        self.finishes = 0
        self.error: RequestError | None = None
        self.sent_at = time.monotonic()
        self.last_token_at = 0.0
        self.ended_at = 0.0
        self._client, self._tokens, self._timeout = client, tokens, timeout
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        stream = self._client.stream(
            token_ids=self.prompt, sampling=greedy(self._tokens), request_id=self.request_id, timeout=self._timeout
        )
        try:
            async with contextlib.aclosing(stream) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    assert not self.finishes, "a message behind the end"
                    self.received.extend(chunk.token_ids)
                    self.last_token_at = time.monotonic()
                    self.finishes += chunk.HasField("finished")
        except RequestError as error:
            self.error = error
        finally:
            self.ended_at = time.monotonic()

    @property
    def ended(self) -> bool:
        return self._task.done()

    async def end(self, within: float) -> None:
        """Waits for its end. Raises TimeoutError, which is a request that hangs."""
        done, _ = await asyncio.wait([self._task], timeout=within)
        if not done:
            raise TimeoutError(f"request {self.request_id} has not ended within {within:g} s")
        if not self._task.cancelled():
            self._task.result()

    async def leave(self) -> None:
        """The client is gone."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def check_tokens(self) -> None:
        """What came is the oracle's answer or, where the request did not finish, how it begins."""
        answer = oracle(self.prompt, self._tokens)
        assert self.received == answer[: len(self.received)], WRONG_ANSWER
        if self.finishes:
            assert len(self.received) == len(answer), "an answer that ended early"
            assert self.error is None, "an error behind the end"


class Bystanders:
    """Requests one behind the other while something happens; the first that fails is raised at the end."""

    def __init__(self, clients: list[Client]) -> None:
        self.answered = 0
        self._clients = clients
        self._on = True

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[Bystanders]:
        """They run inside."""
        async with asyncio.TaskGroup() as tasks:
            for client in self._clients:
                tasks.create_task(self._ask_on(client))
            try:
                yield self
            finally:
                self._on = False

    async def more(self, count: int, *, within: float = 30.0) -> None:
        """Waits until so many more are answered."""
        enough = self.answered + count
        await eventually(lambda: self.answered >= enough, within=within, what=f"{count} more answers")

    async def _ask_on(self, client: Client) -> None:
        while self._on:
            await ask(client, prompt_tokens=40, tokens=12)
            self.answered += 1
            await asyncio.sleep(0.02)


def lines_about(log: str, request_id: str) -> list[dict[str, Any]]:
    """What a process has logged of a request."""
    entries = (json.loads(line) for line in log.splitlines() if line.startswith("{") and request_id in line)
    return [entry for entry in entries if entry.get("request_id") == request_id]


def ended_lines(log: str) -> list[dict[str, Any]]:
    """A frontend's last words of its requests."""
    entries = (json.loads(line) for line in log.splitlines() if line.startswith("{") and "request ended" in line)
    return [entry for entry in entries if entry["event"] == "request ended"]


def logged_at(entry: dict[str, Any]) -> float:
    """Unix seconds."""
    return datetime.fromisoformat(entry["timestamp"]).timestamp()
