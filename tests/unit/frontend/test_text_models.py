"""Tokenizers by digest: fetched once, and a worker that stalls holds up nobody who needs nothing from it."""

from __future__ import annotations

import asyncio
import gc
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from kvbaton.v1 import model_pb2
from services.frontend import text_models
from services.frontend.text import TokenizerError
from services.frontend.text_models import TextModels
from services.models.tokenizer_files import digest, find_tokenizer_files


class FakeWorker:
    """A ModelService stub with one tokenizer; a frozen one answers nothing."""

    def __init__(self, folder: Path, token: str, *, frozen: bool = False) -> None:
        folder.mkdir()
        Tokenizer(models.BPE(vocab={token: 0}, merges=[])).save(str(folder / "tokenizer.json"))
        self._content = (folder / "tokenizer.json").read_bytes()
        self.info = model_pb2.ModelInfo(tokenizer_sha256=digest(find_tokenizer_files(folder)))
        self.frozen = frozen
        self.asked = 0

    async def GetTokenizer(self, *_: object, timeout: float) -> AsyncIterator[model_pb2.GetTokenizerResponse]:
        self.asked += 1
        if self.frozen:
            await asyncio.sleep(timeout)
        yield model_pb2.GetTokenizerResponse(
            file_name="tokenizer.json",
            data=self._content,
            file_size=len(self._content),
            file_sha256=hashlib.sha256(self._content).hexdigest(),
        )


async def get(texts: TextModels, worker: Any) -> text_models.TextModel:
    model = await asyncio.wait_for(texts.get(worker.info, worker), 5)
    assert model is not None
    return model


async def test_a_frozen_worker_holds_up_neither_what_is_in_memory_nor_another_model(tmp_path: Path) -> None:
    texts = TextModels(tmp_path / "cache")
    known = FakeWorker(tmp_path / "known", "a")
    loaded = await get(texts, known)
    frozen = FakeWorker(tmp_path / "frozen", "b", frozen=True)
    waiting = asyncio.create_task(get(texts, frozen))
    await asyncio.sleep(0.05)
    assert frozen.asked == 1

    assert await get(texts, known) is loaded
    assert (await get(texts, FakeWorker(tmp_path / "other", "c"))).tokenizer.token_id("c") == 0
    assert not waiting.done()

    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    texts.close()


async def test_a_worker_that_stalls_gives_way_to_another_of_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_models, "_STALL_TIMEOUT", 0.2)
    texts = TextModels(tmp_path / "cache")
    frozen, healthy = FakeWorker(tmp_path / "one", "a", frozen=True), FakeWorker(tmp_path / "two", "a")
    assert frozen.info == healthy.info
    stalled = asyncio.create_task(get(texts, frozen))
    await asyncio.sleep(0.05)

    assert (await get(texts, healthy)).tokenizer.token_id("a") == 0
    with pytest.raises(TokenizerError, match=r"nothing came for 0\.2 s"):
        await stalled
    texts.close()


async def test_many_who_want_the_same_fetch_it_once(tmp_path: Path) -> None:
    texts = TextModels(tmp_path / "cache")
    worker = FakeWorker(tmp_path / "one", "a")
    first, *others = await asyncio.gather(*(get(texts, worker) for _ in range(8)))
    assert all(other is first for other in others)
    assert worker.asked == 1
    gc.collect()
    assert len(texts._locks) == 0, "nothing is kept for a digest that nobody waits for"
    texts.close()
