"""/tokenize and /detokenize as SGLang and vLLM have them: what the bodies hold, and what they become."""

from __future__ import annotations

from typing import Annotated, NotRequired

from pydantic import ConfigDict, JsonValue
from typing_extensions import TypedDict

from kvbaton.errors import RequestError, invalid
from kvbaton.v1 import text_pb2
from services.frontend.edge.calls import renamed
from services.frontend.edge.chat.schema import ConversationBody, Messages
from services.frontend.edge.chat.translate import chat_input, chat_name
from services.frontend.edge.values import Body, Handling, ModelName, TokenIds

_OF_CHATS: dict[str, JsonValue] = {name: {"type": "null"} for name in ("messages", *ConversationBody.model_fields)}
# What `tokenize_request` refuses, for the API's description.
_ONE_INPUT: dict[str, JsonValue] = {
    "oneOf": [
        {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, **_OF_CHATS}},
        {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": {"type": "null"}}},
    ]
}


class TokenizeRequest(ConversationBody):
    """Body of POST /tokenize: a prompt, or the messages of a chat."""

    model_config = ConfigDict(json_schema_extra=_ONE_INPUT)

    model: ModelName | None = None
    """A name that /v1/models reports; may be missing where there is only one."""
    prompt: str | None = None
    """Text."""
    messages: Messages | None = None
    """A conversation, as for /v1/chat/completions."""
    add_special_tokens: bool | None = None
    """Add what the tokenizer adds to a prompt. Default: true for `prompt`, false for `messages`."""
    return_token_strs: Annotated[bool | None, Handling.EMULATED] = None
    """Answer with what each token stands for as well, in the tokenizer's own spelling."""


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: ModelName | None = None
    """A name that /v1/models reports; may be missing where there is only one."""
    tokens: TokenIds
    """Token ids."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text. Default true."""


class Tokenized(TypedDict):
    """The tokens of a prompt. `max_model_len` is the context length, prompt and answer together."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: NotRequired[list[str]]


class Detokenized(TypedDict):
    """The text twice: SGLang calls it `text`, vLLM `prompt`."""

    text: str
    prompt: str


def tokenize_request(body: TokenizeRequest) -> text_pb2.TokenizeRequest:
    """Raises RequestError for a body without one input, or with fields that don't go with it."""
    request = text_pb2.TokenizeRequest(model=body.model or "", add_special_tokens=body.add_special_tokens)
    if body.messages is not None:
        if body.prompt is not None:
            raise invalid("prompt", "contradicts messages; give one of them")
        request.chat.CopyFrom(chat_input(body, body.messages))
        return request
    if body.prompt is None:
        raise invalid("prompt", "missing: one of prompt or messages")
    for name in ConversationBody.model_fields:
        if getattr(body, name) is not None:
            raise invalid(name, "only with messages")
    request.text = body.prompt
    return request


def detokenize_request(body: DetokenizeRequest) -> text_pb2.DetokenizeRequest:
    """As the frontend takes it."""
    return text_pb2.DetokenizeRequest(
        model=body.model or "", token_ids=body.tokens, skip_special_tokens=body.skip_special_tokens
    )


def tokenized(response: text_pb2.TokenizeResponse, *, with_strings: bool) -> Tokenized:
    """The answer of /tokenize."""
    ids = list(response.token_ids)
    body = Tokenized(tokens=ids, count=len(ids), max_model_len=response.context_length)
    if with_strings:
        body["token_strs"] = list(response.tokens)
    return body


def in_body_terms(error: RequestError, request_id: str) -> RequestError:
    """The same error with its field's name in the bodies of these routes."""
    names = {"text": "prompt", "input": "prompt", "token_ids": "tokens"}
    return renamed(error, chat_name(names, error.field), request_id)
