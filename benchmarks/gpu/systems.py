"""What is measured: anything that takes a prompt of token ids and streams tokens back."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

import httpx
import orjson

from kvbaton.client import Client, SamplingParams
from kvbaton.v1 import worker_pb2
from kvbaton.v1.generate_pb2 import Bootstrap


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: `output_tokens` are generated, greedy, whatever comes."""

    token_ids: list[int]
    output_tokens: int


class System(Protocol):
    """One way through the engines. Raises RuntimeError for an answer that isn't one."""

    name: str

    def stream(self, prompt: Prompt) -> AsyncIterator[list[int]]:
        """New tokens, message by message."""
        ...


class Baton:
    """Through the frontend's gRPC."""

    def __init__(self, name: str, client: Client) -> None:
        self.name = name
        self._client = client

    async def stream(self, prompt: Prompt) -> AsyncIterator[list[int]]:
        """See `System`."""
        async for chunk in self._client.stream(token_ids=prompt.token_ids, sampling=_greedy(prompt)):
            if chunk.token_ids:
                yield list(chunk.token_ids)


class Http:
    """Through the frontend's OpenAI API: /v1/completions with token ids, streamed.

    Not by the openai SDK, which checks every number of a prompt on its way: with 8 000 of them that takes longer than
    the rest of the way.
    """

    def __init__(self, name: str, client: httpx.AsyncClient, model: str) -> None:
        self.name = name
        self._client, self._model = client, model

    async def stream(self, prompt: Prompt) -> AsyncIterator[list[int]]:
        """See `System`. There are no token ids in its events: each stands for so many zeros."""
        body = {
            "model": self._model,
            "prompt": prompt.token_ids,
            "max_tokens": prompt.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        headers = {"content-type": "application/json"}
        so_far = 0
        request = self._client.stream("POST", "/v1/completions", content=orjson.dumps(body), headers=headers)
        async with request as response:
            if response.is_error:
                raise RuntimeError((await response.aread()).decode(errors="replace"))
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = orjson.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                usage = event.get("usage")
                if usage is not None and (news := usage["completion_tokens"] - so_far) > 0:
                    so_far = usage["completion_tokens"]
                    yield [0] * news


class Workers:
    """Baton's prefill and decode worker without its frontend: both legs at once, the room made here."""

    def __init__(self, name: str, prefill: Client, decode: Client, bootstrap: worker_pb2.BootstrapEndpoint) -> None:
        self.name = name
        self._prefill, self._decode, self._bootstrap = prefill, decode, bootstrap

    async def stream(self, prompt: Prompt) -> AsyncIterator[list[int]]:
        """See `System`. Prefill's one token is awaited and dropped."""
        room = Bootstrap(
            host=self._bootstrap.host, port=self._bootstrap.port, room=1 + secrets.randbelow((1 << 63) - 1)
        )
        sampling = _greedy(prompt)
        prefilling = asyncio.create_task(
            self._prefill.generate(token_ids=prompt.token_ids, sampling=sampling, bootstrap=room)
        )
        try:
            async for chunk in self._decode.stream(token_ids=prompt.token_ids, sampling=sampling, bootstrap=room):
                if chunk.token_ids:
                    yield list(chunk.token_ids)
            await prefilling
        finally:
            prefilling.cancel()


def _greedy(prompt: Prompt) -> SamplingParams:
    return SamplingParams(max_new_tokens=prompt.output_tokens, temperature=0, ignore_eos=True)
