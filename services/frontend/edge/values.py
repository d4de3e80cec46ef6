"""What the values in request bodies may be, and how a field says what becomes of it.

Validation is strict (no "1" for 1, no true for 1) and a field that a body doesn't have is refused by name. What depends
on the model or on the engine is not checked here: the frontend knows it and answers with the field's name.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any, LiteralString, cast

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from kvbaton.errors import invalid
from services.requests import MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS

TOKEN_ID_LIMIT = 1 << 32
# Bounds what a body costs before the model's own limit is known.
MAX_TOKEN_IDS = 1 << 22

IN_FIELD = "in_field"
"""The type of a pydantic error whose context names the field of the object that it is about."""


class Handling(StrEnum):
    """What becomes of a request field; stands in the annotation of those that are not simply forwarded."""

    FORWARDED = "forwarded"
    EMULATED = "emulated"
    NO_EFFECT = "accepted without effect"
    REFUSED = "refused"


class Only:
    """Accepts null and the given values, each of which means what leaving the field out means; refuses the rest."""

    def __init__(self, *values: object) -> None:
        self.values = values

    @property
    def spelled(self) -> tuple[str, ...]:
        """What is accepted beside null, as it stands in a request."""
        return tuple(orjson.dumps(known).decode() for known in self.values)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Called by pydantic."""
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Called by pydantic."""
        return {"enum": [*self.values, None]}

    def _check(self, value: object) -> None:
        if value is None or any(value == known and _same_kind(value, known) for known in self.values):
            return
        raise ValueError(f"only {' or '.join([*self.spelled, 'null'])} is supported")


def _same_kind(value: object, known: object) -> bool:
    return isinstance(value, bool) == isinstance(known, bool)


class _Context(dict[str, Any]):
    """Metadata of an annotation is hashed where the annotation stands in a union."""

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]


def told_by(field: str, *values: str, tell: Callable[[dict[str, object]], object] | None = None) -> Discriminator:
    """Chooses the variant of a union by a field, whose value is the variant's tag in angle brackets; `<>` is a string.

    The brackets let an error's place leave the tag out, which is no step of the path into the body. `tell` is for what
    the field alone doesn't say.
    """

    def tag(value: object) -> str:
        if isinstance(value, str):
            return "<>"
        if not isinstance(value, dict):
            return ""
        fields = cast("dict[str, object]", value)
        return f"<{tell(fields) if tell is not None else fields.get(field)}>"

    allowed = ", ".join(values)
    return Discriminator(
        tag,
        custom_error_type=IN_FIELD,
        custom_error_message=f"must be one of {allowed}",
        custom_error_context=_Context(field=field),
    )


def wrong_in(field: str, message: str) -> PydanticCustomError:
    """What a validator of a whole object raises about one of its fields."""
    return PydanticCustomError(IN_FIELD, cast("LiteralString", message), {"field": field})


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


def _token_ids(value: object) -> list[int]:
    if not isinstance(value, list):
        raise ValueError("must be a list of token ids")
    return token_ids(cast("list[object]", value))


def json_text(value: object, field: str) -> str:
    """The value of a field as JSON again. Raises RequestError for one that is nested too deeply to be written."""
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:
        # What was parsed has only types that can be written, but may be four times as deep.
        raise invalid(field, f"can't be forwarded: {error}") from None


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Int32 = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
Natural = Annotated[int, Field(ge=0, lt=1 << 63)]
Positive = Annotated[int, Field(ge=1, lt=1 << 63)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0, lt=TOKEN_ID_LIMIT)]
TokenIdList = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKEN_IDS)]
"""Only for schemas: checking so many ids one by one is what `token_ids` is for."""
TokenIds = Annotated[list[int], PlainValidator(_token_ids, json_schema_input_type=TokenIdList)]
StopString = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    list[StopString],
    Field(fail_fast=True, max_length=MAX_STOP_STRINGS),
    BeforeValidator(
        _as_list, json_schema_input_type=StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
    ),
]
StopTokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)]
ModelName = Annotated[str, Field(min_length=1)]


class Body(BaseModel):
    """How every body is checked."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
