"""The official clients against an edge behind a real socket, with strict validation of what they receive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.unit.edge.fakes import ScriptedGeneration
from tests.unit.edge.harness import served

T = TypeVar("T")

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]


@asynccontextmanager
async def sdk(generation: ScriptedGeneration, *, strict: bool = True) -> AsyncGenerator[AsyncOpenAI]:
    async with served(generation) as port, AsyncOpenAI(**_options(port, strict)) as client:
        yield client


async def with_sync_sdk(generation: ScriptedGeneration, use: Callable[[OpenAI], T]) -> T:
    """What the blocking client makes of it, in a thread of its own."""

    def in_thread(port: int) -> T:
        with OpenAI(**_options(port, strict=True)) as client:
            return use(client)

    async with served(generation) as port:
        return await asyncio.to_thread(in_thread, port)


def _options(port: int, strict: bool) -> dict[str, Any]:
    return {
        "base_url": f"http://127.0.0.1:{port}/v1",
        "api_key": "none",
        "max_retries": 0,
        "timeout": 10,
        "_strict_response_validation": strict,
    }
