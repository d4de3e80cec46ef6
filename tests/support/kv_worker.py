"""Workers that are only a simulated engine and its KV events, with a line between them and who follows them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import grpc.aio

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import kv_events_pb2, kv_events_pb2_grpc, worker_pb2
from services.frontend.router.kv.index import Holder, cache_owner
from services.grpc_errors import TypedErrors
from services.requests import Role
from services.transport import make_channel
from services.worker.core import WorkerCore
from services.worker.engines.protocol import EngineInfo
from services.worker.engines.simulated import SimulatedEngine, SimulatedOptions
from services.worker.kv_events.feed import feed
from services.worker.kv_events.hub import KvEventHub
from services.worker.servicers.kv_events import KvEventServicer
from tests.support.simulated_engines import Leg, greedy, started


@dataclass
class Line:
    """What happens to the messages of one worker's KV events on their way; odds for each message."""

    rng: random.Random
    lost: float = 0.0
    doubled: float = 0.0
    broken: float = 0.0
    """The stream ends."""
    faults: int = 0

    async def carried(
        self, messages: AsyncIterator[kv_events_pb2.SubscribeResponse]
    ) -> AsyncIterator[kv_events_pb2.SubscribeResponse]:
        """Messages as they arrive. Raises RequestError where the line breaks."""
        async for message in messages:
            chance = self.rng.random()
            self.faults += chance < self.lost + self.doubled + self.broken
            if chance < self.lost:
                continue
            if chance < self.lost + self.broken:
                raise RequestError(grpc.StatusCode.UNAVAILABLE, Reason.WORKER_UNREACHABLE, "the line is broken")
            yield message
            if chance < self.lost + self.broken + self.doubled:
                yield message


class _LinedServicer(KvEventServicer):
    def __init__(self, core: WorkerCore, hub: KvEventHub, line: Line) -> None:
        super().__init__(core, hub)
        self._line = line

    async def Subscribe(  # type: ignore[override]
        self, request: kv_events_pb2.SubscribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[kv_events_pb2.SubscribeResponse]:
        async for message in self._line.carried(super().Subscribe(request, context)):
            yield message


@dataclass
class _Core:
    """As much of a WorkerCore as the servicer asks."""

    role: Role
    instance_id: str
    incarnation: worker_pb2.Incarnation
    info: EngineInfo

    def require_loaded(self) -> _Core:
        return self

    def unavailable(self, reason: Reason) -> RequestError:
        return RequestError(grpc.StatusCode.UNAVAILABLE, reason, "it ends")


@dataclass
class KvWorker:
    """One incarnation. What `router.kv` asks of a worker, and what a test needs to disturb it."""

    instance_id: str
    engine: SimulatedEngine
    hub: KvEventHub
    line: Line
    record: worker_pb2.WorkerRecord
    channel: grpc.aio.Channel
    role: Role = Role.AGGREGATED
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    @property
    def owner(self) -> str:
        """What the index knows it by."""
        return cache_owner(self.role, self.instance_id)

    @property
    def truth(self) -> dict[Holder, set[int]]:
        """What its caches hold, by the mirrors that the engine's events make."""
        held = {
            Holder(self.owner, rank): {block.prefix_hash for block in mirror.blocks() if block.prefix_hash}
            for rank, mirror in enumerate(self.hub._mirrors)
        }
        return {holder: pages for holder, pages in held.items() if pages}

    async def run(self, prompt: list[int], dp_rank: int = 0) -> None:
        """One request, through the engine's cache."""
        await Leg(self.engine, prompt, greedy(1), dp_rank=dp_rank).result()

    async def stop(self) -> None:
        """It ends as a worker does: its subscribers are told."""
        await self._stack.aclose()


async def start_kv_worker(
    name: str, options: SimulatedOptions, line: Line, *, hub: KvEventHub | None = None, port: int = 0
) -> KvWorker:
    """A new incarnation; `stop` it. With `hub`'s bounds, on `port`."""
    stack = contextlib.AsyncExitStack()
    engine = await stack.enter_async_context(started(Role.AGGREGATED, options))
    hub = hub or KvEventHub("aggregated")
    hub.open(options.dp_size, options.page_size)
    feeding = asyncio.create_task(feed(engine, hub))
    stack.callback(feeding.cancel)
    incarnation = worker_pb2.Incarnation(created_us=time.time_ns() // 1000, uuid=uuid.uuid4().hex)
    core = cast("WorkerCore", _Core(Role.AGGREGATED, name, incarnation, engine.info()))
    server = grpc.aio.server(interceptors=[TypedErrors()])
    kv_events_pb2_grpc.add_KvEventServiceServicer_to_server(_LinedServicer(core, hub, line), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    stack.push_async_callback(server.stop, 0.5)
    stack.callback(hub.close)
    record = worker_pb2.WorkerRecord(
        instance_id=name,
        incarnation=incarnation,
        grpc_endpoint=f"127.0.0.1:{port}",
        runtime=worker_pb2.RuntimeConfig(page_size=options.page_size, max_total_tokens=options.max_total_tokens),
    )
    channel = make_channel(record.grpc_endpoint)
    stack.push_async_callback(channel.close)
    return KvWorker(name, engine, hub, line, record, channel, _stack=stack)
