"""How an OpenAI request becomes a kvbaton.v1 request, and how an error's proto field gets its OpenAI name back."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass

from kvbaton.errors import RequestError, invalid
from kvbaton.v1 import generate_pb2
from services.frontend.edge.schemas import ChatCompletionRequest, ChatMessage, CompletionRequest, GenerationBody
from services.requests import check_request_id

COMPLETION_DEFAULT_MAX_TOKENS = 16

_SAMPLING_NAMES = {"min_new_tokens": "min_tokens"}
_INPUT_FIELDS = ("text", "token_ids", "chat", "input")


@dataclass(frozen=True, slots=True)
class Call:
    """One request to the frontend, and what its fields are called on the route that it came from."""

    request: generate_pb2.GenerateRequest
    input_name: str
    max_tokens_name: str

    def in_openai_terms(self, error: RequestError) -> RequestError:
        """The same error with OpenAI's field name, in `field` and in the message, and with the request's id."""
        return renamed(error, self._openai_name(error.field), self.request.request_id)

    def _openai_name(self, field: str) -> str:
        head, _, rest = field.partition(".")
        if head == "sampling" and rest:
            return self.max_tokens_name if rest == "max_new_tokens" else _SAMPLING_NAMES.get(rest, rest)
        if head == "chat" and rest.startswith(self.input_name):
            return rest
        return self.input_name if head in _INPUT_FIELDS else field


def renamed(error: RequestError, name: str, request_id: str) -> RequestError:
    """The same error with its field's name on the route, in `field` and in the message, and with the request's id."""
    message = error.message
    if error.field and message.startswith(f"{error.field}:"):
        message = name + message.removeprefix(error.field)
    return dataclasses.replace(error, field=name, message=message, request_id=request_id)


def request_id(header: str | None, prefix: str) -> str:
    """The client's `x-request-id` where it is one of ours in form, else a fresh id."""
    if header:
        try:
            return check_request_id(header)
        except RequestError:
            pass  # A header is no request field: another system's trace id must not fail the request.
    return f"{prefix}-{secrets.token_hex(16)}"


def completion_call(body: CompletionRequest, request_id: str) -> Call:
    """Raises RequestError for fields that contradict each other."""
    max_tokens = COMPLETION_DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    request = _request(body, request_id, max_tokens)
    if isinstance(body.prompt, str):
        request.text = body.prompt
    else:
        request.token_ids.CopyFrom(generate_pb2.TokenIds(ids=body.prompt))
    return Call(request, input_name="prompt", max_tokens_name="max_tokens")


def chat_call(body: ChatCompletionRequest, request_id: str) -> Call:
    """Raises RequestError for fields that contradict each other."""
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise invalid("max_tokens", "differs from max_completion_tokens; give one of them")
    newer = body.max_completion_tokens is not None
    request = _request(body, request_id, body.max_completion_tokens if newer else body.max_tokens)
    request.chat.CopyFrom(generate_pb2.ChatInput(messages=[_message(message) for message in body.messages]))
    return Call(request, input_name="messages", max_tokens_name="max_completion_tokens" if newer else "max_tokens")


def _request(body: GenerationBody, request_id: str, max_tokens: int | None) -> generate_pb2.GenerateRequest:
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "only with stream: true")
    # None leaves an optional proto field unset.
    sampling = generate_pb2.SamplingParams(
        max_new_tokens=max_tokens,
        min_new_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        repetition_penalty=body.repetition_penalty,
        seed=body.seed,
        ignore_eos=body.ignore_eos,
        stop=body.stop,
        stop_token_ids=body.stop_token_ids,
        skip_special_tokens=body.skip_special_tokens,
    )
    return generate_pb2.GenerateRequest(
        request_id=request_id, model=body.model, sampling=sampling, priority=body.priority
    )


def _message(message: ChatMessage) -> generate_pb2.ChatMessage:
    return generate_pb2.ChatMessage(role=message.role, content=message.content, name=message.name or "")
