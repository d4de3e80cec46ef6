"""OpenAI's embeddings: the request body, what it becomes, and the body of the answer."""

from __future__ import annotations

import base64
from array import array
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import orjson
from pydantic import Field, PlainValidator
from typing_extensions import TypedDict

from kvbaton.errors import RequestError
from kvbaton.token_ids import pack
from kvbaton.v1 import embed_pb2
from services.embedding_requests import MAX_INPUTS
from services.frontend.edge.calls import renamed
from services.frontend.edge.values import Body, Handling, TokenIdList, token_ids

EncodingFormat = Literal["float", "base64"]


def _inputs(value: object) -> str | list[str] | list[int] | list[list[int]]:
    """One text or list of token ids, or a list of either. Raises ValueError."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")
    items = cast("list[object]", value)
    if not items:
        raise ValueError("an empty list")
    if len(items) > MAX_INPUTS and not isinstance(items[0], int):
        raise ValueError(f"{len(items)} inputs, at most {MAX_INPUTS}")
    if isinstance(items[0], str):
        if not all(isinstance(item, str) for item in items):
            raise ValueError("some entries are strings and some are not")
        return cast("list[str]", items)
    if isinstance(items[0], list):
        if not all(isinstance(item, list) for item in items):
            raise ValueError("some entries are lists and some are not")
        return [token_ids(cast("list[object]", item)) for item in items]
    return token_ids(items)


Inputs = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(
        _inputs,
        json_schema_input_type=str
        | TokenIdList
        | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
        | Annotated[list[TokenIdList], Field(min_length=1, max_length=MAX_INPUTS)],
    ),
]


class EmbeddingsRequest(Body):
    """Body of POST /v1/embeddings."""

    model: str = Field(min_length=1)
    """A name that /v1/models reports."""
    input: Inputs
    """One text or list of token ids, or a list of either."""
    encoding_format: Annotated[EncodingFormat | None, Handling.EMULATED] = None
    """How vectors are written: `float`, the default, or `base64` of little-endian float32."""
    dimensions: Annotated[int, Field(ge=1, lt=1 << 32)] | None = None
    """Numbers in each vector. Only for models that were trained for it."""
    user: Annotated[str | None, Handling.NO_EFFECT] = None
    """Nobody is watched."""

    truncate: bool | None = None
    """Extension: cut the end off an input that is longer than the model takes. Default: refuse it."""


class EmbeddingObject(TypedDict):
    """One vector; a string in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """Token counts of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    """The answer, in the order of the inputs."""

    object: Literal["list"]
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage


@dataclass(frozen=True, slots=True)
class EmbeddingCall:
    """One request to the frontend; `single` when its input was no list of inputs."""

    request: embed_pb2.EmbedRequest
    single: bool

    @classmethod
    def of(cls, body: EmbeddingsRequest, request_id: str) -> EmbeddingCall:
        """From a body that is valid by itself."""
        single = isinstance(body.input, str) or isinstance(body.input[0], int)
        inputs = cast("list[str | list[int]]", [body.input] if single else body.input)
        request = embed_pb2.EmbedRequest(
            request_id=request_id,
            model=body.model,
            inputs=[_input(each) for each in inputs],
            truncate=body.truncate,
            dimensions=body.dimensions,
        )
        return cls(request, single)

    def in_openai_terms(self, error: RequestError) -> RequestError:
        """The same error with OpenAI's field name, in `field` and in the message, and with the request's id."""
        return renamed(error, self._openai_name(error.field), self.request.request_id)

    def _openai_name(self, field: str) -> str:
        """`input[3]` for `inputs[3].text`, and `input` where there is only one."""
        head, separator, _ = field.partition("]")
        if not head.startswith("inputs"):
            return field
        return "input" if self.single or not separator else f"input{head.removeprefix('inputs')}]"


def answer_body(response: embed_pb2.EmbedResponse, model: str, encoding: EncodingFormat) -> bytes:
    """OpenAI's body."""
    data = [
        EmbeddingObject(object="embedding", index=index, embedding=_written(each.float32, encoding))
        for index, each in enumerate(response.embeddings)
    ]
    tokens = response.usage.prompt_tokens
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    return orjson.dumps(EmbeddingList(object="list", data=data, model=model, usage=usage))


def _input(value: str | list[int]) -> embed_pb2.EmbedInput:
    if isinstance(value, str):
        return embed_pb2.EmbedInput(text=value)
    return embed_pb2.EmbedInput(token_ids=pack(value))


def _written(float32: bytes, encoding: EncodingFormat) -> Any:
    return base64.b64encode(float32).decode() if encoding == "base64" else array("f", float32).tolist()
