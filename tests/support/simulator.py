"""Commands for a simulated engine behind a worker's system HTTP; `control` in its package lists them."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import httpx


class Simulator:
    """One worker's command channel; use it as an async context manager. Every command answers with the state."""

    def __init__(self, system_endpoint: str) -> None:
        """`system_endpoint` is host:port of the worker's system HTTP."""
        self._http = httpx.AsyncClient(base_url=f"http://{system_endpoint}", timeout=10.0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def state(self) -> dict[str, Any]:
        """What is wrong with it, and what every rank holds."""
        return _checked(await self._http.get("/simulator"))

    async def command(self, do: str, **arguments: object) -> dict[str, Any]:
        """Any command. Raises ValueError with the engine's words when it refuses."""
        return _checked(await self._http.post("/simulator", json={"do": do, **arguments}))

    async def freeze(self) -> None:
        """The scheduler and its transfers stand still; the host doesn't."""
        await self.command("freeze")

    async def thaw(self) -> None:
        """They go on."""
        await self.command("thaw")

    async def kill_scheduler(self) -> None:
        """The engine is dead; the host lives to say so."""
        await self.command("crash", how="scheduler")

    async def kill_process(self) -> None:
        """SIGKILL to the whole worker."""
        await self.command("crash", how="process")

    async def slow(self, factor: float) -> None:
        """Every time of the engine is multiplied; 1 is normal."""
        await self.command("slow", factor=factor)

    async def stall(self, on: bool = True) -> None:
        """Prefill writes half of every transfer's pages and then nothing."""
        await self.command("stall", on=on)

    async def silence(self, on: bool = True) -> None:
        """No heartbeat: neither the bootstrap server nor the load answers."""
        await self.command("silent", on=on)

    async def late_bootstrap(self, seconds: float) -> None:
        """Hand-shakes are handled this late; 0 is normal."""
        await self.command("late_bootstrap", seconds=seconds)

    async def wrong_first_token(self, count: int = 1) -> None:
        """So many requests begin with a wrong token."""
        await self.command("wrong_first_token", count=count)

    async def hold(self, phase: str, token: int, *, count: int = 1, after_tokens: int = 1) -> None:
        """The next requests that begin with `token` stand still in that phase (`simulated.faults.Phase`)."""
        await self.command("hold", phase=phase, token=token, count=count, after_tokens=after_tokens)

    async def release(self) -> None:
        """What is held goes on, and nothing else is held."""
        await self.command("release")

    async def abort_chunk(self, count: int = 1, *, after_tokens: int = 0, status: int = 500, message: str = "") -> None:
        """So many requests end with an abort of the engine's own."""
        await self.command("abort_chunk", count=count, after_tokens=after_tokens, status=status, message=message)

    async def early_length(self, count: int = 1, *, after_tokens: int = 1) -> None:
        """So many requests end with "length" before their length."""
        await self.command("early_length", count=count, after_tokens=after_tokens)

    async def finish_after_abort(self, on: bool = True) -> None:
        """Aborted requests end with "length" as if nothing had happened."""
        await self.command("finish_after_abort", on=on)

    async def play(self, prompt: list[int], tokens: list[int]) -> None:
        """From now on `prompt` is answered with `tokens` and the end of the sequence; tell both legs."""
        await self.command("script", prompt=prompt, tokens=tokens)

    async def flush_cache(self) -> None:
        """Every cached prefix is forgotten."""
        await self.command("flush_cache")

    async def clear(self) -> None:
        """Nothing is wrong any more."""
        await self.command("clear")


def _checked(response: httpx.Response) -> dict[str, Any]:
    if response.status_code == 400:
        raise ValueError(response.json()["error"])
    response.raise_for_status()
    return response.json()
