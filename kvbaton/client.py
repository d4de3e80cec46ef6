"""Async client of Baton's gRPC services: typed, small, a deadline on every call.

    async with Client("localhost:50051") as client:
        async for chunk in client.stream(text="The capital of France is", sampling=SamplingParams(max_new_tokens=16)):
            print(chunk.text, end="", flush=True)

Works against a frontend and, with token ids and a bootstrap, against a single worker. Errors are
`kvbaton.errors.RequestError`.
"""

from __future__ import annotations

import sys
import uuid
from array import array
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
import grpc.aio

from kvbaton.errors import RequestError, invalid
from kvbaton.generating import GenerateOptions, Messages, Tools, chat_options, generate_request, prompt
from kvbaton.token_ids import pack
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
from kvbaton.v1.generate_pb2 import (
    Bootstrap,
    ChatMessage,
    GenerateResponse,
    SamplingParams,
    Tool,
    ToolCall,
    ToolChoice,
)

__all__ = [
    "Answer",
    "AnsweredCall",
    "Bootstrap",
    "ChatMessage",
    "Choice",
    "Client",
    "Embeddings",
    "GenerateOptions",
    "SamplingParams",
    "Tool",
    "ToolCall",
    "ToolChoice",
]

T = TypeVar("T")

_OPTIONS = (
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # A server that was restarted is found again at once.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # gRPC would share one connection among all clients of an address: they would all meet one process of its frontend.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass
class AnsweredCall:
    """A function that the model calls."""

    id: str = ""
    name: str = ""
    arguments: str = ""
    """As the model wrote them: most likely a JSON object."""


class Choice:
    """One of the answers to a request: all of its tokens and what they say, and how it ended."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.reasoning = ""
        self.tool_calls: list[AnsweredCall] = []
        self.logprobs: list[generate_pb2.TokenLogprob] = []
        self.finished = generate_pb2.Finished()

    def add(self, chunk: GenerateResponse) -> None:
        """One more message of this choice."""
        self.token_ids.extend(chunk.token_ids)
        self.text += chunk.text
        self.reasoning += chunk.reasoning
        self.logprobs.extend(chunk.logprobs)
        for delta in chunk.tool_calls:
            if delta.index == len(self.tool_calls):
                self.tool_calls.append(AnsweredCall(delta.id, delta.name))
            self.tool_calls[delta.index].arguments += delta.arguments
        if chunk.HasField("finished"):
            self.finished = chunk.finished


class Answer(Choice):
    """A whole answer: the first choice, and those beside it where `n` asks for more."""

    def __init__(self) -> None:
        super().__init__()
        self._others: list[Choice] = []

    @property
    def choices(self) -> list[Choice]:
        """All of them, the answer itself first."""
        return [self, *self._others]

    def add(self, chunk: GenerateResponse) -> None:
        """One more message of the stream."""
        if not chunk.index:
            super().add(chunk)
            return
        while len(self._others) < chunk.index:
            self._others.append(Choice())
        self._others[chunk.index - 1].add(chunk)


class Embeddings:
    """The vectors of one request, in the order of its inputs."""

    def __init__(self, response: embed_pb2.EmbedResponse) -> None:
        self.response = response
        """Usage, timings, the worker, and what was truncated."""
        self.vectors: list[list[float]] = [_numbers(each.float32) for each in response.embeddings]


class Client:
    """One connection; use it as an async context manager.

    `timeout` is the deadline in seconds of a whole generation, `call_timeout` that of every other call. With `ca`,
    `cert` and `key` (PEM files) the connection is TLS or mTLS. `api_key` goes with every call.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float = 600.0,
        call_timeout: float = 10.0,
        ca: Path | None = None,
        cert: Path | None = None,
        key: Path | None = None,
        api_key: str = "",
    ) -> None:
        if ca is None and cert is None:
            self._channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
        else:
            files = [path.read_bytes() if path is not None else None for path in (ca, key, cert)]
            self._channel = grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(*files), options=_OPTIONS)
        self._timeout = timeout
        self._metadata = bearer(api_key)
        self._call: dict[str, Any] = {"timeout": call_timeout, "metadata": self._metadata}
        self._generate = generate_pb2_grpc.GenerateServiceStub(self._channel)
        self._embed = embed_pb2_grpc.EmbedServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthServiceStub(self._channel)
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)
        self._text = text_pb2_grpc.TextServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def stream(
        self,
        *,
        timeout: float | None = None,
        trace_headers: Mapping[str, str] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncIterator[GenerateResponse]:
        """The answer as it comes; the last message of each choice has `finished`. For `options` see `GenerateOptions`.

        `trace_headers` are the caller's W3C trace context: `traceparent`, `tracestate`. Leaving the iterator early
        cancels the request. Raises RequestError.
        """
        request = generate_request(options)
        metadata = (*self._metadata, *(trace_headers or {}).items())
        call = self._generate.Generate(request, timeout=timeout or self._timeout, metadata=metadata)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise RequestError.from_rpc_error(error) from error
        finally:
            call.cancel()

    async def generate(
        self,
        *,
        timeout: float | None = None,
        trace_headers: Mapping[str, str] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Answer:
        """The whole answer. Arguments and errors as for `stream`."""
        answer = Answer()
        async for chunk in self.stream(timeout=timeout, trace_headers=trace_headers, **options):
            answer.add(chunk)
        return answer

    async def embed(
        self,
        inputs: Iterable[str | Iterable[int]],
        *,
        model: str = "",
        dimensions: int | None = None,
        truncate: bool | None = None,
        request_id: str = "",
        timeout: float | None = None,
    ) -> Embeddings:
        """A vector for each input, a text or token ids; a worker takes token ids only. See EmbedRequest for the rest.

        Cancelling it cancels the request. Raises RequestError.
        """
        if isinstance(inputs, str):
            raise invalid("inputs", "a list of texts, not one")
        request = embed_pb2.EmbedRequest(
            request_id=request_id or uuid.uuid4().hex,
            model=model,
            inputs=[_embed_input(each) for each in inputs],
            truncate=truncate,
            dimensions=dimensions,
        )
        return Embeddings(
            await _typed(self._embed.Embed(request, timeout=timeout or self._timeout, metadata=self._metadata))
        )

    async def tokenize(
        self,
        *,
        text: str | None = None,
        chat: Messages | None = None,
        tools: Tools = (),
        template_arguments: Mapping[str, Any] | None = None,
        model: str = "",
    ) -> text_pb2.TokenizeResponse:
        """The tokens that a frontend makes of a prompt, a text or a chat with its tools. Raises RequestError."""
        options = chat_options(tools=tools, template_arguments=template_arguments)
        given = prompt(text, chat, None, options)
        request = text_pb2.TokenizeRequest(model=model)
        if text is None:
            request.chat.CopyFrom(given.chat)
        else:
            request.text = text
        return await _typed(self._text.Tokenize(request, **self._call))

    async def detokenize(
        self,
        token_ids: Iterable[int],
        *,
        model: str = "",
        skip_special_tokens: bool | None = None,
    ) -> str:
        """The text that a frontend makes of tokens. Raises RequestError."""
        request = text_pb2.DetokenizeRequest(model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return (await _typed(self._text.Detokenize(request, **self._call))).text

    async def abort(self, request_id: str) -> bool:
        """Aborts a live request; False when there was none by that id."""
        request = generate_pb2.AbortRequest(request_id=request_id)
        return (await _typed(self._generate.Abort(request, **self._call))).found

    async def list_models(self) -> list[model_pb2.ModelInfo]:
        """Every model that the process serves."""
        reply = await _typed(self._models.ListModels(model_pb2.ListModelsRequest(), **self._call))
        return list(reply.models)

    async def model_info(self, model: str = "") -> model_pb2.ModelInfo:
        """One model; an empty name means the only one."""
        request = model_pb2.GetModelInfoRequest(model=model)
        return (await _typed(self._models.GetModelInfo(request, **self._call))).info

    async def status(self) -> health_pb2.StatusResponse:
        """State, load and, from a frontend, every worker that it knows."""
        return await _typed(self._health.Status(health_pb2.StatusRequest(), **self._call))

    async def probe(self, *, timeout: float = 60.0) -> float:
        """A real one-token generation; returns its seconds."""
        reply = await _typed(self._health.Probe(health_pb2.ProbeRequest(), timeout=timeout, metadata=self._metadata))
        return reply.elapsed.ToNanoseconds() / 1e9


def bearer(api_key: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a call with this API key; none without one."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def _embed_input(value: str | Iterable[int]) -> embed_pb2.EmbedInput:
    if isinstance(value, str):
        return embed_pb2.EmbedInput(text=value)
    return embed_pb2.EmbedInput(token_ids=pack(value))


def _numbers(float32: bytes) -> list[float]:
    numbers = array("f", float32)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


async def _typed(call: Awaitable[T]) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise RequestError.from_rpc_error(error) from error
