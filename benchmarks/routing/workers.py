"""Aggregated workers around simulated engines, and a frontend's view of them; sessions and KV events without gRPC.

Both ends of a session, the KV events and the engine are what a deployment runs. Between them a message takes a
millisecond, and no bytes are made of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast

from kvbaton.v1 import kv_events_pb2, session_pb2, worker_pb2
from services.config.worker import WorkerConfig
from services.decode.contract import AggregatedContract
from services.frontend.link.load import WorkerLoad
from services.frontend.link.session import SessionLink
from services.frontend.router.kv.index import Holder, cache_owner
from services.frontend.router.worker import WorkerRank
from services.grpc_health import GrpcHealth
from services.requests import Limits, Role
from services.worker import registration
from services.worker.core import Loaded, WorkerCore
from services.worker.engines.protocol import ProbePayload
from services.worker.engines.simulated import SimulatedEngine, SimulatedOptions
from services.worker.kv_events.feed import feed
from services.worker.kv_events.hub import KvEventHub
from services.worker.leg_runner import LegRunner
from services.worker.lifecycle import Lifecycle
from services.worker.servicers.kv_events import KvEventServicer
from services.worker.servicers.session import SessionServicer

MODEL = worker_pb2.ModelIdentity(name="simulated", path="simulated", revision="1")
OPTIONS = SimulatedOptions(
    # A prefix that is not in the cache costs 0.4 s.
    prefill_token=2e-4,
    decode_step=0.005,
    # Eight prefixes of 2,000 tokens, and room for what runs. What a request has beside its prefix stays in the cache
    # until its room is needed.
    max_total_tokens=24_000,
)
HEARTBEAT = 0.5
T = TypeVar("T")
_MESSAGE_SECONDS = 0.001


class LocalWorker:
    """Use it as an async context manager: inside, `channel` reaches its services."""

    def __init__(self, name: str, options: SimulatedOptions = OPTIONS) -> None:
        role = Role.AGGREGATED
        self.name = name
        self.engine = SimulatedEngine(role, options)
        self.core = WorkerCore(role, name, registration.new_incarnation(), Lifecycle(role, GrpcHealth(())))
        self.hub = KvEventHub(role)
        self._feeding: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self.engine.start()
        await self.engine.attach()
        info = self.engine.info()
        self.hub.open(info.dp_size, info.page_size)
        self._feeding = asyncio.create_task(feed(self.engine, self.hub), name=f"kv events of {self.name}")
        record = registration.build_record(
            WorkerConfig(role=self.core.role, instance_id=self.name, model_path=MODEL.path),
            instance_id=self.name,
            incarnation=self.core.incarnation,
            advertise_host="127.0.0.1",
            bootstrap_host="",
            grpc_port=1,
            system_port=1,
            model=MODEL,
            info=info,
            has_tokenizer=False,
        )
        limits, model_info = Limits.from_runtime(record.runtime), registration.build_model_info(record, info, ())
        loaded = Loaded(self.engine, info, limits, record, model_info, (), ProbePayload())
        self.core.attach(loaded, window=info.max_running_requests * info.dp_size)
        self.core.accepting = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hub.close()
        if self._feeding is not None:
            self._feeding.cancel()
            await asyncio.gather(self._feeding, return_exceptions=True)
        self.engine.shutdown()

    def channel(self) -> LocalChannel:
        """A connection of one frontend."""
        runner = LegRunner(self.core, AggregatedContract())
        return LocalChannel(SessionServicer(self.core, runner), KvEventServicer(self.core, self.hub))


class NoBreaker:
    """Of workers that don't fail."""

    closed = True

    def failed(self, *_: object, **__: object) -> None:
        """Opens nothing."""

    def succeeded(self) -> None:
        """Needs no word."""

    handed_over = succeeded


class KnownWorker:
    """What a frontend needs of a `router.worker.Worker`."""

    def __init__(self, worker: LocalWorker, credits_came: Callable[[KnownWorker], None]) -> None:
        self.instance_id = worker.name
        self.role = worker.core.role
        self.record = worker.core.require_loaded().record
        self.limits = worker.core.require_loaded().limits
        self.text = None
        self.model_info = None
        self.breaker = NoBreaker()
        self.channel = cast("Any", worker.channel())
        self.load = WorkerLoad(self.record.runtime.dp_size)
        page_size, owner = self.record.runtime.page_size, cache_owner(self.role, self.instance_id)
        self.ranks = tuple(
            WorkerRank(cast("Any", self), self.instance_id, rank, page_size, Holder(owner, rank), load)
            for rank, load in enumerate(self.load.ranks)
        )
        self.link = SessionLink(
            self.channel,
            self.record.incarnation,
            worker=self.instance_id,
            leg=self.role,
            heartbeat=HEARTBEAT,
            changed=lambda: None,
            credits_came=lambda: credits_came(self),
            load=self.load,
        )

    def request_began(self) -> None:
        """Nobody asks."""

    def request_ended(self) -> None:
        """Nobody asks."""

    def want_no_credits(self) -> None:
        """See `router.worker.Worker`."""
        self.link.ask(0)
        while (credit := self.link.take()) is not None:
            self.link.give_back(credit)


class LocalChannel:
    """A `grpc.aio.Channel` to servicers in this process, as far as generated stubs need one."""

    def __init__(self, sessions: SessionServicer, events: KvEventServicer) -> None:
        self._sessions, self._events = sessions, events

    def stream_stream(self, path: str, **_: object) -> Callable[..., LocalCall[session_pb2.ConnectResponse]]:
        """WorkerSessionService.Connect is the only one."""
        return lambda commands: LocalCall(cast("Any", self._sessions.Connect(commands, cast("Any", None))))

    def unary_stream(self, path: str, **_: object) -> Callable[..., LocalCall[kv_events_pb2.SubscribeResponse]]:
        """KvEventService.Subscribe, and GenerateService.Generate, which sessions have no use for."""
        return lambda request: LocalCall(cast("Any", self._events.Subscribe(request, cast("Any", None))))

    def unary_unary(self, path: str, **_: object) -> None:
        """None is called."""

    async def close(self) -> None:
        """Nothing is open."""


class LocalCall(Generic[T]):
    """One call: the servicer's messages, each a moment later."""

    def __init__(self, messages: AsyncGenerator[T]) -> None:
        self._arrived: asyncio.Queue[T | BaseException] = asyncio.Queue()
        self._reading = asyncio.create_task(self._read(messages), name="local call")

    def cancel(self) -> None:
        """As a client that hangs up."""
        self._reading.cancel()

    async def __aiter__(self) -> AsyncIterator[T]:
        while True:
            message = await self._arrived.get()
            if isinstance(message, BaseException):
                raise message
            yield message

    async def _read(self, messages: AsyncGenerator[T]) -> None:
        try:
            async with contextlib.aclosing(messages):
                async for message in messages:
                    await asyncio.sleep(_MESSAGE_SECONDS)
                    self._arrived.put_nowait(message)
            self._arrived.put_nowait(ConnectionResetError("the servicer ended the stream"))
        except Exception as error:  # noqa: BLE001 - the reader raises it
            self._arrived.put_nowait(error)
