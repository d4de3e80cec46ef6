"""What an embedding request may ask for, and the checks that refuse a bad one by field.

As in `requests`, the frontend and the workers run the same checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvbaton.errors import invalid
from kvbaton.v1 import embed_pb2, generate_pb2, worker_pb2
from services.requests import Limits, check_prompt, sent_tokens

# OpenAI's.
MAX_INPUTS = 2048
MAX_TOKENS = 300_000
# A response must fit into one message of 64 MiB.
MAX_VECTOR_BYTES = 48 * 1024 * 1024
BYTES_PER_NUMBER = 4


@dataclass(frozen=True, slots=True)
class EmbeddingSize:
    """How many numbers a model's vectors have, and to how many they may be cut.

    With `matryoshka` the beginning of a vector is a vector too: of any length, or of one of `matryoshka_dimensions`
    where there are any (Kusupati et al., Matryoshka Representation Learning, 2022).
    """

    dimension: int
    matryoshka: bool = False
    matryoshka_dimensions: tuple[int, ...] = ()

    def to_proto(self) -> worker_pb2.EmbeddingConfig:
        """The wire value."""
        return worker_pb2.EmbeddingConfig(
            dimension=self.dimension, matryoshka=self.matryoshka, matryoshka_dimensions=self.matryoshka_dimensions
        )

    @classmethod
    def from_proto(cls, config: worker_pb2.EmbeddingConfig) -> EmbeddingSize:
        """What a worker published."""
        return cls(config.dimension, config.matryoshka, tuple(config.matryoshka_dimensions))


@dataclass(frozen=True, slots=True)
class FittedInput:
    """The tokens of one input, which the model takes; `truncated` when some were cut off."""

    token_ids: list[int]
    truncated: bool = False


def input_field(index: int, kind: str = "token_ids") -> str:
    """How errors name a field of one input."""
    return f"inputs[{index}].{kind}"


def check_dimensions(request: embed_pb2.EmbedRequest, size: EmbeddingSize) -> int | None:
    """To how many numbers the vectors are cut; None when they stay whole."""
    if not request.HasField("dimensions") or request.dimensions == size.dimension:
        return None
    asked = request.dimensions
    if not 0 < asked < size.dimension:
        raise invalid("dimensions", f"{asked} is not in [1, {size.dimension}], the size of the model's vectors")
    if not size.matryoshka:
        raise invalid(
            "dimensions",
            f"the model's vectors have {size.dimension} numbers and can't be cut to {asked}: its configuration names no"
            " matryoshka dimensions",
        )
    if size.matryoshka_dimensions and asked not in size.matryoshka_dimensions:
        raise invalid("dimensions", f"{asked} is not one of {', '.join(map(str, size.matryoshka_dimensions))}")
    return asked


def check_count(request: embed_pb2.EmbedRequest, dimensions: int) -> None:
    """So many inputs, with vectors of so many numbers, fit into one request and its response."""
    count = len(request.inputs)
    if not count:
        raise invalid("inputs", "there is none")
    most = min(MAX_INPUTS, MAX_VECTOR_BYTES // (dimensions * BYTES_PER_NUMBER))
    if count > most:
        raise invalid("inputs", f"{count} inputs, at most {most} with vectors of {dimensions} numbers")


def fit(token_ids: Sequence[int], limits: Limits, *, truncate: bool, field: str) -> FittedInput:
    """The input as the model takes it. Raises RequestError naming `field`."""
    longest = limits.max_prompt_tokens
    cut = truncate and len(token_ids) > longest
    return FittedInput(check_prompt(token_ids[:longest] if cut else token_ids, limits, field=field), cut)


def fit_sent(wire: generate_pb2.TokenIds, limits: Limits, *, truncate: bool, field: str) -> FittedInput:
    """`fit` of ids as they came. Raises RequestError naming `field`."""
    return fit(sent_tokens(wire, field=field), limits, truncate=truncate, field=field)


def check_tokens(inputs: Iterable[FittedInput]) -> int:
    """The tokens of all inputs together."""
    total = sum(len(each.token_ids) for each in inputs)
    if total > MAX_TOKENS:
        raise invalid("inputs", f"{total} tokens in all inputs together, at most {MAX_TOKENS}")
    return total
