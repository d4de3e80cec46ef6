"""Whom does the end of a request reach, when some of its choices have not begun?"""

from __future__ import annotations

import asyncio
from typing import Any

from kvbaton.errors import RequestError, cancelled
from services.frontend.request.fan_out import FanOut


class Owner:
    """One choice that never ends by itself."""

    prefill_worker = "p"

    def __init__(self) -> None:
        self.started = False
        self.ends: list[RequestError] = []

    def start(self) -> asyncio.Task[None]:
        self.started = True
        return asyncio.create_task(asyncio.sleep(0))

    def release(self, *, prefers: str) -> None:
        assert prefers == self.prefill_worker

    def end(self, error: RequestError) -> None:
        self.ends.append(error)


async def test_a_choice_whose_turn_comes_behind_the_end_was_told_of_it() -> None:
    outbox: Any = None
    fan_out = FanOut("r", outbox, prompt_tokens=1, choice_gone=lambda: None, ended=lambda _: None)
    owners: Any = [Owner(), Owner()]
    fan_out.start(owners, first_alone=True)
    error = cancelled()
    fan_out.end(error)
    # The first one had its prompt computed, and perhaps its answer, before it heard of the end.
    fan_out.choice_prefilled()
    assert owners[1].started
    assert [owner.ends for owner in owners] == [[error], [error]]
