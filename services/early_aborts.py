"""Aborts that overtook their requests: remembered for a while, so that none is lost on the way."""

from __future__ import annotations

import time

# The proto comment of GenerateService.Abort states it.
REMEMBERED_SECONDS = 10.0
# An abort for an id that never comes costs a few hundred bytes; beyond this many the oldest is forgotten.
MOST_REMEMBERED = 10_000


class EarlyAborts:
    """Ids of requests that were aborted before they arrived."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}

    def remember(self, request_id: str) -> None:
        """An abort came for a request that is not here."""
        self._forget_old()
        self._at.pop(request_id, None)
        self._at[request_id] = time.monotonic()
        if len(self._at) > MOST_REMEMBERED:
            del self._at[next(iter(self._at))]

    def claim(self, request_id: str) -> bool:
        """Whether this request, which has just arrived, was aborted; true once."""
        self._forget_old()
        return self._at.pop(request_id, None) is not None

    def _forget_old(self) -> None:
        oldest = time.monotonic() - REMEMBERED_SECONDS
        while self._at:
            request_id, at = next(iter(self._at.items()))
            if at > oldest:
                return
            del self._at[request_id]
