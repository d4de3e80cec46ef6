"""KvEventService of a worker: what its engine's prefix caches hold, and every change of that."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from kvbaton.errors import Reason, RequestError, invalid
from kvbaton.v1 import kv_events_pb2, kv_events_pb2_grpc
from services.prefixes import hashed_page_size
from services.worker.core import WorkerCore
from services.worker.kv_events.hub import KvEventHub, Subscription, SubscriptionEndedError
from services.worker.kv_events.wire import GATHERED_CHANGES, change_message, changes_message, snapshot_messages

_LONGEST_GATHER = 1.0


class KvEventServicer(kv_events_pb2_grpc.KvEventServiceServicer):
    """UNAVAILABLE until the engine is there."""

    def __init__(self, core: WorkerCore, hub: KvEventHub) -> None:
        self._core = core
        self._hub = hub

    async def Subscribe(  # type: ignore[override]
        self, request: kv_events_pb2.SubscribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[kv_events_pb2.SubscribeResponse]:
        """Serves one subscriber until it leaves, or can't keep up."""
        self._require_events()
        hashes_only, gather = request.hashes_only, _gather(request)
        subscription = self._hub.subscribe(self._after(request))
        try:
            yield self._opened(subscription)
            if subscription.blocks is not None:
                blocks, subscription.blocks = subscription.blocks, []
                for message in snapshot_messages(subscription.sequence, blocks, hashes_only=hashes_only):
                    yield message
            if gather is None:
                async for change in subscription.changes():
                    yield change_message(change, hashes_only=hashes_only)
            else:
                async for changes in subscription.batches(gather, GATHERED_CHANGES):
                    yield changes_message(changes, hashes_only=hashes_only)
        except SubscriptionEndedError as ended:
            raise self._ended(ended) from ended
        finally:
            self._hub.leave(subscription)

    def _require_events(self) -> None:
        core = self._core
        info = core.require_loaded().info
        if not info.has_kv_events:
            raise RequestError(
                grpc.StatusCode.FAILED_PRECONDITION,
                Reason.NO_KV_EVENTS,
                f"{core.role} worker {core.instance_id} tells no KV events: a decode engine keeps no prefixes, others"
                " tell nothing with --no-kv-events or without a radix cache",
                leg=core.role,
                worker=core.instance_id,
            )

    def _after(self, request: kv_events_pb2.SubscribeRequest) -> int | None:
        same_life = request.incarnation == self._core.incarnation
        return request.after_sequence if request.HasField("after_sequence") and same_life else None

    def _opened(self, subscription: Subscription) -> kv_events_pb2.SubscribeResponse:
        info = self._core.require_loaded().info
        return kv_events_pb2.SubscribeResponse(
            sequence=subscription.sequence,
            opened=kv_events_pb2.KvOpened(
                incarnation=self._core.incarnation,
                resumed=subscription.blocks is None,
                dp_size=info.dp_size,
                page_size=info.page_size,
                hashed_page_size=hashed_page_size(info.page_size),
            ),
        )

    def _ended(self, ended: SubscriptionEndedError) -> RequestError:
        core = self._core
        if ended.why == "closed":
            return core.unavailable(Reason.SHUTTING_DOWN)
        return RequestError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            Reason.SLOW_SUBSCRIBER,
            "the subscriber reads more slowly than the cache changes; subscribe again, with after_sequence",
            leg=core.role,
            worker=core.instance_id,
            retry_after=0.0,
        )


def _gather(request: kv_events_pb2.SubscribeRequest) -> float | None:
    """Seconds; None when every change is to come by itself. Raises RequestError."""
    if not request.HasField("gather"):
        return None
    seconds = request.gather.ToNanoseconds() / 1e9
    if not 0 <= seconds <= _LONGEST_GATHER:
        raise invalid("gather", f"{seconds:g} s is not from 0 to {_LONGEST_GATHER:g} s")
    return seconds
