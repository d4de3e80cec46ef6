"""What the request bodies may hold: every field that is forwarded, and the others only at their neutral value.

Validation is strict (no "1" for 1, no true for 1) and a field that is not here is refused by name. Ranges that the
engine sets are not checked here: the frontend knows them and answers with the field's name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from services.requests import MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS

TOKEN_ID_LIMIT = 1 << 32
# Bounds what a body costs before the model's own limit is known.
MAX_TOKEN_IDS = 1 << 22

# What SGLang puts between the text parts of one message for a chat template that takes strings.
PART_SEPARATOR = " "


class Only:
    """Accepts null and the given values, each of which means what leaving the field out means."""

    def __init__(self, *values: object) -> None:
        self._values = values

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Called by pydantic."""
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Called by pydantic."""
        return {"enum": [*self._values, None]}

    def _check(self, value: object) -> None:
        if value is None or any(value == known and _same_kind(value, known) for known in self._values):
            return
        neutral = " or ".join([*(repr_json(known) for known in self._values), "null"])
        raise ValueError(f"only {neutral} is supported")


def _same_kind(value: object, known: object) -> bool:
    return isinstance(value, bool) == isinstance(known, bool)


def repr_json(value: object) -> str:
    """A value as it stands in a request."""
    return str(value).lower() if isinstance(value, bool) else str(value).replace("'", '"')


def _single_prompt(value: object) -> str | list[int]:
    """The one prompt of a request: text or token ids. Raises ValueError for more than one, and for none."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of token ids")
    items = cast("list[object]", value)
    if not items:
        raise ValueError("an empty list")
    if isinstance(items[0], str | list):
        if len(items) > 1:
            raise ValueError(f"{len(items)} prompts, only one in a request is supported")
        first = items[0]
        return first if isinstance(first, str) else token_ids(cast("list[object]", first))
    return token_ids(items)


def token_ids(items: list[object]) -> list[int]:
    """Checked, and few enough. Raises ValueError."""
    if not items:
        raise ValueError("an empty list")
    if len(items) > MAX_TOKEN_IDS:
        raise ValueError(f"more than {MAX_TOKEN_IDS} token ids")
    for position, item in enumerate(items):
        if type(item) is not int or not 0 <= item < TOKEN_ID_LIMIT:
            raise ValueError(f"the entry at position {position} is not a token id")
    return cast("list[int]", items)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _joined_parts(value: object) -> object:
    """Text parts as one string."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for position, part in enumerate(cast("list[object]", value)):
        fields = cast("dict[str, object]", part) if isinstance(part, dict) else {}
        kind, text = fields.get("type"), fields.get("text")
        if kind != "text":
            raise ValueError(f"part {position} is not of type text, the only one that is supported")
        if not isinstance(text, str):
            raise ValueError(f"part {position} has no string in text")
        if unknown := fields.keys() - {"type", "text"}:
            raise ValueError(f"part {position}: {min(unknown)} is not supported")
        texts.append(text)
    if not texts:
        raise ValueError("an empty list")
    return PART_SEPARATOR.join(texts)


class TextPart(BaseModel):
    """One text of a message's content."""

    type: Literal["text"]
    text: str


Int32 = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
Int64 = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
TokenId = Annotated[int, Field(ge=0, lt=TOKEN_ID_LIMIT)]
Prompt = Annotated[
    str | list[int],
    PlainValidator(_single_prompt, json_schema_input_type=str | list[TokenId] | list[str] | list[list[TokenId]]),
]
Stop = Annotated[
    list[str],
    Field(fail_fast=True, max_length=MAX_STOP_STRINGS),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]
Content = Annotated[str, BeforeValidator(_joined_parts, json_schema_input_type=str | list[TextPart])]


class Body(BaseModel):
    """How every body is checked."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class StreamOptions(Body):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    """End with an event that has the token counts."""
    include_obfuscation: Annotated[object, Only(False)] = None


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    """Text, or text parts, which are joined with a space."""
    name: str | None = None
    """Forwarded to the chat template."""


class GenerationBody(Body):
    """What both generation routes take."""

    model: str = Field(min_length=1)
    """A name that /v1/models reports."""
    temperature: float | None = None
    """0 is greedy. Default 1."""
    top_p: float | None = None
    """In (0, 1]. Default 1."""
    frequency_penalty: float | None = None
    """In [-2, 2]. Default 0."""
    presence_penalty: float | None = None
    """In [-2, 2]. Default 0."""
    seed: Int64 | None = None
    """Non-negative. Refused where the engine does not sample deterministically."""
    stop: Stop | None = None
    """Strings that end the answer and are not part of it."""
    stream: bool | None = None
    """Answer with server-sent events."""
    stream_options: StreamOptions | None = None
    """Only together with `stream`."""
    user: str | None = None
    """Accepted for compatibility; has no effect."""

    # Extensions that SGLang and vLLM share.
    top_k: Int64 | None = None
    """At least 1; -1 switches it off, which is the default."""
    min_p: float | None = None
    """In [0, 1]. Default 0."""
    min_tokens: Int64 | None = None
    """No end-of-sequence or stop token ends the answer before so many tokens. Default 0."""
    repetition_penalty: float | None = None
    """In (0, 2]. Default 1."""
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)] | None = None
    """Token ids that end the answer beside the model's own."""
    ignore_eos: bool | None = None
    """Do not stop at the model's end-of-sequence tokens. Default false."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text. Default true."""
    priority: Int32 | None = None
    """While requests wait for workers, higher goes first. Default 0."""

    # Known, but not supported beyond their neutral value.
    n: Annotated[object, Only(1)] = None
    logit_bias: Annotated[object, Only({})] = None


class CompletionRequest(GenerationBody):
    """Body of POST /v1/completions."""

    prompt: Prompt
    """Text or token ids. A list of prompts may have one entry."""
    max_tokens: Int64 | None = None
    """Tokens to generate. Default 16."""

    best_of: Annotated[object, Only(1)] = None
    echo: Annotated[object, Only(False)] = None
    logprobs: Annotated[object, Only(False)] = None
    suffix: Annotated[object, Only("")] = None


class ChatCompletionRequest(GenerationBody):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    """The conversation, oldest message first."""
    max_completion_tokens: Int64 | None = None
    """Tokens to generate. Default: all that the context length leaves after the prompt."""
    max_tokens: Int64 | None = None
    """The older name of `max_completion_tokens`; one of the two."""

    audio: Annotated[object, Only()] = None
    function_call: Annotated[object, Only("none")] = None
    functions: Annotated[object, Only([])] = None
    logprobs: Annotated[object, Only(False)] = None
    metadata: Annotated[object, Only({})] = None
    modalities: Annotated[object, Only(["text"])] = None
    parallel_tool_calls: Annotated[object, Only(True)] = None
    prediction: Annotated[object, Only()] = None
    prompt_cache_key: Annotated[object, Only()] = None
    prompt_cache_retention: Annotated[object, Only()] = None
    reasoning_effort: Annotated[object, Only()] = None
    response_format: Annotated[object, Only({"type": "text"})] = None
    safety_identifier: Annotated[object, Only()] = None
    service_tier: Annotated[object, Only("auto", "default")] = None
    store: Annotated[object, Only(False)] = None
    tool_choice: Annotated[object, Only("none")] = None
    tools: Annotated[object, Only([])] = None
    top_logprobs: Annotated[object, Only(0)] = None
    verbosity: Annotated[object, Only("medium")] = None
    web_search_options: Annotated[object, Only()] = None
