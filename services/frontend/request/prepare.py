"""From what a client sent to what engines take: every check that needs no engine, the chat template, the tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import grpc

from kvbaton.errors import Reason, RequestError, invalid
from kvbaton.v1 import generate_pb2, text_pb2
from services.frontend.request.chat import Chat, read_chat
from services.frontend.request.chat_answer import ChatAnswer, Thinking, plan_answer
from services.frontend.request.choices import sampling_of
from services.frontend.request.reply import ReplyFormat
from services.frontend.router.worker import Worker
from services.frontend.text import ChatTemplateError, InvalidMessagesError, InvalidTextError, TokenizerError
from services.frontend.text_models import TextModel
from services.requests import (
    GrammarKind,
    Limits,
    Sampling,
    check_logprobs,
    check_min_new,
    check_prompt,
    check_sampling,
    check_stops,
    sent_tokens,
)

_GRAMMAR_FIELDS = frozenset(f"sampling.{kind.value}" for kind in GrammarKind)


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that any pair of its model can run. `text` is what its tokens become, None without a tokenizer.

    `logprobs` is how many of the likeliest tokens come with each token, None without log probabilities.
    """

    request_id: str
    model: str
    token_ids: list[int]
    sampling: Sampling
    text: ReplyFormat | None
    logprobs: int | None = None
    grammar_field: str = ""
    """The client's field that a chat's grammar is from; a worker knows it by the field that it came in."""
    ends: frozenset[int] = frozenset()
    """Tokens that end the answer once it has `min_new_tokens`."""
    inexact_migration: bool = False
    """Whether the answer may go on elsewhere where it would be another one."""

    def as_sent(self, error: RequestError) -> RequestError:
        """The error of a worker, by the names of what the client has sent."""
        if not self.grammar_field or error.field not in _GRAMMAR_FIELDS:
            return error
        message = error.message.replace(error.field, self.grammar_field, 1)
        return replace(error, field=self.grammar_field, message=message)


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What the engine begins with, and the field that it comes from; of a chat also how its answer is read and held."""

    token_ids: Sequence[int]
    field: str
    answer: ChatAnswer | None = None
    thinking: Thinking = Thinking.CLOSED


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
    prompt = await _prompt(request, worker, limits)
    grammar_field = ""
    token_ids = check_prompt(prompt.token_ids, limits, field=prompt.field)
    sampling = check_sampling(request.sampling, prompt_tokens=len(token_ids), limits=limits)
    if stops and worker.text is None:
        raise _no_tokenizer("sampling.stop", worker)
    if prompt.answer is not None:
        grammar, grammar_field = prompt.answer.grammar(sampling.grammar, prompt.thinking)
        sampling = replace(sampling, grammar=grammar)
        check_min_new(sampling.min_new_tokens, grammar)  # the grammar may be the tools'
    return PreparedRequest(
        request_id=request_id,
        model=worker.record.model.name,
        token_ids=token_ids,
        sampling=sampling,
        text=_reply_format(request, worker.text, prompt, stops),
        logprobs=logprobs,
        grammar_field=grammar_field,
        ends=_ends(sampling, worker),
        inexact_migration=request.allow_inexact_migration,
    )


async def prepare_choices(
    request: generate_pb2.GenerateRequest, request_id: str, worker: Worker, limits: Limits, choices: int
) -> list[PreparedRequest]:
    """`prepare` once for all choices: all but the seed is shared."""
    first = await prepare(request, request_id, worker, limits)
    return [replace(first, sampling=sampling_of(first.sampling, choice)) for choice in range(choices)]


async def tokenize(request: text_pb2.TokenizeRequest, worker: Worker, limits: Limits) -> text_pb2.TokenizeResponse:
    """The tokens that `prepare` would make of the same input. Raises RequestError naming the field."""
    field = request.WhichOneof("input")
    match field:
        case "text":
            if not request.text:
                raise invalid("text", "the prompt is empty")
            text_model, prompt = _require_text(worker, "text"), request.text
        case "chat":
            text_model = _require_text(worker, "chat")
            prompt = await _render(read_chat(request.chat), text_model)
        case _:
            raise invalid("input", "missing: one of text or chat")
    add_special_tokens = request.add_special_tokens if request.HasField("add_special_tokens") else field == "text"
    ids = await _encode(text_model, prompt, field, limits, add_special_tokens=add_special_tokens)
    token_ids = check_prompt(ids, limits, field=field)
    tokens = await text_model.tokenizer.spell(token_ids)
    return text_pb2.TokenizeResponse(token_ids=token_ids, tokens=tokens, context_length=limits.context_length)


async def detokenize(
    request: text_pb2.DetokenizeRequest, worker: Worker, limits: Limits
) -> text_pb2.DetokenizeResponse:
    """The text that an answer of these tokens has. Raises RequestError naming the field."""
    text_model = _require_text(worker, "token_ids")
    count, most = len(request.token_ids), limits.context_length
    if count > most:
        raise invalid("token_ids", f"{count} tokens, more than the context length of {most}")
    if count and max(request.token_ids) >= limits.vocab_size:
        raise invalid("token_ids", f"{max(request.token_ids)} is outside the vocabulary of {limits.vocab_size}")
    skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
    text = await text_model.tokenizer.decode_in_thread(request.token_ids, skip_special_tokens=skip)
    return text_pb2.DetokenizeResponse(text=text)


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


async def _prompt(request: generate_pb2.GenerateRequest, worker: Worker, limits: Limits) -> _Prompt:
    match request.WhichOneof("input"):
        case "token_ids":
            return _Prompt(sent_tokens(request.token_ids), "token_ids")
        case "text":
            if not request.text:
                raise invalid("text", "the prompt is empty")
            text_model = _require_text(worker, "text")
            return _Prompt(await _encode(text_model, request.text, "text", limits, add_special_tokens=True), "text")
        case "chat":
            text_model = _require_text(worker, "chat")
            chat = read_chat(request.chat)
            has_grammar = request.sampling.WhichOneof("grammar") is not None
            answer = plan_answer(chat, worker.record.runtime, limits, has_grammar=has_grammar)
            text = await _render(chat, text_model)
            ids = await _encode(text_model, text, "chat", limits, add_special_tokens=False)
            return _Prompt(ids, "chat", answer, answer.thinking(text))
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


async def _render(chat: Chat, text_model: TextModel) -> str:
    if isinstance(text_model.chat, ChatTemplateError):
        raise _unusable_template(text_model.chat)
    tools = chat.tools.for_template()
    if tools is not None and not text_model.chat.takes_tools:
        raise invalid("chat.tools", "the model's chat template does nothing with tools: the model would not know them")
    try:
        return await asyncio.to_thread(
            text_model.chat.render,
            chat.messages,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            tools=tools,
            template_arguments=chat.template_arguments,
        )
    except InvalidMessagesError as error:
        raise invalid("chat.messages", str(error)) from error
    except ChatTemplateError as error:
        raise _unusable_template(error) from error


def _unusable_template(error: ChatTemplateError) -> RequestError:
    return RequestError(grpc.StatusCode.FAILED_PRECONDITION, Reason.NO_TOKENIZER, f"chat: {error}", field="chat")


def _ends(sampling: Sampling, worker: Worker) -> frozenset[int]:
    if sampling.ignore_eos:
        return frozenset()
    of_model = () if worker.model_info is None else worker.model_info.eos_token_ids
    return frozenset((*of_model, *sampling.stop_token_ids))


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


def _reply_format(
    request: generate_pb2.GenerateRequest, text_model: TextModel | None, prompt: _Prompt, stops: tuple[str, ...]
) -> ReplyFormat | None:
    if text_model is None:
        return None
    params, answer = request.sampling, prompt.answer
    return ReplyFormat(
        text_model.tokenizer,
        skip_special_tokens=params.skip_special_tokens if params.HasField("skip_special_tokens") else True,
        # Behind a text prompt the answer continues its last character and word; a new turn starts afresh.
        prompt=() if answer is not None and not answer.chat.continue_final_message else prompt.token_ids,
        stops=stops,
        parser=None if answer is None else answer.parser_factory(prompt.thinking),
        markers=() if answer is None else answer.markers,
        single=answer is not None and answer.single,
    )
