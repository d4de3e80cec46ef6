"""What a message of a conversation may be."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, ConfigDict, Field, JsonValue, Tag, model_validator

from kvbaton.v1 import generate_pb2
from services.frontend.edge.values import Body, Handling, Only, told_by, wrong_in

# What SGLang puts between the text parts of one message for a chat template that takes strings.
PART_SEPARATOR = " "


class TextPart(Body):
    """One text of a message's content."""

    type: Literal["text"]
    text: str
    """The text."""


def _joined_parts(value: object) -> object:
    """Text parts as one string."""
    return joined_texts(value, ("text",)) if isinstance(value, list) else value


def joined_texts(value: object, kinds: tuple[str, ...], without_effect: frozenset[str] = frozenset()) -> str:
    """Parts that have one of these types as one string. Raises ValueError, which names the part."""
    texts: list[str] = []
    for position, part in enumerate(cast("list[object]", value)):
        fields = cast("dict[str, object]", part) if isinstance(part, dict) else {}
        kind, text = fields.get("type"), fields.get("text")
        if kind not in kinds:
            raise ValueError(f"part {position} is not of type {' or '.join(kinds)}, the only one that is supported")
        if not isinstance(text, str):
            raise ValueError(f"part {position} has no string in text")
        if unknown := fields.keys() - {"type", "text"} - without_effect:
            raise ValueError(f"part {position}: {min(unknown)} is not supported")
        texts.append(text)
    if not texts:
        raise ValueError("an empty list")
    return PART_SEPARATOR.join(texts)


Content = Annotated[
    str,
    BeforeValidator(_joined_parts, json_schema_input_type=str | Annotated[list[TextPart], Field(min_length=1)]),
]


class SystemMessage(Body):
    """Instructions."""

    role: Literal["system"]
    content: Content
    """Text, or text parts, which are joined with a space."""
    name: str | None = None
    """For templates that take it."""


class DeveloperMessage(Body):
    """Instructions; the template decides whether it knows this role."""

    role: Literal["developer"]
    content: Content
    """Text, or text parts, which are joined with a space."""
    name: str | None = None
    """For templates that take it."""


class UserMessage(Body):
    """What the user said."""

    role: Literal["user"]
    content: Content
    """Text, or text parts, which are joined with a space."""
    name: str | None = None
    """For templates that take it."""


class CalledFunction(Body):
    """A function and its arguments, which are JSON in a string."""

    name: str = Field(min_length=1)
    """As in `tools`."""
    arguments: str
    """A JSON object in a string."""
    parsed_arguments: Annotated[Any, Handling.NO_EFFECT] = None
    """What OpenAI's SDK made of `arguments`; it sends it back."""


class MessageToolCall(Body):
    """One call that the assistant made."""

    id: str
    """What the result refers to."""
    type: Literal["function"]
    function: CalledFunction
    """What was called."""
    index: Annotated[int | None, Handling.NO_EFFECT] = None
    """The call's place in a stream; OpenAI's SDK sends it back."""


# What the validator below says, for the API's description.
_SAYS_SOMETHING = {
    "anyOf": [
        {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}},
        {"required": ["tool_calls"], "properties": {"tool_calls": {"type": "array", "minItems": 1}}},
    ]
}


class AssistantMessage(Body):
    """What the model said before. Clients send answers back as they got them."""

    model_config = ConfigDict(json_schema_extra=cast("dict[str, JsonValue]", _SAYS_SOMETHING))

    role: Literal["assistant"]
    content: Content | None = None
    """Text, or text parts, which are joined with a space. May be missing beside `tool_calls`."""
    name: str | None = None
    """For templates that take it."""
    reasoning_content: str | None = None
    """Extension: what the model thought before this message; for templates that take it."""
    tool_calls: list[MessageToolCall] | None = None
    """What the model called."""
    parsed: Annotated[Any, Handling.NO_EFFECT] = None
    """What OpenAI's SDK made of `content`; it sends it back."""

    audio: Annotated[object, Only()] = None
    """Text only."""
    annotations: Annotated[object, Only([])] = None
    """No tool of ours makes them."""
    function_call: Annotated[object, Only()] = None
    """The older name of `tool_calls`."""
    refusal: Annotated[object, Only()] = None
    """No model of ours answers with one."""

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise wrong_in("content", "required without tool_calls")
        return self


class ToolMessage(Body):
    """What a call gave."""

    role: Literal["tool"]
    content: Content
    """Text, or text parts, which are joined with a space."""
    tool_call_id: str = Field(min_length=1)
    """The call that it answers."""


ChatMessage = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[DeveloperMessage, Tag("<developer>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    told_by("role", "system", "developer", "user", "assistant", "tool"),
]


def proto_message(message: ChatMessage) -> generate_pb2.ChatMessage:
    """As the frontend takes it."""
    match message:
        case AssistantMessage():
            return generate_pb2.ChatMessage(
                role=message.role,
                content=message.content or "",
                name=message.name or "",
                reasoning=message.reasoning_content or "",
                tool_calls=[
                    generate_pb2.ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
                    for call in message.tool_calls or ()
                ],
            )
        case ToolMessage():
            return generate_pb2.ChatMessage(
                role=message.role, content=message.content, tool_call_id=message.tool_call_id
            )
        case _:
            return generate_pb2.ChatMessage(role=message.role, content=message.content, name=message.name or "")
