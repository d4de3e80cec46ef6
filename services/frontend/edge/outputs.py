"""The outputs of everything that one HTTP request asks for, as one sequence with its choices numbered through."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from kvbaton.errors import RequestError
from services.frontend.edge.calls import Call
from services.frontend.request.api import Generation, Output

Admitted = Callable[[int, int], None]
"""Is told the position of a prompt and its length in tokens, before any of its outputs."""


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What an HTTP request asks of the frontend: one call, or several that live and fail together."""

    request_id: str
    calls: Sequence[Call]

    @property
    def choices_per_call(self) -> int:
        """Answers to each prompt."""
        return self.calls[0].choices


@asynccontextmanager
async def outputs_of(
    generation: Generation, work: Work, trace_headers: Mapping[str, str], admitted: Admitted
) -> AsyncGenerator[AsyncIterator[Output], None]:
    """The outputs of requests that are over, one way or the other, when the context ends.

    The outputs of one call keep their order; those of several come as they happen.
    """
    if len(work.calls) == 1:
        async with _outputs_of_one(generation, work, 0, trace_headers, admitted) as outputs:
            yield outputs
        return
    # One place for each call: a client that reads slowly holds all of them up.
    arrivals: asyncio.Queue[Output | Exception | None] = asyncio.Queue(maxsize=len(work.calls))

    async def pump(position: int) -> None:
        first_choice = position * work.choices_per_call
        try:
            async with _outputs_of_one(generation, work, position, trace_headers, admitted) as outputs:
                async for output in outputs:
                    await arrivals.put(dataclasses.replace(output, index=first_choice + output.index))
            await arrivals.put(None)
        except RequestError as error:
            # Here and not by the reader: only this task knows which of the prompts it was.
            await arrivals.put(work.calls[position].in_openai_terms(error, work.request_id))
        except Exception as error:  # noqa: BLE001, the reader raises it
            await arrivals.put(error)

    pumps = [asyncio.create_task(pump(position), name="http-prompt") for position in range(len(work.calls))]
    try:
        yield _arriving(arrivals, len(pumps))
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.wait(pumps)


async def _arriving(arrivals: asyncio.Queue[Output | Exception | None], running: int) -> AsyncGenerator[Output, None]:
    while running:
        match await arrivals.get():
            case Output() as output:
                yield output
            case None:
                running -= 1
            case Exception() as error:
                raise error


@asynccontextmanager
async def _outputs_of_one(
    generation: Generation, work: Work, position: int, trace_headers: Mapping[str, str], admitted: Admitted
) -> AsyncGenerator[AsyncIterator[Output], None]:
    live = await generation.submit(work.calls[position].request, trace_headers)
    admitted(position, live.prompt_tokens)
    outputs = live.outputs()
    try:
        yield outputs
    finally:
        live.cancel()
        if isinstance(outputs, AsyncGenerator):
            await outputs.aclose()
