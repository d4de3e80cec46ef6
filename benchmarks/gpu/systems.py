"""What is measured: anything that takes a prompt of token ids and streams tokens back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from kvbaton.client import Client, SamplingParams


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
        sampling = SamplingParams(max_new_tokens=prompt.output_tokens, temperature=0, ignore_eos=True)
        async for chunk in self._client.stream(token_ids=prompt.token_ids, sampling=sampling):
            if chunk.token_ids:
                yield list(chunk.token_ids)
