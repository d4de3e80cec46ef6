"""SmolLM2 as an embedding model: SGLang's vectors are transformers' pooled states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from pathlib import Path

import grpc
import pytest

from kvbaton.errors import Reason
from kvbaton.v1 import worker_pb2
from tests.e2e.conftest import TEXTS, Embedded
from tests.e2e.reference import PROMPT_LENGTHS, pooled_states

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

DIMENSION = 576


@pytest.fixture(scope="module")
def states(model_path: Path, prompts: dict[int, list[int]]) -> dict[int, list[float]]:
    return pooled_states(model_path, prompts)


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(map(mul, one, other)) / math.hypot(*one) / math.hypot(*other)


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
async def test_vectors_equal_transformers_pooled_states(
    embedded: Embedded, states: dict[int, list[float]], length: int
) -> None:
    for vector in (embedded.alone[length], embedded.together[length]):
        assert len(vector) == DIMENSION
        assert math.hypot(*vector) == pytest.approx(1.0, abs=1e-5)
        assert cosine(vector, states[length]) > 0.999
    others = [states[other] for other in PROMPT_LENGTHS if other != length]
    assert max(cosine(embedded.alone[length], other) for other in others) < 0.999, "or the comparison proves nothing"


async def test_texts_have_the_tokens_that_transformers_gives_them(embedded: Embedded, model_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokens = {index: tokenizer(text).input_ids for index, text in enumerate(TEXTS)}
    states = pooled_states(model_path, tokens)
    for index, vector in enumerate(embedded.texts.vectors):
        assert embedded.texts.response.embeddings[index].prompt_tokens == len(tokens[index])
        assert cosine(vector, states[index]) > 0.999
    assert embedded.texts.response.usage.prompt_tokens == sum(map(len, tokens.values()))


async def test_what_the_model_cannot_do_is_refused_by_name(embedded: Embedded) -> None:
    assert (embedded.generation.code, embedded.generation.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        Reason.WRONG_ROLE,
    )
    assert (embedded.dimensions.code, embedded.dimensions.field) == (grpc.StatusCode.INVALID_ARGUMENT, "dimensions")


async def test_nothing_is_left_in_the_engine(embedded: Embedded) -> None:
    status = embedded.status
    assert (status.role, status.state) == (worker_pb2.WORKER_ROLE_EMBEDDING, worker_pb2.WORKER_STATE_SERVING)
    assert (status.load.live_requests, status.load.used_tokens) == (0, 0)
