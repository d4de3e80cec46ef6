"""One incarnation of one worker as this frontend sees it: its record, its connection, whether it can be routed to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health_pb2 as grpc_health_pb2
from grpc_health.v1 import health_pb2_grpc as grpc_health_pb2_grpc

from kvbaton.errors import RequestError
from kvbaton.v1 import (
    bootstrap_pb2,
    bootstrap_pb2_grpc,
    embed_pb2,
    embed_pb2_grpc,
    health_pb2,
    health_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    worker_pb2,
)
from services.config.frontend import FrontendConfig
from services.frontend.link.load import RankLoad, WorkerLoad
from services.frontend.link.protocol import WorkerLink
from services.frontend.link.session import SessionLink
from services.frontend.link.streams import StreamLink, unreachable
from services.frontend.router.breaker import Breaker, BreakerState
from services.frontend.router.kv.index import Holder, cache_owner
from services.frontend.text.tokenizer import TokenizerError
from services.frontend.text_models import TextModel, TextModels
from services.requests import Limits, Role
from services.transport import make_channel

log = structlog.get_logger()

_CALL_TIMEOUT = 5.0
_RETRY_SECONDS = 0.25
# Of the probe behind an open breaker, for each dp rank.
_PROBE_TIMEOUT = 10.0

_BREAKER_TO_PROTO = {
    BreakerState.CLOSED: health_pb2.BREAKER_STATE_CLOSED,
    BreakerState.OPEN: health_pb2.BREAKER_STATE_OPEN,
    BreakerState.HALF_OPEN: health_pb2.BREAKER_STATE_HALF_OPEN,
}


@dataclass(frozen=True, eq=False)
class WorkerRank:
    """One data-parallel rank of a worker; see `Candidate`."""

    worker: Worker
    instance_id: str
    dp_rank: int
    page_size: int
    cache: Holder | None
    load: RankLoad


class Worker:
    """Routable while it says SERVING with its record's incarnation, it is connected, and the record isn't withdrawn.

    What it says of itself decides, not the record, which can't follow while etcd is away. Both a broken connection and
    bad health make it unroutable at once: the channel's state and grpc.health are watched, not the next request's
    failure.
    """

    def __init__(
        self,
        record: worker_pb2.WorkerRecord,
        *,
        config: FrontendConfig,
        texts: TextModels,
        changed: Callable[[], None],
        credits_came: Callable[[Worker], None],
    ) -> None:
        self.record = record
        self.role = Role.from_proto(record.role)
        self.limits = Limits.from_runtime(record.runtime).capped(config.limits.max_prompt_tokens)
        self.registered = True
        self.load = WorkerLoad(record.runtime.dp_size)
        self.ranks = tuple(self._rank(index, load) for index, load in enumerate(self.load.ranks))
        self._live_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.model_info: model_pb2.ModelInfo | None = None
        self.text: TextModel | None = None
        self._reason = "not asked yet"
        self._answers = False
        self._unexpected = ""
        self._texts = texts
        self._tell = changed
        self._was_answering = False
        self._credits_came = credits_came
        self._channel = make_channel(record.grpc_endpoint, tls=config.tls.client())
        self.link = self._make_link(config)
        self.breaker = Breaker(
            config.breaker, worker=record.instance_id, role=self.role, probe=self._probe, changed=self._changed
        )
        self.ejected = False
        """Whether its breaker keeps requests from it; see `ejection`."""
        self._watching = asyncio.create_task(self._watch(), name=f"worker {record.instance_id}")

    @property
    def instance_id(self) -> str:
        """Name in the registry."""
        return self.record.instance_id

    @property
    def channel(self) -> grpc.aio.Channel:
        """The connection, for services that this class has no use for; closed by `close`."""
        return self._channel

    @property
    def routable(self) -> bool:
        """Whether a new request may go here."""
        return self.answering and not self.ejected

    @property
    def answering(self) -> bool:
        """Whether it is connected, says that it serves, and stays."""
        return self._answers and self.link.healthy and self.record.state != worker_pb2.WORKER_STATE_DRAINING

    @property
    def reason(self) -> str:
        """Why it is not routable; empty when it is."""
        if self.record.state == worker_pb2.WORKER_STATE_DRAINING:
            return "draining"
        if self._answers and not self.link.healthy:
            return "no session, or silent"
        if self.answering and self.ejected:
            return f"ejected by its breaker: {self.breaker.last_fault}"
        return "" if self.routable else self._reason

    @property
    def live_requests(self) -> int:
        """Requests of this frontend that run here."""
        return self._live_requests

    def request_began(self) -> None:
        """One more request runs here."""
        self._live_requests += 1
        self._idle.clear()

    def request_ended(self) -> None:
        """The worker has let go of it."""
        self._live_requests -= 1
        if not self._live_requests:
            self._idle.set()

    async def idle(self) -> None:
        """Waits until no request of this frontend runs here."""
        await self._idle.wait()

    def update(self, record: worker_pb2.WorkerRecord) -> None:
        """The same incarnation has written its record again."""
        self.record = record
        self.registered = True
        self._changed()

    def describe(self) -> health_pb2.KnownWorker:
        """For `Status` of the frontend."""
        return health_pb2.KnownWorker(
            record=self.record,
            routable=self.routable,
            reason=self.reason,
            registered=self.registered,
            live_requests=self.live_requests,
            breaker=_BREAKER_TO_PROTO[self.breaker.state],
            ranks=[rank.load.describe(rank.dp_rank) for rank in self.ranks],
        )

    def want_no_credits(self) -> None:
        """No request waits for it: what it has granted, or still grants, goes back."""
        self.link.ask(0)
        while (credit := self.link.take()) is not None:
            self.link.give_back(credit)

    async def check_peer(self, prefill: worker_pb2.WorkerRecord) -> None:
        """Asks this decode worker whether it can receive KV caches from that prefill worker. Raises RequestError."""
        request = bootstrap_pb2.CheckPeerRequest(instance_id=prefill.instance_id, incarnation=prefill.incarnation)
        try:
            await bootstrap_pb2_grpc.BootstrapServiceStub(self._channel).CheckPeer(request, timeout=_CALL_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            raise RequestError.from_rpc_error(error) from error

    async def embed(self, request: embed_pb2.EmbedRequest, *, timeout: float) -> embed_pb2.EmbedResponse:
        """One call to this embedding worker. Raises RequestError."""
        try:
            return await embed_pb2_grpc.EmbedServiceStub(self._channel).Embed(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            typed = unreachable(RequestError.from_rpc_error(error))
            raise typed.with_context(leg=self.role, worker=self.instance_id) from error

    async def close(self) -> None:
        """Ends its legs with WORKER_UNREACHABLE and the connection."""
        self._watching.cancel()
        await asyncio.gather(self._watching, self.breaker.close(), return_exceptions=True)
        await self.link.close()

    async def _probe(self) -> None:
        """A token, or an embedding, of every dp rank. Raises RequestError."""
        stub = health_pb2_grpc.HealthServiceStub(self._channel)
        for rank in self.ranks:
            try:
                await stub.Probe(health_pb2.ProbeRequest(dp_rank=rank.dp_rank), timeout=_PROBE_TIMEOUT)
            except grpc.aio.AioRpcError as error:
                raise RequestError.from_rpc_error(error) from error

    def _rank(self, index: int, load: RankLoad) -> WorkerRank:
        page_size = max(1, self.record.runtime.page_size)
        cache = None if self.role is Role.DECODE else Holder(cache_owner(self.role, self.instance_id), index)
        return WorkerRank(self, self.instance_id, index, page_size, cache, load)

    def _make_link(self, config: FrontendConfig) -> WorkerLink:
        if config.link == "session":
            return SessionLink(
                self._channel,
                self.record.incarnation,
                worker=self.instance_id,
                leg=self.role,
                heartbeat=config.heartbeat,
                changed=self._changed,
                credits_came=lambda: self._credits_came(self),
                load=self.load,
            )
        return StreamLink(self._channel, worker=self.instance_id, leg=self.role, total_timeout=config.total_timeout)

    async def _watch(self) -> None:
        """Asks until it serves, then waits until it doesn't, for ever."""
        while True:
            problem = await self._ask()
            if problem is None:
                self._set_answers(True, "")
                self._set_answers(False, await self._until_unwell())
            else:
                self._set_answers(False, problem)
                await asyncio.sleep(_RETRY_SECONDS)

    async def _ask(self) -> str | None:
        """None when it serves and its tokenizer is here, else why not."""
        try:
            health = health_pb2_grpc.HealthServiceStub(self._channel)
            status = await health.Status(health_pb2.StatusRequest(), timeout=_CALL_TIMEOUT)
            if status.incarnation != self.record.incarnation:
                return "another incarnation answers at its address"
            if status.state != worker_pb2.WORKER_STATE_SERVING:
                return f"says {worker_pb2.WorkerState.Name(status.state)} {status.detail}".strip()
            models = model_pb2_grpc.ModelServiceStub(self._channel)
            reply = await models.GetModelInfo(model_pb2.GetModelInfoRequest(), timeout=_CALL_TIMEOUT)
            self.text = await self._texts.get(reply.info, models)
            self.model_info = reply.info
        except grpc.aio.AioRpcError as error:
            return f"does not answer: {error.code().name} {error.details()}"
        except (TokenizerError, OSError) as error:
            return f"its tokenizer can't be used: {error}"
        except Exception as error:  # not one worker's answer, whatever it is, may end the watch
            problem = f"can't be used: {type(error).__name__}: {error}"
            if problem != self._unexpected:
                self._unexpected = problem
                log.exception("unexpected answer of a worker", worker=self.instance_id)
            return problem
        return None

    async def _until_unwell(self) -> str:
        """Waits until the connection breaks or the worker says that it doesn't serve; returns which."""
        disconnected = asyncio.create_task(self._until_disconnected())
        not_serving = asyncio.create_task(self._until_not_serving())
        try:
            await asyncio.wait({disconnected, not_serving}, return_when=asyncio.FIRST_COMPLETED)
            return "says that it does not serve" if not_serving.done() and not_serving.result() else "connection lost"
        finally:
            for task in (disconnected, not_serving):
                task.cancel()
            await asyncio.gather(disconnected, not_serving, return_exceptions=True)

    async def _until_not_serving(self) -> bool:
        """True when its grpc.health says so; False when the stream breaks, which says nothing of its health."""
        stub: Any = grpc_health_pb2_grpc.HealthStub(self._channel)
        try:
            async for update in stub.Watch(grpc_health_pb2.HealthCheckRequest()):
                if update.status != grpc_health_pb2.HealthCheckResponse.SERVING:
                    return True
        except grpc.aio.AioRpcError as error:
            log.debug("health stream ended", worker=self.instance_id, error=error.code().name)
        return False

    async def _until_disconnected(self) -> None:
        while (state := self._channel.get_state()) is grpc.ChannelConnectivity.READY:
            await self._channel.wait_for_state_change(state)

    def _set_answers(self, answers: bool, reason: str) -> None:
        if (answers, reason) != (self._answers, self._reason):
            self._answers, self._reason = answers, reason
            self._changed()

    def _changed(self) -> None:
        if self.answering != self._was_answering:
            self._was_answering = self.answering
            event = "worker routable" if self.answering else "worker unroutable"
            log.info(event, worker=self.instance_id, reason=self.reason)
        self._tell()
