"""A subscriber of KvEventService as a router would be one: it applies what it is sent and knows what is cached."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc

from kvbaton.v1 import kv_events_pb2, kv_events_pb2_grpc


@dataclass(frozen=True)
class Page:
    """One page of one rank."""

    parent: int | None
    tokens: tuple[int, ...]


class KvView:
    """Follows one worker; use it as an async context manager. Asserts what every subscriber may rely on."""

    def __init__(self, endpoint: str, after: KvView | None = None) -> None:
        """`after` is an earlier view of the same worker to go on from."""
        self._channel = grpc.aio.insecure_channel(endpoint)
        self.request = kv_events_pb2.SubscribeRequest()
        self.ranks: dict[int, dict[int, Page]] = {}
        self.sequence = 0
        self.opened: kv_events_pb2.KvOpened | None = None
        self.snapshot_chunks = 0
        self.changes = 0
        self._incomplete: set[int] = set()
        self.following: asyncio.Task[None] | None = None
        if after is not None:
            assert after.opened is not None
            self.ranks = {rank: dict(pages) for rank, pages in after.ranks.items()}
            self.sequence = after.sequence
            self.request.after_sequence = after.sequence
            self.request.incarnation.CopyFrom(after.opened.incarnation)

    async def __aenter__(self) -> Self:
        self.following = asyncio.create_task(self._follow())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.following is not None
        self.following.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await self.following
        await self._channel.close()

    @property
    def exact(self) -> bool:
        """The snapshot, if there is one, has come whole."""
        return self.opened is not None and not self._incomplete

    def cached_tokens(self, prompt: Sequence[int], rank: int = 0) -> int:
        """How long a prefix of the prompt stands in the rank's pages, found by tokens alone."""
        by_content = {(page.parent, page.tokens): block for block, page in self.ranks.get(rank, {}).items()}
        if self.opened is None:
            return 0
        size, parent, length = self.opened.page_size, None, 0
        while (block := by_content.get((parent, tuple(prompt[length : length + size])))) is not None:
            parent, length = block, length + size
        return length

    async def _follow(self) -> None:
        stub = kv_events_pb2_grpc.KvEventServiceStub(self._channel)
        async for message in stub.Subscribe(self.request):
            self._apply(message)

    def _apply(self, message: kv_events_pb2.SubscribeResponse) -> None:
        kind = message.WhichOneof("content")
        if kind == "opened":
            assert self.opened is None
            self.opened = message.opened
            if not message.opened.resumed:
                self.ranks = {rank: {} for rank in range(message.opened.dp_size)}
                self._incomplete = set(self.ranks)
                self.sequence = message.sequence
            assert message.sequence == self.sequence
            return
        pages = self.ranks[message.dp_rank]
        if kind == "snapshot":
            assert message.sequence == self.sequence
            self.snapshot_chunks += 1
            for stored in message.snapshot.stored:
                self._store(pages, stored)
            if message.snapshot.last:
                self._incomplete.remove(message.dp_rank)
            return
        assert self.exact, "no change before the snapshot is whole"
        assert message.sequence == self.sequence + 1, "no gap and no repeat"
        self.sequence = message.sequence
        self.changes += 1
        if kind == "stored":
            self._store(pages, message.stored)
        elif kind == "removed":
            for block in message.removed.block_hashes:
                del pages[block]
        else:
            pages.clear()

    def _store(self, pages: dict[int, Page], stored: kv_events_pb2.KvStored) -> None:
        parent = stored.parent_hash if stored.HasField("parent_hash") else None
        assert parent is None or parent in pages, "a page never comes before its parent"
        for index, block in enumerate(stored.block_hashes):
            start = index * stored.page_size
            pages[block] = Page(parent, tuple(stored.token_ids[start : start + stored.page_size]))
            parent = block
