"""Waiting for a condition instead of sleeping."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any


async def eventually(
    condition: Callable[[], Any | Awaitable[Any]], *, within: float = 10.0, every: float = 0.02, what: str = ""
) -> Any:
    """The first truthy result of `condition`, or AssertionError after `within` seconds."""
    ends = time.monotonic() + within
    while True:
        result = condition()
        if inspect.isawaitable(result):
            result = await result
        if result:
            return result
        if time.monotonic() > ends:
            raise AssertionError(f"not within {within:g} s: {what or condition}")
        await asyncio.sleep(every)
