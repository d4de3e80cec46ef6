"""A prompt that can't fit is refused before it costs a tokenization."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from kvbaton.errors import RequestError
from kvbaton.v1 import worker_pb2
from kvbaton.v1.generate_pb2 import ChatInput, ChatMessage, GenerateRequest, TokenIds
from services.frontend.request.prepare import prepare
from services.frontend.text import ChatTemplate, TextTokenizer
from services.frontend.text_models import TextModel
from services.requests import Limits

LIMITS = Limits(context_length=12, max_prompt_tokens=10, vocab_size=300, seeded_sampling=True)
LONGEST = "<three>"
FITS = LONGEST * 10


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    """One token per byte, and an added one of seven characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    library.add_tokens([LONGEST])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
    return TextTokenizer(tmp_path)


def worker_with(tokenizer: TextTokenizer) -> Any:
    chat = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    return SimpleNamespace(
        text=TextModel(tokenizer, chat),
        model_info=None,
        record=SimpleNamespace(model=SimpleNamespace(name="m"), runtime=worker_pb2.RuntimeConfig()),
    )


def in_both_fields(text: str) -> list[GenerateRequest]:
    return [
        GenerateRequest(text=text),
        GenerateRequest(chat=ChatInput(messages=[ChatMessage(role="user", content=text)])),
    ]


@pytest.mark.parametrize(("index", "field"), [(0, "text"), (1, "chat")])
async def test_text_that_cannot_fit_is_never_encoded(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, index: int, field: str
) -> None:
    def encode(*_: object, **__: object) -> NoReturn:
        raise AssertionError("encoded")

    monkeypatch.setattr(tokenizer, "encode", encode)
    with pytest.raises(RequestError) as caught:
        await prepare(in_both_fields(FITS + "x")[index], "r", worker_with(tokenizer), LIMITS)
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_the_longest_text_that_may_fit_is_encoded(tokenizer: TextTokenizer) -> None:
    for request in in_both_fields(FITS):
        prepared = await prepare(request, "r", worker_with(tokenizer), LIMITS)
        assert prepared.token_ids == [tokenizer.token_id(LONGEST)] * 10


async def test_text_of_too_many_tokens_keeps_its_field(tokenizer: TextTokenizer) -> None:
    for request, field in zip(in_both_fields("x" * 11), ("text", "chat"), strict=True):
        with pytest.raises(RequestError, match="the prompt has 11 tokens") as caught:
            await prepare(request, "r", worker_with(tokenizer), LIMITS)
        assert caught.value.field == field


async def test_token_ids_stay_a_list(tokenizer: TextTokenizer) -> None:
    request = GenerateRequest(token_ids=TokenIds(ids=[1, 2]))
    assert (await prepare(request, "r", worker_with(tokenizer), LIMITS)).token_ids == [1, 2]
