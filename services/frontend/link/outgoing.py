"""What waits to be sent in one session: all of it goes in the next message.

A message costs grpc.aio up to 0.2 ms, and the next one goes only when it has been written: requests that come together
are sent together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from kvbaton.v1 import session_pb2
from services.frontend.link.credits import SessionCredits

# A message takes no more legs once it is as large as this, so that they don't wait for each other's long prompts.
_FULL_BYTES = 1 << 20


class Outgoing:
    """Belongs to one stream: gRPC may read an ended stream's messages on, and must not take the next one's.

    Aborts go before submits; a leg that is aborted before it was sent is never sent.
    """

    def __init__(self, opening: session_pb2.OpenSession, credits: SessionCredits) -> None:
        self._opening = opening
        self._credits = credits
        self._aborts: list[int] = []
        # By the leg's number, oldest first.
        self._unsent: dict[int, session_pb2.SubmitLeg] = {}
        self._wake = asyncio.Event()
        self._closed = False

    def submit(self, submit: session_pb2.SubmitLeg) -> None:
        """After everything else that waits."""
        self._unsent[submit.leg] = submit
        self._wake.set()

    def abort(self, leg: int) -> bool:
        """True when the leg was not sent yet, and never will be."""
        if self._unsent.pop(leg, None) is not None:
            return True
        self._aborts.append(leg)
        self._wake.set()
        return False

    def credits_changed(self) -> None:
        """There may be something to say of them."""
        if self._credits.has_news:
            self._wake.set()

    def close(self) -> None:
        """Nothing more is sent."""
        self._closed = True
        self._aborts.clear()
        self._unsent.clear()
        self._wake.set()

    async def messages(self) -> AsyncIterator[session_pb2.ConnectRequest]:
        """For the stream; ends when closed."""
        if not self._closed:
            yield session_pb2.ConnectRequest(open=self._opening)
        while not self._closed:
            if (message := self._next()) is not None:
                yield message
            else:
                self._wake.clear()
                await self._wake.wait()

    def _next(self) -> session_pb2.ConnectRequest | None:
        """Takes what waits, or the most urgent of it."""
        aborts, self._aborts = self._aborts, []
        submits: list[session_pb2.SubmitLeg] = []
        size = 0
        while self._unsent and size < _FULL_BYTES:
            submit = self._unsent.pop(next(iter(self._unsent)))
            submits.append(submit)
            size += submit.ByteSize()
        asked = self._credits.news()
        if not (aborts or submits or asked):
            return None
        return session_pb2.ConnectRequest(aborts=aborts, submits=submits, credits=asked)
