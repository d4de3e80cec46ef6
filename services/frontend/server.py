"""One frontend: its parts, put together, from listening to drained."""

from __future__ import annotations

import asyncio
import contextlib
import os
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc.aio
import structlog

from kvbaton.v1 import (
    embed_pb2,
    embed_pb2_grpc,
    generate_pb2,
    generate_pb2_grpc,
    health_pb2,
    health_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    text_pb2,
    text_pb2_grpc,
)
from services.config.frontend import FrontendConfig
from services.config.limits import LimitFlags
from services.frontend.access.guarded import GuardedEmbedding, GuardedGeneration
from services.frontend.access.reload import KeyFile
from services.frontend.access.usage import SharedUsages, own_usage
from services.frontend.dispatch.pair_checks import PairChecks
from services.frontend.dispatch.queue import DispatchQueue
from services.frontend.edge.app import create_app
from services.frontend.edge.options import EdgeOptions
from services.frontend.embedding.service import Embedding, EmbeddingService
from services.frontend.processes.place import Place
from services.frontend.processes.siblings import Siblings
from services.frontend.request.api import Generation
from services.frontend.router.embedding import EmbeddingRouter
from services.frontend.router.kv.indexes import KvIndexes
from services.frontend.router.placement import Router
from services.frontend.router.policies.make import make_policies
from services.frontend.router.worker_set import WorkerSet
from services.frontend.service import GenerationService
from services.frontend.servicers.embed import EmbedServicer
from services.frontend.servicers.gate import RpcGate
from services.frontend.servicers.generate import GenerateServicer
from services.frontend.servicers.health import HealthServicer
from services.frontend.servicers.model import ModelServicer
from services.frontend.servicers.text import TextServicer
from services.frontend.text_models import TextModels
from services.grpc_health import SERVICE_NAME as GRPC_HEALTH_NAME
from services.grpc_health import GrpcHealth
from services.http_protocol import ConnectionLimits
from services.http_server import HttpServer, allow_open_files
from services.registry.etcd import EtcdClient
from services.registry.watcher import RegistryWatcher
from services.telemetry.metrics import watch_event_loop, watch_registry
from services.telemetry.shared import shared_page
from services.transport import bind, make_server

log = structlog.get_logger()

SERVICE_NAMES = (
    generate_pb2.DESCRIPTOR.services_by_name["GenerateService"].full_name,
    embed_pb2.DESCRIPTOR.services_by_name["EmbedService"].full_name,
    health_pb2.DESCRIPTOR.services_by_name["HealthService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    text_pb2.DESCRIPTOR.services_by_name["TextService"].full_name,
)

# Beside HTTP connections: gRPC clients, workers, etcd, logs.
_OTHER_FILES = 4096
# To gRPC.
_NO_LIMIT = 2**31 - 1


class Frontend:
    """Use it as an async context manager: it listens inside, and is gone after. `drain` before leaving.

    Entering raises PortTakenError, or ValueError for flags that don't go together.
    """

    def __init__(self, config: FrontendConfig, place: Place | None = None) -> None:
        """`place` is what it shares with the other processes of the same frontend, if there are any."""
        self._config = config
        self._place = place
        self._stack = contextlib.AsyncExitStack()
        self._health: _Health | None = None
        self._key_file: KeyFile | None = None
        self.grpc_port = 0
        self.http_port = 0

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await self._listen(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def drain(self) -> None:
        """Takes no new request and waits for the live ones, up to --drain-timeout."""
        log.info("draining", live_requests=self.generation.live_requests, live_embeddings=self.embedding.live_requests)
        timeout = self._config.drain_timeout
        async with asyncio.TaskGroup() as drains:
            drains.create_task(self.generation.drain(timeout))
            drains.create_task(self.embedding.drain(timeout))
            await asyncio.sleep(0)
            self._health_changed()

    def shut_down(self) -> None:
        """Ends every live request now, each with a typed error."""
        self.generation.shut_down()
        self.embedding.shut_down()

    def reload_keys(self) -> None:
        """Reads the file of --api-keys again, soon."""
        if self._key_file is not None:
            self._key_file.reload()

    async def _listen(self, stack: contextlib.AsyncExitStack) -> None:
        config = self._config
        watch_event_loop(asyncio.get_running_loop())
        texts = TextModels(cache_folder())
        stack.callback(texts.close)
        etcd = await stack.enter_async_context(EtcdClient(config.etcd.endpoints, config.etcd.tls()))
        self._registry = await stack.enter_async_context(RegistryWatcher(etcd, config.etcd.namespace))
        watch_registry(self._registry.last_synced_age)
        self.workers = await stack.enter_async_context(WorkerSet(config, self._registry, texts))
        router = Router(self.workers)
        pairs = PairChecks(enabled=config.check_pairs)
        stack.push_async_callback(pairs.close)
        self.kv = await self._kv_indexes(stack)
        queue = DispatchQueue(
            router,
            pairs,
            make_policies(config.routing, self.kv),
            limit=config.max_queued_requests,
            ready_timeout=config.ready_queue_timeout,
        )
        self.workers.on_change(queue.workers_changed)
        self.workers.on_credits(queue.credits_came)
        self.generation = GenerationService(config, router, queue)
        self.workers.on_change(self.generation.workers_changed)
        self.embedding = EmbeddingService(config, EmbeddingRouter(self.workers, max_calls=config.max_embedding_calls))
        self.workers.on_change(self.embedding.workers_changed)
        self._health = health = _Health(self.generation)
        self.workers.on_change(self._health_changed)
        generation, embedding, interceptors, gate = self.generation, self.embedding, [], None
        if config.access.api_keys is not None:
            place = self._place
            usage = own_usage if place is None else SharedUsages(place.folder, place.number, place.count)
            self._key_file = await stack.enter_async_context(KeyFile(config.access.api_keys, usage=usage))
            gate = self._key_file.gate
            generation = GuardedGeneration(self.generation)
            embedding = GuardedEmbedding(self.embedding, self.generation)
            interceptors = [RpcGate(gate)]
        siblings = None
        if self._place is not None:
            siblings = Siblings(self._place, generation, self._live_requests, interceptors)
            await stack.enter_async_context(siblings)
        server = make_server(
            lambda server: self._register(server, generation, embedding, health.grpc_health, siblings),
            interceptors=interceptors,
            options=_grpc_options(config, reuse_port=self._place is not None),
        )
        tls = config.tls.server()
        self.grpc_port = bind(server, config.host, config.port, tls=tls)
        app = create_app(
            generation,
            embedding,
            options=_edge_options(config.limits),
            gate=gate,
            metrics_page=None if self._place is None else partial(shared_page, self._place.folder),
        )
        limits = _connection_limits(config)
        allow_open_files(limits.max_connections + _OTHER_FILES)
        http = await stack.enter_async_context(
            HttpServer(
                app,
                host=config.host,
                port=config.http_port,
                flag="--http-port",
                tls=tls,
                limits=limits,
                reuse_port=self._place is not None,
            )
        )
        self.http_port = http.port
        await stack.enter_async_context(health)
        await server.start()
        stack.push_async_callback(server.stop, 1.0)

    def _register(
        self,
        server: grpc.aio.Server,
        generation: Generation,
        embedding: Embedding,
        health: GrpcHealth,
        siblings: Siblings | None,
    ) -> tuple[str, ...]:
        """`generation` and `embedding` as clients see them; health is about the service as it is."""
        health.register(server)
        generate_pb2_grpc.add_GenerateServiceServicer_to_server(GenerateServicer(generation, siblings), server)
        embed_pb2_grpc.add_EmbedServiceServicer_to_server(EmbedServicer(embedding), server)
        health_pb2_grpc.add_HealthServiceServicer_to_server(
            HealthServicer(self.generation, self.embedding, self.workers, self._registry, siblings), server
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(generation), server)
        text_pb2_grpc.add_TextServiceServicer_to_server(TextServicer(generation), server)
        return (*SERVICE_NAMES, GRPC_HEALTH_NAME)

    def _live_requests(self) -> int:
        return self.generation.live_requests + self.embedding.live_requests

    async def _kv_indexes(self, stack: contextlib.AsyncExitStack) -> KvIndexes | None:
        """Who holds which prefix, if any policy asks."""
        flags = self._config.routing
        if not flags.kv_aware:
            return None
        kv = KvIndexes(self.workers.all, max_pages=flags.kv_aware_max_pages, events=flags.kv_aware_events)
        await stack.enter_async_context(kv)
        self.workers.on_change(kv.workers_changed)
        return kv

    def _health_changed(self) -> None:
        if self._health is not None:
            self._health.changed()


class _Health:
    """Keeps grpc.health equal to what requests would find; use it as an async context manager."""

    def __init__(self, generation: GenerationService) -> None:
        self._generation = generation
        self.grpc_health = GrpcHealth(SERVICE_NAMES)
        self._dirty = asyncio.Event()
        self._dirty.set()
        self._task: asyncio.Task[None] | None = None

    def changed(self) -> None:
        """Something that health depends on may have changed."""
        self._dirty.set()

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._publish(), name="grpc-health")

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _publish(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            serving = bool(self._generation.models()) and not self._generation.draining
            await self.grpc_health.set_serving(serving)


def _edge_options(limits: LimitFlags) -> EdgeOptions:
    return EdgeOptions(
        max_body_bytes=limits.max_body_bytes,
        max_bodies_bytes=limits.max_bodies_bytes,
        body_timeout_seconds=limits.body_timeout,
        write_timeout_seconds=limits.write_timeout,
    )


def _connection_limits(config: FrontendConfig) -> ConnectionLimits:
    limits = config.limits
    return ConnectionLimits(
        max_connections=limits.max_connections,
        max_header_bytes=limits.max_header_bytes,
        header_timeout=limits.header_timeout,
        write_timeout=limits.write_timeout,
        keep_alive_timeout=limits.keep_alive_timeout,
        max_age=config.connection_age,
    )


def _grpc_options(config: FrontendConfig, *, reuse_port: bool) -> list[tuple[str, Any]]:
    options = [
        ("grpc.max_receive_message_length", config.limits.max_body_bytes),
        ("grpc.server_handshake_timeout_ms", int(config.limits.header_timeout * 1000)),
    ]
    if reuse_port:
        options.append(("grpc.so_reuseport", 1))
    if age := config.connection_age:
        # gRPC adds or takes a tenth by chance. The grace without end lets every stream finish, which has deadlines of
        # its own.
        options += [
            ("grpc.max_connection_age_ms", max(1, int(min(age * 1000, _NO_LIMIT)))),
            ("grpc.max_connection_age_grace_ms", _NO_LIMIT),
        ]
    return options


def cache_folder() -> Path:
    """Where tokenizers are kept between runs: $XDG_CACHE_HOME/kvbaton/tokenizers."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "kvbaton" / "tokenizers"
