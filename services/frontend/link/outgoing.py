"""What waits to be sent in one session, in its order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from kvbaton.v1 import session_pb2
from services.frontend.link.credits import SessionCredits


class Outgoing:
    """Belongs to one stream: gRPC may read an ended stream's commands on, and must not take the next one's.

    Aborts go before submits; a leg that is aborted before it was sent is never sent.
    """

    def __init__(self, opening: session_pb2.OpenSession, credits: SessionCredits) -> None:
        self._credits = credits
        self._urgent = deque([session_pb2.ConnectRequest(open=opening)])
        # By the leg's number, oldest first.
        self._unsent: dict[int, session_pb2.ConnectRequest] = {}
        self._wake = asyncio.Event()
        self._wake.set()
        self._closed = False

    def submit(self, submit: session_pb2.SubmitLeg) -> None:
        """After everything else that waits."""
        self._unsent[submit.leg] = session_pb2.ConnectRequest(submit=submit)
        self._wake.set()

    def abort(self, leg: int) -> bool:
        """True when the leg was not sent yet, and never will be."""
        if self._unsent.pop(leg, None) is not None:
            return True
        self._urgent.append(session_pb2.ConnectRequest(abort=session_pb2.AbortLeg(leg=leg)))
        self._wake.set()
        return False

    def credits_changed(self) -> None:
        """There may be something to say of them."""
        if self._credits.has_news:
            self._wake.set()

    def close(self) -> None:
        """Nothing more is sent."""
        self._closed = True
        self._urgent.clear()
        self._unsent.clear()
        self._wake.set()

    async def commands(self) -> AsyncIterator[session_pb2.ConnectRequest]:
        """For the stream; ends when closed."""
        while not self._closed:
            await self._wake.wait()
            self._wake.clear()
            while self._urgent or self._unsent:
                yield self._urgent.popleft() if self._urgent else self._unsent.pop(next(iter(self._unsent)))
            if not self._closed and (asked := self._credits.news()) is not None:
                yield session_pb2.ConnectRequest(credits=asked)
