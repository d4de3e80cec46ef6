"""A frontend's service that plays a script, and what the tests say about it."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import grpc

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import embed_pb2, generate_pb2, model_pb2, worker_pb2
from services.frontend.request.api import Finished, FinishReason, Output
from services.telemetry.tracing import NO_HEADERS

MODEL = "org/tiny"


class Hang:
    """A step of a script that ends only when the request is cancelled."""


Step = Output | Exception | Hang


def said(text: str, *tokens: int) -> Output:
    return Output(token_ids=list(tokens or [1]), text=text)


def ended(text: str = "", *, reason: FinishReason = FinishReason.STOP) -> Output:
    finished = Finished(reason=reason, prompt_tokens=7, completion_tokens=3, cached_prompt_tokens=4)
    return Output(token_ids=[2], text=text, finished=finished)


HELLO: tuple[Step, ...] = (said("Hel"), said("lo"), ended())


def failure(code: grpc.StatusCode, reason: Reason = Reason.INTERNAL, **details: object) -> RequestError:
    return RequestError(code, reason, str(details.pop("message", "it broke")), **details)  # type: ignore[arg-type]


class ScriptedRequest:
    def __init__(self, request_id: str, steps: Sequence[Step]) -> None:
        self.request_id = request_id
        self.finished = False
        self.cancelled = asyncio.Event()
        self._steps = steps

    async def outputs(self) -> AsyncIterator[Output]:
        try:
            for step in self._steps:
                if isinstance(step, Hang):
                    await self.cancelled.wait()
                    raise failure(grpc.StatusCode.CANCELLED, Reason.CANCELLED)
                # As from a network: another task may run between two outputs.
                await asyncio.sleep(0)
                if isinstance(step, Exception):
                    raise step
                yield step
            self.finished = True
        finally:
            self.cancel()

    def when_cut_off(self, act: Callable[[], None]) -> None:
        """Nothing that is scripted is cut off."""

    def cancel(self) -> None:
        if not self.finished:
            self.cancelled.set()


class ScriptedGeneration:
    """Every request gets the same script. `submit_hangs` keeps submit() from returning."""

    def __init__(
        self,
        *steps: Step,
        refusal: RequestError | None = None,
        models: Sequence[str] = (MODEL,),
        submit_hangs: bool = False,
    ) -> None:
        self.steps = steps or HELLO
        self.refusal = refusal
        self.model_names = list(models)
        self.draining = False
        self.requests: list[generate_pb2.GenerateRequest] = []
        self.trace_headers: list[dict[str, str]] = []
        self.live: list[ScriptedRequest] = []
        self.submitted = asyncio.Event()
        self.submit_cancelled = asyncio.Event()
        self._submit_hangs = submit_hangs

    async def submit(
        self, request: generate_pb2.GenerateRequest, trace_headers: Mapping[str, str] = NO_HEADERS
    ) -> ScriptedRequest:
        self.requests.append(request)
        self.trace_headers.append(dict(trace_headers))
        self.submitted.set()
        if self._submit_hangs:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.submit_cancelled.set()
                raise
        if self.refusal is not None:
            raise self.refusal
        self.live.append(ScriptedRequest(request.request_id, self.steps))
        return self.live[-1]

    def abort(self, request_id: str) -> bool:
        return False

    def models(self) -> list[model_pb2.ModelInfo]:
        return [
            model_pb2.ModelInfo(
                model=worker_pb2.ModelIdentity(name=name), runtime=worker_pb2.RuntimeConfig(context_length=2048)
            )
            for name in self.model_names
        ]


class ScriptedEmbedding:
    """Every input gets the vector [0.5, its position]; `refusal` is raised instead, `hangs` keeps embed() from
    returning."""

    def __init__(self, *, refusal: RequestError | None = None, hangs: bool = False) -> None:
        self.refusal = refusal
        self.hangs = hangs
        self.requests: list[embed_pb2.EmbedRequest] = []
        self.asked = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def embed(self, request: embed_pb2.EmbedRequest) -> embed_pb2.EmbedResponse:
        self.requests.append(request)
        self.asked.set()
        if self.hangs:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        if self.refusal is not None:
            raise self.refusal
        return embed_pb2.EmbedResponse(
            embeddings=[
                embed_pb2.Embedding(float32=struct.pack("<ff", 0.5, index)) for index in range(len(request.inputs))
            ],
            usage=embed_pb2.EmbedUsage(prompt_tokens=7),
        )
