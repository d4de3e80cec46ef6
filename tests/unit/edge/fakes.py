"""A frontend's service that plays a script, and what the tests say about it."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import grpc

from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import embed_pb2, generate_pb2, model_pb2, text_pb2, worker_pb2
from services.frontend.request.api import Finished, FinishReason, Output, ToolCallDelta
from services.telemetry.tracing import NO_HEADERS

MODEL = "org/tiny"


class Hang:
    """A step of a script that ends only when the request is cancelled."""


Step = Output | Exception | Hang


def said(text: str, *tokens: int, index: int = 0) -> Output:
    return Output(token_ids=list(tokens or [1]), text=text, index=index)


def ended(text: str = "", *, reason: FinishReason = FinishReason.STOP, index: int = 0) -> Output:
    return Output(token_ids=[2], text=text, finished=end(reason), index=index)


def end(reason: FinishReason = FinishReason.STOP) -> Finished:
    return Finished(reason=reason, prompt_tokens=7, completion_tokens=3, cached_prompt_tokens=4)


HELLO: tuple[Step, ...] = (said("Hel"), said("lo"), ended())


def failure(code: grpc.StatusCode, reason: Reason = Reason.INTERNAL, **details: object) -> RequestError:
    return RequestError(code, reason, str(details.pop("message", "it broke")), **details)  # type: ignore[arg-type]


PROMPT_TOKENS = 7


class ScriptedRequest:
    prompt_tokens = PROMPT_TOKENS

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
    """Every request gets the same script, or that of `by_prompt` for its text. `submit_hangs` keeps submit() from
    returning. A token is one character of a text."""

    def __init__(
        self,
        *steps: Step,
        refusal: RequestError | None = None,
        models: Sequence[str] = (MODEL,),
        submit_hangs: bool = False,
        by_prompt: Mapping[str, Sequence[Step]] | None = None,
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
        self.text_requests: list[text_pb2.TokenizeRequest | text_pb2.DetokenizeRequest] = []
        self._submit_hangs = submit_hangs
        self._by_prompt = by_prompt or {}

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
        self.live.append(ScriptedRequest(request.request_id, self._by_prompt.get(request.text, self.steps)))
        return self.live[-1]

    async def tokenize(self, request: text_pb2.TokenizeRequest) -> text_pb2.TokenizeResponse:
        self.text_requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        text = request.text or "".join(message.content for message in request.chat.messages)
        return text_pb2.TokenizeResponse(token_ids=[ord(c) for c in text], tokens=list(text), context_length=2048)

    async def detokenize(self, request: text_pb2.DetokenizeRequest) -> text_pb2.DetokenizeResponse:
        self.text_requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        return text_pb2.DetokenizeResponse(text="".join(chr(token) for token in request.token_ids))

    def abort(self, request_id: str) -> bool:
        return False

    def abort_live(self, request_id: str) -> bool:
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


class Scripts:
    """Answers with everything that an answer can have."""

    REASONING: tuple[Step, ...] = (
        Output(token_ids=[1], reasoning="Hm"),
        Output(token_ids=[1], reasoning="m."),
        said("42"),
        ended(),
    )
    CALLS: tuple[Step, ...] = (
        said("Look: "),
        Output(token_ids=[1], tool_calls=[ToolCallDelta(0, "call_a", "f", '{"x"')]),
        Output(token_ids=[1], tool_calls=[ToolCallDelta(0, arguments=": 1}"), ToolCallDelta(1, "call_b", "g")]),
        Output(token_ids=[1], tool_calls=[ToolCallDelta(1, arguments="{}")]),
        ended(reason=FinishReason.TOOL_CALLS),
    )
    ONLY_CALLS: tuple[Step, ...] = (*CALLS[1:],)
    REASONED_CALLS: tuple[Step, ...] = (*REASONING[:2], *CALLS[1:])
    REASONING_CUT_OFF: tuple[Step, ...] = (REASONING[0], ended(reason=FinishReason.LENGTH))
    NOTHING: tuple[Step, ...] = (ended(),)
    ONLY_AN_END: tuple[Step, ...] = (ended("Hello"),)
    TWO_CHOICES: tuple[Step, ...] = (
        said("a"),
        said("x", index=1),
        said("b"),
        ended(),
        said("y", index=1),
        ended(index=1, reason=FinishReason.LENGTH),
    )
    ALL = (
        HELLO,
        REASONING,
        CALLS,
        ONLY_CALLS,
        REASONED_CALLS,
        REASONING_CUT_OFF,
        NOTHING,
        ONLY_AN_END,
    )
