"""From what a client sent to what engines take: every check that needs no engine, the chat template, the tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from kvbaton.errors import Reason, RequestError, invalid
from kvbaton.v1 import generate_pb2
from services.frontend.router.worker import Worker
from services.frontend.text import (
    ChatMessage,
    ChatTemplateError,
    IncrementalDetokenizer,
    InvalidMessagesError,
    InvalidTextError,
    StopStringMatcher,
    TextOutput,
    TokenizerError,
)
from services.frontend.text_models import TextModel
from services.requests import Limits, Sampling, check_logprobs, check_prompt, check_sampling, check_stops


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that any pair of its model can run. `text` turns its tokens into text, None without a tokenizer.

    `logprobs` is how many of the likeliest tokens come with each token, None without log probabilities.
    """

    request_id: str
    model: str
    token_ids: list[int]
    sampling: Sampling
    text: TextOutput | None
    logprobs: int | None = None


async def prepare(
    request: generate_pb2.GenerateRequest, request_id: str, worker: Worker, limits: Limits
) -> PreparedRequest:
    """Checks and tokenizes. `worker` is any worker of the request's model, `limits` what all of them take.

    Raises RequestError naming the field.
    """
    _refuse_worker_fields(request)
    stops = check_stops(request.sampling.stop)
    logprobs = check_logprobs(request)
    # Cheap checks first, with a prompt of one token: bad sampling costs no tokenization.
    check_sampling(_without_length(request.sampling), prompt_tokens=1, limits=limits)
    ids, field = await _token_ids(request, worker, limits)
    token_ids = check_prompt(ids, limits, field=field)
    sampling = check_sampling(request.sampling, prompt_tokens=len(token_ids), limits=limits)
    if stops and worker.text is None:
        raise _no_tokenizer("sampling.stop", worker)
    return PreparedRequest(
        request_id=request_id,
        model=worker.record.model.name,
        token_ids=token_ids,
        sampling=sampling,
        text=_text_output(request, worker.text, token_ids, stops),
        logprobs=logprobs,
    )


def _refuse_worker_fields(request: generate_pb2.GenerateRequest) -> None:
    if request.HasField("bootstrap"):
        raise invalid("bootstrap", "the frontend chooses the pair and the room; send this to a worker only")
    if request.HasField("dp_rank"):
        raise invalid("dp_rank", "the frontend chooses the rank; send this to a worker only")


def _without_length(params: generate_pb2.SamplingParams) -> generate_pb2.SamplingParams:
    cheap = generate_pb2.SamplingParams()
    cheap.CopyFrom(params)
    if cheap.max_new_tokens > 0:
        cheap.ClearField("max_new_tokens")
    if cheap.min_new_tokens > 0:
        cheap.ClearField("min_new_tokens")
    return cheap


async def _token_ids(
    request: generate_pb2.GenerateRequest, worker: Worker, limits: Limits
) -> tuple[Sequence[int], str]:
    """The prompt's tokens, and the field that they come from."""
    match request.WhichOneof("input"):
        case "token_ids":
            return request.token_ids.ids, "token_ids"
        case "text":
            if not request.text:
                raise invalid("text", "the prompt is empty")
            text_model = _require_text(worker, "text")
            return await _encode(text_model, request.text, "text", limits, add_special_tokens=True), "text"
        case "chat":
            text_model = _require_text(worker, "chat")
            prompt = await _render(request.chat, text_model)
            return await _encode(text_model, prompt, "chat", limits, add_special_tokens=False), "chat"
        case _:
            raise invalid("input", "missing: one of text, chat or token_ids")


async def _encode(
    text_model: TextModel, text: str, field: str, limits: Limits, *, add_special_tokens: bool
) -> list[int]:
    # Encoding takes a thread and memory in proportion to the text: refuse before it what could not fit after it.
    if len(text) > limits.max_prompt_tokens * text_model.tokenizer.longest_token:
        raise invalid(
            field,
            f"the prompt has {len(text)} characters, more than the {limits.max_prompt_tokens} tokens that the model"
            f" takes can hold (context length {limits.context_length})",
        )
    try:
        return await text_model.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except (InvalidTextError, TokenizerError) as error:
        raise invalid(field, str(error)) from error


async def _render(chat: generate_pb2.ChatInput, text_model: TextModel) -> str:
    if not chat.messages:
        raise invalid("chat.messages", "no message")
    for index, message in enumerate(chat.messages):
        if not message.role:
            raise invalid(f"chat.messages[{index}].role", "missing")
    if isinstance(text_model.chat, ChatTemplateError):
        raise RequestError(
            grpc.StatusCode.FAILED_PRECONDITION, Reason.NO_TOKENIZER, f"chat: {text_model.chat}", field="chat"
        )
    messages = [ChatMessage(m.role, m.content, m.name or None) for m in chat.messages]
    add_generation_prompt = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
    try:
        return await asyncio.to_thread(text_model.chat.render, messages, add_generation_prompt=add_generation_prompt)
    except InvalidMessagesError as error:
        raise invalid("chat.messages", str(error)) from error
    except ChatTemplateError as error:
        raise RequestError(
            grpc.StatusCode.FAILED_PRECONDITION, Reason.NO_TOKENIZER, f"chat: {error}", field="chat"
        ) from error


def _require_text(worker: Worker, field: str) -> TextModel:
    if worker.text is None:
        raise _no_tokenizer(field, worker)
    return worker.text


def _no_tokenizer(field: str, worker: Worker) -> RequestError:
    return RequestError(
        grpc.StatusCode.FAILED_PRECONDITION,
        Reason.NO_TOKENIZER,
        f"{field}: model {worker.record.model.name!r} has no tokenizer; send token_ids",
        field=field,
    )


def _text_output(
    request: generate_pb2.GenerateRequest, text_model: TextModel | None, prompt: list[int], stops: tuple[str, ...]
) -> TextOutput | None:
    if text_model is None:
        return None
    params = request.sampling
    skip = params.skip_special_tokens if params.HasField("skip_special_tokens") else True
    # Behind a text prompt the answer continues its last character and word; a chat answer starts afresh.
    behind = () if request.WhichOneof("input") == "chat" else prompt
    detokenizer = IncrementalDetokenizer(text_model.tokenizer, skip_special_tokens=skip, prompt_ids=behind)
    return TextOutput(detokenizer, StopStringMatcher(stops) if stops else None)
