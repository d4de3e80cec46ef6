"""What the items of a response's input may be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag

from services.frontend.edge.chat.messages import joined_texts
from services.frontend.edge.values import Body, Handling, Only, told_by

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Body):
    """One text of a message's content."""

    type: Literal["input_text"]
    text: str
    """The text."""


class OutputText(Body):
    """One text of an earlier answer."""

    type: Literal["output_text"]
    text: str
    """The text."""
    annotations: Annotated[list[Any] | None, Handling.NO_EFFECT] = None
    """Nothing for the model to read."""
    logprobs: Annotated[list[Any] | None, Handling.NO_EFFECT] = None
    """Nothing for the model to read."""
    parsed: Annotated[Any, Handling.NO_EFFECT] = None
    """What OpenAI's SDK made of the text; it sends it back."""


def _joined_parts(value: object) -> object:
    if not isinstance(value, list):
        return value
    return joined_texts(value, ("input_text", "output_text"), frozenset({"annotations", "logprobs", "parsed"}))


Texts = Annotated[
    str,
    BeforeValidator(_joined_parts, json_schema_input_type=str | Annotated[list[InputText], Field(min_length=1)]),
]
AnswerTexts = Annotated[
    str,
    BeforeValidator(
        _joined_parts, json_schema_input_type=str | Annotated[list[OutputText | InputText], Field(min_length=1)]
    ),
]


class MessageItem(Body):
    """What the user said, or instructions."""

    type: Literal["message"] | None = None
    role: Literal["user", "system", "developer"]
    """Who says it; the template decides whether it knows `developer`."""
    content: Texts
    """Text, or text parts, which are joined with a space."""
    id: Annotated[str | None, Handling.NO_EFFECT] = None
    """Nothing is stored under it."""
    status: Annotated[Status | None, Handling.NO_EFFECT] = None
    """Nothing for the model to read."""


class AssistantItem(Body):
    """What the model said before."""

    type: Literal["message"] | None = None
    role: Literal["assistant"]
    content: AnswerTexts
    """Text, or text parts, which are joined with a space."""
    id: Annotated[str | None, Handling.NO_EFFECT] = None
    """Nothing is stored under it."""
    status: Annotated[Status | None, Handling.NO_EFFECT] = None
    """Nothing for the model to read."""


class FunctionCallItem(Body):
    """One call that the model made; goes into the same message as what the model said right before."""

    type: Literal["function_call"]
    call_id: str
    """What the result refers to."""
    name: str = Field(min_length=1)
    """As in `tools`."""
    arguments: str
    """A JSON object in a string."""
    id: Annotated[str | None, Handling.NO_EFFECT] = None
    """Nothing is stored under it."""
    status: Annotated[Status | None, Handling.NO_EFFECT] = None
    """Nothing for the model to read."""
    parsed_arguments: Annotated[Any, Handling.NO_EFFECT] = None
    """What OpenAI's SDK made of `arguments`; it sends it back."""


class FunctionCallOutputItem(Body):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1)
    """The call that it answers."""
    output: Texts
    """Text, or text parts, which are joined with a space."""
    id: Annotated[str | None, Handling.NO_EFFECT] = None
    """Nothing is stored under it."""
    status: Annotated[Status | None, Handling.NO_EFFECT] = None
    """Nothing for the model to read."""


class SummaryText(Body):
    """One text of a summary."""

    type: Literal["summary_text"]
    text: str
    """The text."""


class ReasoningText(Body):
    """One text of what the model thought."""

    type: Literal["reasoning_text"]
    text: str
    """The text."""


class ReasoningItem(Body):
    """What the model thought before its next message or call; for templates that take it."""

    type: Literal["reasoning"]
    summary: list[SummaryText] | None = None
    """Read where there is no `content`."""
    content: list[ReasoningText] | None = None
    """What was thought."""
    id: Annotated[str | None, Handling.NO_EFFECT] = None
    """Nothing is stored under it."""
    status: Annotated[Status | None, Handling.NO_EFFECT] = None
    """Nothing for the model to read."""
    encrypted_content: Annotated[object, Only()] = None
    """Answers have their reasoning as plain `content`; nothing is encrypted."""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(part.text for part in self.content or self.summary or ())


def _kind(item: dict[str, object]) -> object:
    kind = item.get("type") or "message"
    return "assistant" if kind == "message" and item.get("role") == "assistant" else kind


InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[AssistantItem, Tag("<assistant>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    told_by("type", "message", "function_call", "function_call_output", "reasoning", tell=_kind),
]
