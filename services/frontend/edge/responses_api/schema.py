"""What the body of POST /v1/responses may hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag

from services.frontend.edge.chat.schema import Metadata, ReasoningEffort
from services.frontend.edge.chat.tools import MAX_TOOLS, ChoiceWord, FunctionDefinition, FunctionName
from services.frontend.edge.formats import JsonObjectFormat, JsonSchema, TextFormat
from services.frontend.edge.responses_api.items import InputItem
from services.frontend.edge.sampling import SamplingBody, TopLogprobs
from services.frontend.edge.values import Body, Handling, Only, Positive, told_by

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED_REASONING = "reasoning.encrypted_content"


class _OfAFunction(Body):
    type: Literal["function"]


# The base that stands last is checked first: what is no function is told by its type.
class FunctionTool(FunctionDefinition, _OfAFunction):
    """A function that the model may call."""


class NamedTool(Body):
    """The one function that must be called."""

    type: Literal["function"]
    name: FunctionName
    """As in `tools`."""


class FlatJsonSchemaFormat(JsonSchema):
    """JSON of a schema."""

    type: Literal["json_schema"]


class TextConfig(Body):
    """What the text of the answer is like."""

    format: (
        Annotated[
            Annotated[TextFormat, Tag("<text>")]
            | Annotated[JsonObjectFormat, Tag("<json_object>")]
            | Annotated[FlatJsonSchemaFormat, Tag("<json_schema>")],
            told_by("type", "text", "json_object", "json_schema"),
        ]
        | None
    ) = None
    """Holds the answer to JSON or to a schema. Needs a grammar backend, except `text`."""
    verbosity: Annotated[object, Only("medium")] = None
    """No template takes it; say it in a message."""


class Reasoning(Body):
    """How much the model thinks."""

    effort: ReasoningEffort | None = None
    """Becomes the template arguments `reasoning_effort`, and `thinking` and `enable_thinking`, false for `none`."""
    summary: Annotated[object, Only("auto")] = None
    """Answers have the reasoning itself."""
    generate_summary: Annotated[object, Only("auto")] = None
    """The older name of `summary`."""


class ResponseStreamOptions(Body):
    """What a stream carries beside the text."""

    include_obfuscation: Annotated[object, Only(False)] = None
    """Events are not padded."""


ToolChoice = Annotated[
    Annotated[ChoiceWord, Tag("<>")] | Annotated[NamedTool, Tag("<function>")], told_by("type", "function")
]


def _as_items(value: object) -> object:
    return [{"type": "message", "role": "user", "content": value}] if isinstance(value, str) else value


Input = Annotated[
    list[InputItem],
    Field(min_length=1, fail_fast=True),
    BeforeValidator(_as_items, json_schema_input_type=str | Annotated[list[InputItem], Field(min_length=1)]),
]


class ResponsesRequest(SamplingBody):
    """Body of POST /v1/responses."""

    input: Input
    """What the user says, or the items of a whole conversation, those of earlier answers as they came."""
    instructions: str | None = None
    """A system message in front of the input."""
    max_output_tokens: Positive | None = None
    """Tokens to generate. Default: all that the context length leaves after the prompt."""
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    """Functions that the model may call. Needs a tool parser in the model's record."""
    tool_choice: ToolChoice | None = None
    """Default: auto with tools, none without. `required` and a function's name need a grammar backend."""
    parallel_tool_calls: bool | None = None
    """False: at most one call. Default true."""
    text: TextConfig | None = None
    """What the text of the answer is like."""
    reasoning: Reasoning | None = None
    """How much the model thinks."""
    top_logprobs: TopLogprobs | None = None
    """The log probability of every token of the text, and of so many likeliest ones at its position."""
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    """`message.output_text.logprobs` as `top_logprobs: 0`; `reasoning.encrypted_content` does nothing: reasoning is
    plain, and can be sent back as it came."""

    chat_template_kwargs: dict[str, Any] | None = None
    """Extension: further variables of the chat template; they win over what `reasoning.effort` sets."""

    metadata: Annotated[Metadata | None, Handling.EMULATED] = None
    """Comes back in the answer."""
    stream_options: Annotated[ResponseStreamOptions | None, Handling.NO_EFFECT] = None
    """Has nothing to choose."""
    prompt_cache_key: Annotated[str | None, Handling.NO_EFFECT] = None
    """The prefix cache needs no key."""
    safety_identifier: Annotated[str | None, Handling.NO_EFFECT] = None
    """Nobody is watched."""
    user: Annotated[str | None, Handling.NO_EFFECT] = None
    """As `safety_identifier`."""

    background: Annotated[object, Only(False)] = None
    """Nothing is stored."""
    conversation: Annotated[object, Only()] = None
    """Nothing is stored; send the whole conversation as `input`."""
    max_tool_calls: Annotated[object, Only()] = None
    """It counts calls of built-in tools, and there are none."""
    previous_response_id: Annotated[object, Only()] = None
    """Nothing is stored; send the whole conversation as `input`."""
    prompt: Annotated[object, Only()] = None
    """Nothing is stored; send the prompt itself."""
    prompt_cache_retention: Annotated[object, Only("in-memory")] = None
    """How long the prefix cache keeps a prompt is the engine's decision."""
    service_tier: Annotated[object, Only("auto", "default")] = None
    """There is one tier; `priority` orders requests."""
    store: Annotated[object, Only(False)] = None
    """Nothing is stored. Left out it means false here."""
    truncation: Annotated[object, Only("disabled")] = None
    """What is too long is refused."""
