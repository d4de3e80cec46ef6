"""The mirrors of all dp ranks, their changes with numbers, and the subscribers.

A subscription begins in one turn of the event loop with the state at one number; from then on the subscriber gets
every change. One that reads too slowly is cut off and not waited for: it must not hold up the others, nor eat the
host's memory.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

import structlog

from services.telemetry import metrics
from services.worker.engines.kv_events import AllBlocksCleared, KvChange
from services.worker.kv_events.mirror import Block, MirrorChange, RankMirror

log = structlog.get_logger()

# For those who come back after a moment; later ones get a snapshot. A change of a page or a few is up to a kilobyte.
KEPT_CHANGES = 2048
QUEUED_CHANGES = 4096


@dataclass(frozen=True, slots=True)
class NumberedChange:
    """A change; `sequence` counts all ranks' changes from 1."""

    sequence: int
    dp_rank: int
    change: MirrorChange


class SubscriptionEndedError(Exception):
    """No more changes come: the subscriber was too slow, or the worker ends."""

    def __init__(self, why: Literal["slow", "closed"]) -> None:
        super().__init__(why)
        self.why = why


@dataclass(eq=False)
class Subscription:
    """What one subscriber gets. `blocks` are every rank's pages at `sequence`, None when it resumes there."""

    sequence: int
    blocks: list[list[Block]] | None
    _queue: deque[NumberedChange]
    _longest: int
    _ended: Literal["", "slow", "closed"] = ""
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, change: NumberedChange) -> bool:
        """False once it is full: from then on nothing more is put."""
        if len(self._queue) >= self._longest:
            self.end("slow")
            return False
        self._queue.append(change)
        self._wake.set()
        return True

    def end(self, why: Literal["slow", "closed"]) -> None:
        """The reader hears it next, before what is still queued."""
        self._ended = why
        self._wake.set()

    async def changes(self) -> AsyncIterator[NumberedChange]:
        """Every change after `sequence`, in order. Raises SubscriptionEndedError; never returns."""
        while True:
            await self._wait()
            while self._queue or self._ended:
                yield self._take()

    async def batches(self, gather: float, longest: int) -> AsyncIterator[list[NumberedChange]]:
        """The same, gathered for `gather` seconds after the first of them; at most `longest` at once."""
        while True:
            await self._wait()
            if not self._ended:
                await asyncio.sleep(gather)
            while self._queue or self._ended:
                yield [self._take() for _ in range(max(1, min(longest, len(self._queue))))]

    async def _wait(self) -> None:
        await self._wake.wait()
        self._wake.clear()

    def _take(self) -> NumberedChange:
        if self._ended:
            raise SubscriptionEndedError(self._ended)
        return self._queue.popleft()


class KvEventHub:
    """One per worker; belongs to the serving loop."""

    def __init__(self, role: str, *, kept: int = KEPT_CHANGES, queued: int = QUEUED_CHANGES) -> None:
        """`kept` changes can be resumed from; a subscriber may be `queued` changes behind."""
        self.sequence = 0
        self._role = role
        self._mirrors: list[RankMirror] = []
        self._kept: deque[NumberedChange] = deque(maxlen=kept)
        self._queued = queued
        self._subscriptions: set[Subscription] = set()

    def open(self, dp_size: int, page_size: int) -> None:
        """The engine has so many ranks, and tokens per page. Before the first change and the first subscriber."""
        self._mirrors = [RankMirror(page_size) for _ in range(dp_size)]

    def apply(self, change: KvChange) -> None:
        """Takes a change in and tells everyone. Raises ValueError for one that makes no sense."""
        if not 0 <= change.dp_rank < len(self._mirrors):
            raise ValueError(f"dp rank {change.dp_rank} of {len(self._mirrors)}")
        told = self._mirrors[change.dp_rank].apply(change.event)
        if told is None:
            return
        self.sequence += 1
        numbered = NumberedChange(self.sequence, change.dp_rank, told)
        self._kept.append(numbered)
        for subscription in list(self._subscriptions):
            if not subscription.put(numbered):
                log.warning("slow kv subscriber cut off", sequence=self.sequence)
                self.leave(subscription)
        metrics.KV_CHANGES.labels(self._role, type(told.event).__name__).inc()
        metrics.KV_MIRRORED_PAGES.labels(self._role, change.dp_rank).set(len(self._mirrors[change.dp_rank]))

    def clear(self) -> None:
        """Nothing is known any more of any rank."""
        for rank in range(len(self._mirrors)):
            self.apply(KvChange(rank, AllBlocksCleared()))

    def subscribe(self, after: int | None) -> Subscription:
        """From `after` on if every change since is still held, else from a snapshot. End it with `leave`."""
        missed = self._since(after) if after is not None else None
        if missed is None:
            blocks = [mirror.blocks() for mirror in self._mirrors]
            subscription = Subscription(self.sequence, blocks, deque(), self._queued)
        else:
            # What it missed is bounded by what is kept, and not its slowness.
            sequence = self.sequence - len(missed)
            subscription = Subscription(sequence, None, deque(), self._queued + len(missed))
            for change in missed:
                subscription.put(change)
        self._subscriptions.add(subscription)
        metrics.KV_SUBSCRIBERS.labels(self._role).set(len(self._subscriptions))
        return subscription

    def leave(self, subscription: Subscription) -> None:
        """It hears no more. Idempotent."""
        self._subscriptions.discard(subscription)
        metrics.KV_SUBSCRIBERS.labels(self._role).set(len(self._subscriptions))

    def close(self) -> None:
        """Ends every subscription."""
        for subscription in self._subscriptions:
            subscription.end("closed")

    def _since(self, after: int) -> list[NumberedChange] | None:
        oldest = self._kept[0].sequence if self._kept else self.sequence + 1
        if not oldest - 1 <= after <= self.sequence:
            return None
        return [self._kept[index] for index in range(after + 1 - oldest, len(self._kept))]
