"""One incarnation of a worker: the messages of its KV events, checked and applied to the index in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from kvbaton.v1 import kv_events_pb2, worker_pb2
from services.frontend.router.kv.index import Holder, KvIndex
from services.telemetry import metrics

# Seconds that a worker may gather changes for: a message costs both sides more than the changes in it.
GATHER_SECONDS = 0.02

_Change = kv_events_pb2.KvChange | kv_events_pb2.SubscribeResponse


class DoubtError(Exception):
    """What came can't be what the worker holds, as far as it is known here."""


class NoHashesError(Exception):
    """The worker is of a version that tells no prefix hashes."""


class WorkerPages:
    """What is known of the worker, and up to which number."""

    def __init__(self, index: KvIndex, worker: str, incarnation: worker_pb2.Incarnation) -> None:
        self.exact = False
        """The stream stands, and everything up to `sequence` is in the index, as far as that has room."""
        self.sequence: int | None = None
        """The last number that was applied; None when nothing is known."""
        self.hashed_page_size = 0
        """Tokens per hash, once the worker has said it."""
        self._index = index
        self._worker = worker
        self._incarnation = incarnation
        self._holders: list[Holder] = []
        self._opened = False
        # Ranks whose snapshot hasn't ended.
        self._incomplete: set[int] = set()
        self._why: Literal["first", "missed", "doubt"] = "first"

    def next_request(self) -> kv_events_pb2.SubscribeRequest:
        """For a new stream, which goes on where the last one broke."""
        self.broken()
        request = kv_events_pb2.SubscribeRequest(hashes_only=True)
        request.gather.FromNanoseconds(int(GATHER_SECONDS * 1e9))
        if self.sequence is not None:
            request.after_sequence = self.sequence
            request.incarnation.CopyFrom(self._incarnation)
        return request

    def broken(self) -> None:
        """The stream has ended. What is known is kept, for a worker that comes back; half a snapshot is nothing."""
        self._opened = self.exact = False
        if self._incomplete:
            self.forget("missed")

    def forget(self, why: Literal["missed", "doubt"]) -> None:
        """Nothing is known: the next stream begins with a snapshot."""
        self._index.forget(self._worker)
        self._incomplete.clear()
        self.exact, self.sequence, self._why = False, None, why

    def take(self, message: kv_events_pb2.SubscribeResponse) -> None:
        """Applies one message. Raises DoubtError, after which there must be a new stream, and NoHashesError."""
        kind = message.WhichOneof("content")
        if not self._opened:
            if kind != "opened":
                raise DoubtError(f"{kind} before opened")
            self._open(message.sequence, message.opened)
        elif kind == "snapshot":
            self._take_snapshot(message)
        elif self._incomplete:
            raise DoubtError(f"{kind} before the snapshot was whole")
        elif kind == "changes":
            changes = message.changes.changes
            self._take_changes(message.sequence - len(changes), changes)
        else:
            self._take_changes(message.sequence - 1, [message])

    def _open(self, sequence: int, opened: kv_events_pb2.KvOpened) -> None:
        if opened.incarnation != self._incarnation:
            raise DoubtError("another incarnation answers")
        if not opened.hashed_page_size:
            raise NoHashesError
        if opened.resumed:
            if sequence != self.sequence:
                raise DoubtError(f"resumed at {sequence} instead of {self.sequence}")
            self._become_exact()
        else:
            if self.sequence is not None:
                self.forget("missed")
            metrics.KV_INDEX_SNAPSHOTS.labels(self._why).inc()
            self.sequence = sequence
            self._holders = [Holder(self._worker, rank) for rank in range(opened.dp_size)]
            self._incomplete = set(range(opened.dp_size))
        self.hashed_page_size = opened.hashed_page_size
        self._opened = True

    def _take_snapshot(self, message: kv_events_pb2.SubscribeResponse) -> None:
        rank = message.dp_rank
        if rank not in self._incomplete or message.sequence != self.sequence:
            raise DoubtError(f"a snapshot of rank {rank} at {message.sequence}")
        for stored in message.snapshot.stored:
            self._index.stored(self._holders[rank], stored.prefix_hashes)
        if message.snapshot.last:
            self._incomplete.remove(rank)
            if not self._incomplete:
                self._become_exact()

    def _take_changes(self, before: int, changes: Sequence[_Change]) -> None:
        if before != self.sequence:
            raise DoubtError(f"a change after {before} came where {self.sequence} was the last")
        for change in changes:
            if change.dp_rank >= len(self._holders):
                raise DoubtError(f"dp rank {change.dp_rank} of {len(self._holders)}")
            self._apply(self._holders[change.dp_rank], change)
        self.sequence = before + len(changes)

    def _apply(self, holder: Holder, change: _Change) -> None:
        index = self._index
        match change.WhichOneof("content"):
            case "stored":
                index.stored(holder, change.stored.prefix_hashes)
            case "removed":
                unknown = index.removed(holder, change.removed.prefix_hashes)
                if unknown and not index.evicted:
                    raise DoubtError(f"{unknown} pages were removed that were not there")
            case "cleared":
                index.cleared(holder)
            case kind:
                raise DoubtError(f"{kind} is no change")

    def _become_exact(self) -> None:
        self.exact = True
        for holder in self._holders:
            self._index.not_assumed(holder)
