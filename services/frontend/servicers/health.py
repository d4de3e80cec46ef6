"""HealthService of the frontend: every worker that it knows, and a request of one token through them."""

from __future__ import annotations

import time
from typing import Any

import grpc

from kvbaton.errors import invalid
from kvbaton.v1 import embed_pb2, generate_pb2, health_pb2, health_pb2_grpc, model_pb2, worker_pb2
from services.frontend.embedding.service import EmbeddingService
from services.frontend.processes.siblings import Siblings
from services.frontend.router.worker_set import WorkerSet
from services.frontend.service import GenerationService
from services.modes import GENERATE
from services.registry.watcher import RegistryWatcher
from services.telemetry import tracing
from services.version import own_version


class HealthServicer(health_pb2_grpc.HealthServiceServicer):
    """SERVING while at least one model can be generated or embedded with."""

    def __init__(
        self,
        generation: GenerationService,
        embedding: EmbeddingService,
        workers: WorkerSet,
        registry: RegistryWatcher,
        siblings: Siblings | None = None,
    ) -> None:
        self._generation = generation
        self._embedding = embedding
        self._workers = workers
        self._registry = registry
        self._siblings = siblings
        self._started_at = time.time()

    async def Status(
        self, request: health_pb2.StatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.StatusResponse:
        """State, load and topology. Of several processes only the load is that of all."""
        live_requests, detail = self._generation.live_requests + self._embedding.live_requests, ""
        if self._siblings is not None:
            live_requests = await self._siblings.live_requests(tuple(context.invocation_metadata() or ()))
            place = self._siblings.place
            detail = f"process {place.number} of {place.count}"
        response = health_pb2.StatusResponse(
            state=self._state(),
            detail=detail,
            versions=worker_pb2.Versions(kvbaton=own_version()),
            load=health_pb2.Load(live_requests=live_requests),
            workers=[worker.describe() for worker in self._workers.all()],
            registry=self._view(),
        )
        response.started_at.FromNanoseconds(int(self._started_at * 1e9))
        return response

    async def Probe(
        self, request: health_pb2.ProbeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.ProbeResponse:
        """One greedy token for a prompt of one token, on the next pair of the first model that generates.

        Where none does, an embedding of one token.
        """
        if request.HasField("dp_rank"):
            raise invalid("dp_rank", "a frontend probes a pair of workers; ask a worker for one of its ranks")
        started = time.monotonic()
        models = self._generation.models()
        generating = [info for info in models if GENERATE in info.rpcs]
        if models and not generating:
            await self._embed(models[0])
        else:
            await self._generate(generating)
        response = health_pb2.ProbeResponse()
        response.elapsed.FromNanoseconds(int((time.monotonic() - started) * 1e9))
        return response

    def _view(self) -> health_pb2.RegistryView:
        view = health_pb2.RegistryView()
        if (age := self._registry.last_synced_age()) is not None:
            view.age.FromNanoseconds(int(age * 1e9))
        if (trouble := self._registry.trouble()) is not None:
            view.problem = trouble.reason
            view.problem_for.FromNanoseconds(int(trouble.seconds * 1e9))
        return view

    async def _embed(self, info: model_pb2.ModelInfo) -> None:
        token_ids = generate_pb2.TokenIds(ids=[info.bos_token_id])
        request = embed_pb2.EmbedRequest(model=info.model.name, inputs=[embed_pb2.EmbedInput(token_ids=token_ids)])
        await self._embedding.embed(request)

    async def _generate(self, models: list[model_pb2.ModelInfo]) -> None:
        live = await self._generation.submit(
            generate_pb2.GenerateRequest(
                model=models[0].model.name if models else "",
                token_ids=generate_pb2.TokenIds(ids=[models[0].bos_token_id if models else 0]),
                sampling=generate_pb2.SamplingParams(max_new_tokens=1, temperature=0.0),
            ),
            tracing.headers_of(tracing.UNSAMPLED),
            anywhere=True,
        )
        async for _ in live.outputs():
            pass

    def _state(self) -> worker_pb2.WorkerState:
        if self._generation.draining:
            return worker_pb2.WORKER_STATE_DRAINING
        return worker_pb2.WORKER_STATE_SERVING if self._generation.models() else worker_pb2.WORKER_STATE_STARTING
