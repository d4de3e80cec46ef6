"""From what a client sent to what embedding workers take: checks by field, tokenization off the event loop."""

from __future__ import annotations

from dataclasses import dataclass, replace

import grpc

from kvbaton.errors import Reason, RequestError, invalid
from kvbaton.token_ids import pack
from kvbaton.v1 import embed_pb2
from services.embedding_requests import (
    EmbeddingSize,
    FittedInput,
    check_count,
    check_dimensions,
    check_tokens,
    fit,
    fit_sent,
    input_field,
)
from services.frontend.router.worker import Worker
from services.frontend.text import InvalidTextError, TextTokenizer
from services.requests import Limits


@dataclass(frozen=True, slots=True)
class PreparedEmbedding:
    """A request that any embedding worker of its model can run; `dimensions` None for whole vectors."""

    model: str
    inputs: list[FittedInput]
    dimensions: int | None
    prompt_tokens: int

    def to_proto(self, request_id: str) -> embed_pb2.EmbedRequest:
        """For a worker."""
        return embed_pb2.EmbedRequest(
            request_id=request_id,
            model=self.model,
            inputs=[embed_pb2.EmbedInput(token_ids=pack(each.token_ids)) for each in self.inputs],
            dimensions=self.dimensions,
        )


async def prepare(
    request: embed_pb2.EmbedRequest, worker: Worker, limits: Limits, size: EmbeddingSize
) -> PreparedEmbedding:
    """Checks and tokenizes. `worker` is any of the model's, `limits` and `size` what all of them take.

    Raises RequestError naming the field.
    """
    dimensions = check_dimensions(request, size)
    check_count(request, dimensions or size.dimension)
    texts = _texts(request, limits, worker)
    encoded = await _encode(texts, worker, limits, truncate=request.truncate)
    inputs = [
        replace(encoded[index], truncated=encoded[index].truncated or len(texts[index]) < len(each.text))
        if index in encoded
        else fit_sent(each.token_ids, limits, truncate=request.truncate, field=input_field(index))
        for index, each in enumerate(request.inputs)
    ]
    return PreparedEmbedding(worker.record.model.name, inputs, dimensions, check_tokens(inputs))


def _texts(request: embed_pb2.EmbedRequest, limits: Limits, worker: Worker) -> dict[int, str]:
    """The inputs that are text, by position; what can't fit is refused, or cut, before it costs anything."""
    texts: dict[int, str] = {}
    for index, each in enumerate(request.inputs):
        match each.WhichOneof("input"):
            case "token_ids":
                continue
            case "text":
                texts[index] = _bounded(each.text, input_field(index, "text"), limits, worker, cut=request.truncate)
            case _:
                raise invalid(f"inputs[{index}]", "missing: one of text or token_ids")
    return texts


def _bounded(text: str, field: str, limits: Limits, worker: Worker, *, cut: bool) -> str:
    if not text:
        raise invalid(field, "the text is empty")
    if worker.text is None:
        raise RequestError(
            grpc.StatusCode.FAILED_PRECONDITION,
            Reason.NO_TOKENIZER,
            f"{field}: model {worker.record.model.name!r} has no tokenizer; send token_ids",
            field=field,
        )
    # No token stands for more characters than the longest one.
    most = limits.max_prompt_tokens * worker.text.tokenizer.longest_token
    if len(text) > most and not cut:
        raise invalid(
            field,
            f"the text has {len(text)} characters, more than the {limits.max_prompt_tokens} tokens that the model takes"
            " can hold",
        )
    return text[:most]


async def _encode(texts: dict[int, str], worker: Worker, limits: Limits, *, truncate: bool) -> dict[int, FittedInput]:
    if not texts or worker.text is None:
        return {}
    tokenizer: TextTokenizer = worker.text.tokenizer
    at_most = limits.max_prompt_tokens if truncate else None
    try:
        encoded = await tokenizer.encode_all(list(texts.values()), at_most=at_most)
    except InvalidTextError as error:
        raise invalid("inputs", str(error)) from error
    fitted: dict[int, FittedInput] = {}
    for index, each in zip(texts, encoded, strict=True):
        checked = fit(each.token_ids, limits, truncate=False, field=input_field(index, "text"))
        fitted[index] = FittedInput(checked.token_ids, each.truncated)
    return fitted
