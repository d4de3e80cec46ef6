"""What the body of POST /v1/completions may hold."""

from __future__ import annotations

from typing import Annotated, cast

from pydantic import Field, PlainValidator

from services.frontend.edge.formats import ResponseFormat
from services.frontend.edge.sampling import Choices, SamplingBody, TopLogprobs
from services.frontend.edge.stream_options import StreamOptions
from services.frontend.edge.values import Handling, Only, Positive, TokenIdList, token_ids
from services.frontend.request.choices import MAX_CHOICES

PromptValue = str | list[int]


def _prompts(value: object) -> list[PromptValue]:
    """Texts or lists of token ids, also where the request has only one. Raises ValueError."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of token ids, a list of strings, or a list of lists of token ids")
    items = cast("list[object]", value)
    if not items:
        raise ValueError("an empty list")
    if not isinstance(items[0], str | list):
        return [token_ids(items)]
    if len(items) > MAX_CHOICES:
        raise ValueError(f"{len(items)} prompts, at most {MAX_CHOICES}")
    if isinstance(items[0], str):
        if not all(isinstance(item, str) for item in items):
            raise ValueError("some entries are strings and some are not")
        return cast("list[PromptValue]", items)
    if not all(isinstance(item, list) for item in items):
        raise ValueError("some entries are lists and some are not")
    return [token_ids(cast("list[object]", item)) for item in items]


Prompts = Annotated[
    list[PromptValue],
    PlainValidator(
        _prompts,
        json_schema_input_type=str
        | TokenIdList
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[TokenIdList], Field(min_length=1, max_length=MAX_CHOICES)],
    ),
]


class CompletionRequest(SamplingBody):
    """Body of POST /v1/completions."""

    prompt: Prompts
    """Text or token ids, or a list of either: each prompt is a request of its own, all end when one fails."""
    max_tokens: Positive | None = None
    """Tokens to generate. Default 16."""
    n: Choices | None = None
    """Answers to each prompt; the choice at `n` times the prompt's place, and on. Default 1."""
    logprobs: TopLogprobs | None = None
    """The log probability of every generated token, and of so many likeliest ones at its position."""
    echo: Annotated[bool | None, Handling.EMULATED] = None
    """Puts the prompt in front of the text; token ids are detokenized for it. Not with `logprobs`."""
    best_of: Annotated[Choices | None, Handling.NO_EFFECT] = None
    """Only the same as `n`: nothing is ranked."""
    stream_options: Annotated[StreamOptions | None, Handling.EMULATED] = None
    """Only with `stream`."""

    response_format: ResponseFormat | None = None
    """Holds the answer to JSON or to a schema. Needs a grammar backend, except `text`."""
    json_schema: Annotated[str, Field(min_length=1)] | None = None
    """Holds the answer to a JSON Schema, which is JSON in a string."""

    user: Annotated[str | None, Handling.NO_EFFECT] = None
    """Nobody is watched."""

    suffix: Annotated[object, Only("")] = None
    """There is no fill-in-the-middle."""
